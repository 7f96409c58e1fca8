// The keys of a cluster that a query met in an earlier round.

#pragma once

#include <cstdint>
#include <vector>

#include "bitmask.h"
#include "smyrf_arguments.h"
#include "smyrf_rows.h"

namespace thresher {

// Rounds are those of one part: parts have no key in common that a query meets.
class Repeats {
  public:
    explicit Repeats(const Sizes& sizes, const Part& part) : s(sizes), part(part) {}

    // Take the keys of a cluster of this round.
    void take(int64_t group, int64_t of_round, const Rows& keys) {
        g = group;
        round = of_round;
        number = keys.size();
        if (!round) return;
        cluster.resize(round * number);
        met.assign((number + KEYS - 1) / KEYS * KEYS, 0);
        list.resize(met.size() + KEYS);
        for (int64_t r = 0; r < round; ++r)
            for (int64_t j = 0; j < number; ++j)
                cluster[r * number + j] = int32_t(part.key_cluster[(r * s.groups + g) * s.m + keys.tokens[j]]);
    }

    // Find the keys that a query met before; return their number.
    int64_t find(int64_t query) {
        if (!round) return 0;
        for (int64_t r = 0; r < round; ++r) {
            const int32_t mine = int32_t(part.query_cluster[(r * s.groups + g) * s.n + query]);
            const int32_t* theirs = &cluster[r * number];
            for (int64_t j = 0; j < number; ++j) met[j] = (r && met[j]) | (theirs[j] == mine);
        }
        int32_t* end = list.data();
        for (int64_t j = 0; j < int64_t(met.size()); j += KEYS) end = write_indices(reach(&met[j], 1), j, end);
        return end - list.data();
    }

    // The place in its cluster of the i-th key that was found.
    int64_t operator[](int64_t i) const { return list[i]; }

  private:
    const Sizes& s;
    const Part& part;
    int64_t g = 0, round = 0, number = 0;
    std::vector<int32_t> cluster;  // of each key in the earlier rounds
    std::vector<int32_t> met;      // 1 for those that the query met, with zeros behind
    std::vector<int32_t> list;
};

}  // namespace thresher
