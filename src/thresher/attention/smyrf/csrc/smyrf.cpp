// Softmax attention of tiles of queries inside clusters of keys, merged, and its gradients; ranks of hash values, which
// clusters are cut by; the tail of what a query met in no cluster.
//
// Of each query, row_max is the largest score, row_sum the sum of exp(score - row_max). One number, their log-sum-exp,
// would lose the sum to rounding where scores are huge.
//
// Inside a round a query is in one tile and a key in one cluster, so clusters are independent tasks; rounds follow one
// another. Sums run in one order whatever the number of threads.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bf16.h"
#include "parallel.h"
#include "ranks.h"
#include "smyrf_arguments.h"
#include "smyrf_cluster.h"
#include "smyrf_tail.h"

using namespace thresher;

namespace {

// Go through the clusters of a part, round by round, with as many groups at a time as there are threads, so that a group
// stays in cache. Call begin(group), then take(cluster, group, its number) for each cluster.
template <class S, class Begin, class Take>
void by_clusters(const Sizes& sizes, const Part& part, int64_t threads, const Begin& begin, const Take& take) {
    const int64_t each = part.clusters / part.rounds;
    const auto make = [&] { return Cluster<S>(sizes, part); };
    for (int64_t first = 0; first < sizes.groups; first += threads) {
        const int64_t groups = std::min(threads, sizes.groups - first);
        parallel_for(groups, threads, [&](int64_t g) { begin(first + g); });
        for (int64_t round = 0; round < part.rounds; ++round)
            parallel_for(groups * each, threads, make, [&](int64_t task, Cluster<S>& of_thread) {
                const int64_t g = first + task / each, cluster = round * each + task % each;
                of_thread.take(g, cluster);
                take(of_thread, g, cluster);
            });
    }
}

template <class S>
void attend(const AttendArguments<S> a) {
    const Sizes& sizes = a.sizes;
    const Part& part = a.part;
    std::vector<int64_t> counts(2 * sizes.groups * part.clusters, 0);
    const auto begin = [&](int64_t g) {
        if (a.tail.tail_factor && a.tail.alone) drop_in_group(a, g);
    };
    by_clusters<S>(sizes, part, a.threads, begin, [&](Cluster<S>& of_thread, int64_t g, int64_t cluster) {
        int64_t* count = &counts[2 * (g * part.clusters + cluster)];
        of_thread.attend(a, count[0], count[1]);
    });
    for (int64_t i = 0; i < sizes.groups * part.clusters; ++i) {
        a.meetings[i / part.clusters] += counts[2 * i];
        a.repeats[i / part.clusters] += counts[2 * i + 1];
    }
}

template <class S>
void back(const BackArguments<S> a) {
    const auto begin = [&](int64_t g) {
        if (!a.tail.tail_factor || !a.tail.alone) return;
        drop_back_in_group(a, g);
        start_back_in_group(a, g);
    };
    by_clusters<S>(a.sizes, a.part, a.threads, begin,
                   [&](Cluster<S>& of_thread, int64_t, int64_t) { of_thread.back(a); });
}

// What the following three do comes before all parts; where there is one only, attend and back do it themselves.
template <class S>
void drop(const AttendArguments<S> a) {
    parallel_for(a.sizes.groups, a.threads, [&](int64_t g) { drop_in_group(a, g); });
}

template <class S>
void drop_back(const BackArguments<S> a) {
    parallel_for(a.sizes.groups, a.threads, [&](int64_t g) { drop_back_in_group(a, g); });
}

template <class S>
void start_back(const BackArguments<S> a) {
    parallel_for(a.sizes.groups, a.threads, [&](int64_t g) { start_back_in_group(a, g); });
}

template <class T>
void rank(const RankArguments<T> a) {
    parallel_for(a.rows, a.threads, [] { return Ranks<T>(); },
                 [&](int64_t row, Ranks<T>& ranks) { ranks.take(a.hashes + row * a.n, a.n, a.ranks + row * a.n); });
}

}  // namespace

#define EXPORT_FOR(S, NAME)                             \
    THRESHER_EXPORT(attend, AttendArguments, S, NAME)   \
    THRESHER_EXPORT(drop, AttendArguments, S, NAME)     \
    THRESHER_EXPORT(back, BackArguments, S, NAME)       \
    THRESHER_EXPORT(drop_back, BackArguments, S, NAME)  \
    THRESHER_EXPORT(start_back, BackArguments, S, NAME)

EXPORT_FOR(float, float32)
EXPORT_FOR(double, float64)
EXPORT_FOR(Bf16, bfloat16)

THRESHER_EXPORT(rank, RankArguments, float, float32)
THRESHER_EXPORT(rank, RankArguments, double, float64)
