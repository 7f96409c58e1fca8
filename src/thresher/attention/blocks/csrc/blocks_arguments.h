// What the functions of blocks are called with. S is the type of queries, keys and values, T that of sums.

#pragma once

#include <algorithm>
#include <cstdint>

#include "arguments.h"
#include "bf16.h"
#include "gate.h"

namespace thresher {

// How queries are dealt into blocks, and whether those of a block vote or choose each for itself.
#define SHARING(FIELD)                                                                              \
    FIELD(int64_t, size)                /* queries of a block */                                    \
    FIELD(int64_t, votes)               /* the queries of a block choose together */                \
    FIELD(int64_t, every)               /* of those that are not hidden, each such one votes */
struct Sharing {
    THRESHER_FIELDS(SHARING)
    int64_t blocks(int64_t n) const { return (n + size - 1) / size; }
    int64_t begin(int64_t block) const { return block * size; }
    int64_t end(int64_t block, int64_t n) const { return std::min((block + 1) * size, n); }
};

// What a block chose by a vote, so that gradients need no second one over all keys.
#define CHOSEN(FIELD)                                                                               \
    FIELD(int64_t*, chosen)             /* a bit for each key, [groups, blocks, words] */           \
    FIELD(T*, vote_max)                 /* largest product of each voting query's codes, [groups, n] */ \
    FIELD(T*, vote_share)               /* weight of an exponential in its block's votes */         \
    FIELD(T*, best)                     /* log vote of each block, [groups, blocks] */              \
    FIELD(T*, unit)                     /* of differences between log votes, [groups, blocks] */
template <class T>
struct Chosen {
    THRESHER_FIELDS(CHOSEN)
};

// Of each query, row_max is the largest score of its kept keys, row_sum the sum of exp(score - row_max), tail included.
#define ATTEND_ARGUMENTS(FIELD)                                                                     \
    FIELD(Gate<T>, gate)                                                                            \
    FIELD(Sharing, sharing)                                                                         \
    FIELD(const S*, queries)            /* [groups, n, d] */                                        \
    FIELD(const S*, keys)               /* [groups, m, d] */                                        \
    FIELD(const S*, values)             /* [groups, m, dv] */                                       \
    FIELD(double, scale)                /* of scores */                                             \
    FIELD(const T*, tail_factor)        /* [groups], or null: rows have no tail */                  \
    FIELD(T*, out)                      /* [groups, n, dv] */                                       \
    FIELD(T*, tail_weight)              /* of a dropped key, less its factor, [groups, n], or null */ \
    FIELD(int32_t*, kept)               /* pairs of each query, [groups, n] */                      \
    FIELD(int32_t*, computed)           /* those that its block computed, [groups, n] */            \
    FIELD(T*, row_max)                  /* [groups, n] */                                           \
    FIELD(T*, row_sum)                  /* [groups, n] */                                           \
    FIELD(Chosen<T>, by_vote)                                                                       \
    FIELD(int64_t, threads)
template <class S, class T = Number<S>>
struct AttendArguments {
    THRESHER_FIELDS(ATTEND_ARGUMENTS)
};

#define BACK_ARGUMENTS(FIELD)                                                                       \
    FIELD(Gate<T>, gate)                                                                            \
    FIELD(Sharing, sharing)                                                                         \
    FIELD(double, width)                /* how far within the threshold the gate has a gradient; 0: none */ \
    FIELD(const S*, queries)                                                                        \
    FIELD(const S*, keys)                                                                           \
    FIELD(const S*, values)                                                                         \
    FIELD(double, scale)                                                                            \
    FIELD(const T*, out)                                                                            \
    FIELD(const T*, row_max)                                                                        \
    FIELD(const T*, row_sum)                                                                        \
    FIELD(const T*, tail_factor)                                                                    \
    FIELD(const T*, tail_weight)                                                                    \
    FIELD(Chosen<T>, by_vote)                                                                       \
    FIELD(const T*, grad)               /* of outputs */                                            \
    FIELD(const T*, grad_kept)          /* of how much is kept, [groups] */                         \
    FIELD(T*, grad_queries)                                                                         \
    FIELD(T*, grad_keys)                                                                            \
    FIELD(T*, grad_values)                                                                          \
    FIELD(T*, grad_threshold)                                                                       \
    FIELD(T*, grad_tail_factor)         /* [groups], or null */                                     \
    FIELD(int64_t, threads)
template <class S, class T = Number<S>>
struct BackArguments {
    THRESHER_FIELDS(BACK_ARGUMENTS)
};

}  // namespace thresher
