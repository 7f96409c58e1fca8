// Shares that queries have in keys of a block, written query by query and read key by key, so that what is added to a
// key stays in registers.

#pragma once

#include <cstdint>
#include <vector>

namespace thresher {

template <class T>
class Shares {
    struct One {
        int32_t key, query;
        T in_key, in_value;
    };
    std::vector<One> given;
    std::vector<int64_t> end;
    std::vector<int32_t> query;
    std::vector<T> in_key, in_value;

public:
    void add(int64_t key, int64_t of, T to_key, T to_value) {
        given.push_back({int32_t(key), int32_t(of), to_key, to_value});
    }

    // Call take(key, number, queries, in_keys, in_values) for each of `block` keys from `first` on; forget them all.
    template <class Take>
    void deal(int64_t first, int64_t block, Take&& take) {
        end.assign(block + 1, 0);
        query.resize(given.size());
        in_key.resize(given.size());
        in_value.resize(given.size());
        for (const One& x : given) ++end[x.key - first + 1];
        for (int64_t j = 1; j <= block; ++j) end[j] += end[j - 1];
        for (const One& x : given) {
            const int64_t at = end[x.key - first]++;
            query[at] = x.query;
            in_key[at] = x.in_key;
            in_value[at] = x.in_value;
        }
        given.clear();
        for (int64_t j = 0, begin = 0; j < block; begin = end[j++])
            if (end[j] > begin) take(first + j, end[j] - begin, &query[begin], &in_key[begin], &in_value[begin]);
    }
};

}  // namespace thresher
