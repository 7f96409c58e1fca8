// The arguments of SMYRF's functions.

#pragma once

#include <cstdint>

#include "arguments.h"
#include "bf16.h"

namespace thresher {

#define SIZES(FIELD)                                                                                \
    FIELD(int64_t, groups)                                                                          \
    FIELD(int64_t, n)                                                                               \
    FIELD(int64_t, m)                                                                               \
    FIELD(int64_t, d)                                                                               \
    FIELD(int64_t, dv)
struct Sizes {
    THRESHER_FIELDS(SIZES)
};

// Which queries meet which keys. A slot without a token holds the number of all tokens. Where causal, query i sees keys
// j <= i + shift, and the keys of a cluster ascend.
#define PART(FIELD)                                                                                 \
    FIELD(const int64_t*, token_q)          /* [groups, tiles, tile] */                             \
    FIELD(const int64_t*, token_k)          /* [groups, clusters, cluster] */                       \
    FIELD(const int64_t*, tile_cluster)     /* cluster of each tile, [groups, tiles], or null */    \
    FIELD(const int64_t*, query_cluster)    /* cluster of each query, [rounds, groups, n] */        \
    FIELD(const int64_t*, key_cluster)      /* cluster of each key, [rounds, groups, m] */          \
    FIELD(int64_t, tiles)                   /* of all rounds */                                     \
    FIELD(int64_t, tile)                    /* queries of a tile */                                 \
    FIELD(int64_t, clusters)                /* of all rounds */                                     \
    FIELD(int64_t, cluster)                 /* keys of a cluster */                                 \
    FIELD(int64_t, rounds)                                                                          \
    FIELD(int64_t, causal)                                                                          \
    FIELD(int64_t, shift)                                                                           \
    FIELD(int64_t, times)                   /* how often each meeting counts */
struct Part {
    THRESHER_FIELDS(PART)
};

// What tails are made of (smyrf_tail.h); pointers are null without tails. There is one base, or where causal as many as
// clusters in the first part.
#define TAIL(FIELD)                                                                                 \
    FIELD(const T*, tail_factor)            /* [groups] */                                          \
    FIELD(T*, dropped)                      /* number of keys that a query drops, [groups, n] */    \
    FIELD(T*, product)                      /* of the query with the sum of these, [groups, n] */   \
    FIELD(T*, base_keys)                    /* [groups, bases, d] */                                \
    FIELD(T*, base_values)                  /* [groups, bases, dv] */                               \
    FIELD(int64_t, first)                   /* whether this part is the first one */                \
    FIELD(int64_t, alone)                   /* and the only one */
template <class T>
struct Tail {
    THRESHER_FIELDS(TAIL)
};

#define ATTEND_ARGUMENTS(FIELD)                                                                     \
    FIELD(Sizes, sizes)                                                                             \
    FIELD(Part, part)                                                                               \
    FIELD(Tail<T>, tail)                                                                            \
    FIELD(const S*, queries)                /* [groups, n, d] */                                    \
    FIELD(const S*, keys)                   /* [groups, m, d] */                                    \
    FIELD(const S*, values)                 /* [groups, m, dv] */                                   \
    FIELD(T*, out)                          /* [groups, n, dv], merged with what is there */        \
    FIELD(T*, row_max)                      /* [groups, n] */                                       \
    FIELD(T*, row_sum)                      /* [groups, n] */                                       \
    FIELD(int64_t*, meetings)               /* pairs that meet, summed, [groups] */                 \
    FIELD(int64_t*, repeats)                /* those that met in an earlier round, [groups] */      \
    FIELD(int64_t, threads)
template <class S, class T = Number<S>>
struct AttendArguments {
    THRESHER_FIELDS(ATTEND_ARGUMENTS)
};

#define BACK_ARGUMENTS(FIELD)                                                                       \
    FIELD(Sizes, sizes)                                                                             \
    FIELD(Part, part)                                                                               \
    FIELD(Tail<T>, tail)                                                                            \
    FIELD(const S*, queries)                                                                        \
    FIELD(const S*, keys)                                                                           \
    FIELD(const S*, values)                                                                         \
    FIELD(const T*, out)                                                                            \
    FIELD(const T*, row_max)                                                                        \
    FIELD(const T*, row_sum)                                                                        \
    FIELD(const T*, grad)                   /* of outputs */                                        \
    FIELD(T*, dropped_benefit)              /* product of grad and dropped values, [groups, n] */   \
    FIELD(T*, weight)                       /* as in TailGradient, [groups, n] */                   \
    FIELD(T*, through)                      /* likewise */                                          \
    FIELD(T*, grad_queries)                 /* added up, as are the next two */                     \
    FIELD(T*, grad_keys)                                                                            \
    FIELD(T*, grad_values)                                                                          \
    FIELD(T*, grad_tail_factor)             /* [groups] */                                          \
    FIELD(int64_t, threads)
template <class S, class T = Number<S>>
struct BackArguments {
    THRESHER_FIELDS(BACK_ARGUMENTS)
};

#define RANK_ARGUMENTS(FIELD)                                                                       \
    FIELD(const T*, hashes)                 /* [rows, n] */                                         \
    FIELD(int64_t*, ranks)                  /* [rows, n] */                                         \
    FIELD(int64_t, rows)                                                                            \
    FIELD(int64_t, n)                                                                               \
    FIELD(int64_t, threads)
template <class T>
struct RankArguments {
    THRESHER_FIELDS(RANK_ARGUMENTS)
};

}  // namespace thresher
