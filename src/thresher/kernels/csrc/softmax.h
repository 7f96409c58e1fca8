// Softmax of a row of scores, in vectors of the processor's width.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "exponential.h"
#include "vector.h"

namespace thresher {

// Replace numbers by `of` of their vectors; the last vector is padded with `rest`.
template <class T, class Of>
inline void transform(T* x, int64_t number, T rest, Of&& of) {
    constexpr int64_t LANES = Wide<T>::LANES;
    const int64_t whole = number / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) store(x + i, of(load(x + i)));
    T last[LANES];
    std::fill_n(last, LANES, rest);
    std::copy_n(x + whole, number - whole, last);
    store(last, of(load(last)));
    std::copy_n(last, number - whole, x + whole);
}

// Turn scores into weights exp(score - row_max) / row_sum.
template <class T>
void soften(T* score, int64_t number, T& row_max, T& row_sum) {
    constexpr int64_t LANES = Wide<T>::LANES;
    const T nothing = -std::numeric_limits<T>::infinity();
    Vector<T> most = Vector<T>{} + nothing, sum{};
    int64_t i = 0;
    for (; i + LANES <= number; i += LANES) most = load(score + i) > most ? load(score + i) : most;
    row_max = largest<T>(most);
    for (; i < number; ++i) row_max = score[i] > row_max ? score[i] : row_max;
    transform(score, number, nothing, [&](Vector<T> x) {
        const Vector<T> e = exponential(x - row_max);
        sum += e;
        return e;
    });
    row_sum = total<T>(sum);
    for (i = 0; i < number; ++i) score[i] *= 1 / row_sum;
}

}  // namespace thresher
