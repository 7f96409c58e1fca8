// The tail of a row: what its dropped keys weigh, each as their mean score says (attention/shared/tail.py).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "arguments.h"
#include "gathered.h"
#include "vector.h"

namespace thresher {

constexpr double MAX_EXCESS = 30;  // nats by which a dropped key may outweigh the best kept one

// Sums are over the keys that a query sees.
#define TAIL(FIELD)                                                                                     \
    FIELD(const T*, tail_scores)        /* sums of scores, [groups, n], or null: there is no tail */    \
    FIELD(const T*, tail_values)        /* sums of values, [groups, n, dv], or [groups, dv] */          \
    FIELD(const T*, tail_number)        /* of keys, [groups, n] */                                      \
    FIELD(const T*, tail_factor)        /* [groups, n] */                                               \
    FIELD(int64_t, tail_per_row)        /* each query has sums of values of its own */
template <class T>
struct Tail {
    THRESHER_FIELDS(TAIL)
    explicit operator bool() const { return tail_scores != nullptr; }
    const T* values(int64_t row, int64_t group, int64_t dv) const {
        return tail_values + (tail_per_row ? row : group) * dv;
    }
};

template <class T>
T sum_of(const T* x, int64_t number) {
    constexpr int64_t LANES = Wide<T>::LANES;
    Vector<T> sum{};
    int64_t i = 0;
    for (; i + LANES <= number; i += LANES) sum += load(x + i);
    T rest = 0;
    for (; i < number; ++i) rest += x[i];
    return total<T>(sum) + rest;
}

// Give the tail its part of a row's weights, which are softmax weights of `number` kept keys when this is called. After
// it they are what each kept key weighs more than a dropped one, and row_sum includes the tail. Return the weight of a
// dropped key, less its factor. `sum` is that of the scores of kept keys.
template <class T>
inline T weigh_tail(const Tail<T>& tail, int64_t row, int64_t number, T sum, T row_max, T& row_sum, T* weight) {
    const T dropped = tail.tail_number[row] - T(number);
    if (number == 0 || dropped < T(0.5)) return T(0);
    const T mean = (tail.tail_scores[row] - sum) / dropped;
    const T one = std::exp(std::min(mean - row_max, T(MAX_EXCESS))), share = one * tail.tail_factor[row];
    const T all = row_sum + share * dropped, kept = row_sum / all, less = share / all;
    for (int64_t j = 0; j < number; ++j) weight[j] = weight[j] * kept - less;
    row_sum = all;
    return one / all;
}

// Set a row's output to what all its visible keys would add to it at the weight of a dropped one.
template <class T>
inline void start_row(const Tail<T>& tail, int64_t row, int64_t group, int64_t dv, T weight, T* out) {
    if (!tail || weight == T(0)) {
        std::fill_n(out, dv, T(0));
        return;
    }
    const T share = weight * tail.tail_factor[row];
    const T* values = tail.values(row, group, dv);
    for (int64_t c = 0; c < dv; ++c) out[c] = share * values[c];
}

// What backward needs to know about the tail of a row.
template <class T>
struct TailGradient {
    T weight = 0;   // of a dropped key
    T mean = 0;     // score of the dropped keys
    T through = 0;  // gradient to the score of one dropped key
    T factor = 0;   // gradient to the factor

    TailGradient() = default;

    // `less_factor` is what weigh_tail returned; `sum` is of the scores of kept keys, `products` of those of their values
    // with the output's gradient, `constant` is the product of the output with its gradient.
    TailGradient(const Tail<T>& tail, int64_t row, int64_t group, int64_t dv, T less_factor, int64_t number, T sum,
                 T products, T constant, const T* grad) {
        if (less_factor == T(0)) return;
        const T dropped = tail.tail_number[row] - T(number);
        mean = (tail.tail_scores[row] - sum) / dropped;
        factor = less_factor * (dot(grad, tail.values(row, group, dv), dv) - products - dropped * constant);
        weight = less_factor * tail.tail_factor[row];
        through = factor * tail.tail_factor[row] / dropped;
    }
};

}  // namespace thresher
