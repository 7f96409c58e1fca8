// How estimates from integer codes choose keys: the fields that kernels with thresholds on estimates share.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "arguments.h"
#include "bitmask.h"
#include "tail.h"

namespace thresher {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define THRESHER_VNNI
#endif
#if defined(THRESHER_VNNI)
constexpr int64_t GROUP = 4;  // dimensions of a key side by side in packed codes
#else
constexpr int64_t GROUP = 2;
#endif

template <class Arguments>
auto tokens_of(const Arguments& a) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(a.queries)>>;
    const auto& gate = a.gate;
    return Tokens<S>{a.queries, a.keys,  a.values, gate.shown_k, gate.groups, gate.n,
                     gate.m,    gate.d, gate.dv,  gate.causal,  gate.shift,  a.scale};
}

// The rule that selects keys. Query i sees keys j <= i + shift where causal.
#define GATE(FIELD)                                                                                     \
    FIELD(const int8_t*, q_codes)       /* [groups, n, d] */                                            \
    FIELD(const int8_t*, k_codes)       /* [groups, m, d] */                                            \
    FIELD(const T*, q_unit)             /* what a code stands for, [groups, n] */                       \
    FIELD(const T*, k_unit)             /* [groups, m], or [groups] without unit_per_key */             \
    FIELD(const uint8_t*, shown_q)      /* [groups, n], or null */                                      \
    FIELD(const uint8_t*, shown_k)      /* [groups, m], or null */                                      \
    FIELD(const T*, threshold)          /* [groups] */                                                  \
    FIELD(int64_t, groups)                                                                              \
    FIELD(int64_t, n)                                                                                   \
    FIELD(int64_t, m)                                                                                   \
    FIELD(int64_t, d)                                                                                   \
    FIELD(int64_t, dv)                                                                                  \
    FIELD(int64_t, causal)                                                                              \
    FIELD(int64_t, shift)                                                                               \
    FIELD(int64_t, spread)              /* thresholds count the distance from the best to the mean */   \
    FIELD(int64_t, always_keep)         /* leading keys that are kept wherever visible */               \
    FIELD(int64_t, unit_per_key)                                                                        \
    FIELD(double, step)                 /* what a product of codes is multiplied by */
template <class T>
struct Gate {
    THRESHER_FIELDS(GATE)
    int64_t words() const { return (d + GROUP - 1) / GROUP; }  // in the codes of a token
    int64_t blocks() const { return (m + KEYS - 1) / KEYS; }
    int64_t end(int64_t i) const { return causal ? std::min(m, i + shift + 1) : m; }
};

}  // namespace thresher
