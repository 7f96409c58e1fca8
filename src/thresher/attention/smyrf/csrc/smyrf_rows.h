// The tokens of a cluster or a tile, and their rows as small matrices in cache.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "bf16.h"
#include "vector.h"

namespace thresher {

constexpr int64_t LINE = 64;  // bytes of a line of the cache

// The tokens of a cluster or a tile.
struct Rows {
    std::vector<int64_t> tokens;
    int64_t size() const { return static_cast<int64_t>(tokens.size()); }

    void take(const int64_t* slots, int64_t number, int64_t none) {
        tokens.clear();
        for (int64_t i = 0; i < number; ++i)
            if (slots[i] < none) tokens.push_back(slots[i]);
    }
};

// Rows as numbers, or as factors, padded with zeros.
template <class E, class S>
void gather(const Rows& rows, const S* from, int64_t width, std::vector<E>& to) {
    constexpr bool pairs = std::is_same_v<E, Pair>;
    const int64_t number = pairs ? factors<S>(width) : width, wide = padded(number);
    if (static_cast<int64_t>(to.size()) < rows.size() * wide) to.resize(rows.size() * wide);
    for (int64_t i = 0; i < rows.size(); ++i) {
        const S* row = from + rows.tokens[i] * width;
        E* out = &to[i * wide];
        for (int64_t c = 0; c < number; ++c) {
            if constexpr (pairs)
                out[c] = factor(row, c, width);
            else
                out[c] = as_number(row[c]);
        }
        std::fill(out + number, out + wide, E{});
    }
}

// Prefetch rows that are read soon: they lie apart, and no processor foresees them. Always inlined, because GCC takes a
// function that only prefetches for one without effect, and drops the call.
template <class S>
__attribute__((always_inline)) inline void fetch(const Rows& rows, int64_t from, int64_t to, const S* x,
                                                 int64_t width) {
    for (int64_t i = from; i < std::min(to, rows.size()); ++i) {
        const char* row = reinterpret_cast<const char*>(x + rows.tokens[i] * width);
        for (int64_t byte = 0; byte < width * int64_t(sizeof(S)); byte += LINE) __builtin_prefetch(row + byte);
    }
}

// to[c, i] = x[i, c], rows of `to` padded with zeros.
template <class E>
void turn(const std::vector<E>& x, int64_t rows, int64_t width, std::vector<E>& to) {
    const int64_t wide = padded(rows);
    if (static_cast<int64_t>(to.size()) < width * wide) to.resize(width * wide);
    for (int64_t c = 0; c < width; c += 8) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t e = 0; e < 8; ++e) to[(c + e) * wide + i] = x[i * width + c + e];
        for (int64_t e = 0; e < 8; ++e) std::fill(&to[(c + e) * wide] + rows, &to[(c + e) * wide] + wide, E{});
    }
}

template <class T>
void add_rows(const Rows& rows, const std::vector<T>& from, int64_t width, T* to) {
    const int64_t wide = padded(width);
    for (int64_t i = 0; i < rows.size(); ++i)
        for (int64_t c = 0; c < width; ++c) to[rows.tokens[i] * width + c] += from[i * wide + c];
}

}  // namespace thresher
