// The arguments of LATTE's functions. S is the type of queries, keys and values, T that of sums.

#pragma once

#include <cstdint>

#include "arguments.h"
#include "bf16.h"
#include "gate.h"

namespace thresher {

#define ENCODE_ARGUMENTS(FIELD)                                                                         \
    FIELD(const S*, tokens)             /* [groups, n, d] */                                            \
    FIELD(int8_t*, codes)               /* [groups, n, d] */                                            \
    FIELD(T*, unit)                     /* [groups, n] per token, or [groups] */                        \
    FIELD(int64_t, groups)                                                                              \
    FIELD(int64_t, n)                                                                                   \
    FIELD(int64_t, d)                                                                                   \
    FIELD(int64_t, per_token)                                                                           \
    FIELD(int64_t, bits)                                                                                \
    FIELD(int64_t, truncate)            /* bits are cut off instead of rounded */                       \
    FIELD(int64_t, threads)
template <class S, class T = Number<S>>
struct EncodeArguments {
    THRESHER_FIELDS(ENCODE_ARGUMENTS)
};

// For each query: row_max, the largest score of its kept keys; row_sum, the sum of exp(score - row_max) with the tail.
#define ATTEND_ARGUMENTS(FIELD)                                                                         \
    FIELD(Gate<T>, gate)                                                                                \
    FIELD(const S*, queries)            /* [groups, n, d] */                                            \
    FIELD(const S*, keys)               /* [groups, m, d] */                                            \
    FIELD(const S*, values)             /* [groups, m, dv] */                                           \
    FIELD(double, scale)                /* of scores */                                                 \
    FIELD(const T*, tail_factor)        /* [groups], or null: rows have no tail */                      \
    FIELD(T*, out)                      /* [groups, n, dv] */                                           \
    FIELD(T*, tail_weight)              /* of a dropped key, less its factor, [groups, n], or null */   \
    FIELD(int32_t*, kept)               /* [groups, n] */                                               \
    FIELD(T*, row_max)                  /* [groups, n] */                                               \
    FIELD(T*, row_sum)                  /* [groups, n] */                                               \
    FIELD(int64_t, threads)
template <class S, class T = Number<S>>
struct AttendArguments {
    THRESHER_FIELDS(ATTEND_ARGUMENTS)
};

#define BACK_ARGUMENTS(FIELD)                                                                           \
    FIELD(Gate<T>, gate)                                                                                \
    FIELD(double, width)                /* how far from the threshold the gate has a gradient; 0: none */ \
    FIELD(int64_t, inside)              /* it has one on the kept side alone */                         \
    FIELD(int64_t, into_scores)         /* it reaches scores */                                         \
    FIELD(const S*, queries)                                                                            \
    FIELD(const S*, keys)                                                                               \
    FIELD(const S*, values)                                                                             \
    FIELD(double, scale)                                                                                \
    FIELD(const T*, out)                                                                                \
    FIELD(const T*, row_max)                                                                            \
    FIELD(const T*, row_sum)                                                                            \
    FIELD(const T*, tail_factor)                                                                        \
    FIELD(const T*, tail_weight)                                                                        \
    FIELD(const T*, grad)               /* of outputs */                                                \
    FIELD(const T*, grad_kept)          /* of how much is kept, [groups] */                             \
    FIELD(T*, grad_queries)                                                                             \
    FIELD(T*, grad_keys)                                                                                \
    FIELD(T*, grad_values)                                                                              \
    FIELD(T*, grad_threshold)                                                                           \
    FIELD(T*, grad_tail_factor)         /* [groups], or null */                                         \
    FIELD(int64_t, threads)
template <class S, class T = Number<S>>
struct BackArguments {
    THRESHER_FIELDS(BACK_ARGUMENTS)
};

// Decoding: the queries of a group share its keys and see all of them.
#define DECODE_ARGUMENTS(FIELD)                                                                         \
    FIELD(const S*, queries)            /* [groups, rows, d] */                                         \
    FIELD(const S*, keys)               /* [groups, m, d] */                                            \
    FIELD(const S*, values)             /* [groups, m, dv] */                                           \
    FIELD(const int8_t*, q_codes)       /* [groups, rows, d] */                                         \
    FIELD(const int8_t*, k_codes)       /* [groups, m, d] */                                            \
    FIELD(const T*, q_unit)             /* [groups, rows] */                                            \
    FIELD(const T*, k_unit)             /* [groups, m] */                                               \
    FIELD(const uint8_t*, shown_k)      /* [groups, m], or null */                                      \
    FIELD(const T*, threshold)          /* [groups, rows] */                                            \
    FIELD(int64_t, groups)                                                                              \
    FIELD(int64_t, rows)                                                                                \
    FIELD(int64_t, m)                                                                                   \
    FIELD(int64_t, d)                                                                                   \
    FIELD(int64_t, dv)                                                                                  \
    FIELD(int64_t, spread)                                                                              \
    FIELD(int64_t, always_keep)                                                                         \
    FIELD(double, step)                                                                                 \
    FIELD(double, scale)                                                                                \
    FIELD(const T*, key_sum)            /* of visible keys, [groups, d] */                              \
    FIELD(const T*, value_sum)          /* of their values, [groups, dv] */                             \
    FIELD(const T*, tail_factor)        /* [groups, rows], or null: rows have no tail, nor sums */      \
    FIELD(T*, out)                      /* [groups, rows, dv] */                                        \
    FIELD(int32_t*, kept)               /* [groups, rows] */                                            \
    FIELD(int64_t, threads)
template <class S, class T = Number<S>>
struct DecodeArguments {
    THRESHER_FIELDS(DECODE_ARGUMENTS)
};

}  // namespace thresher
