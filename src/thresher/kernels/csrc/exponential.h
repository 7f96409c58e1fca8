// exp of whole vectors: to 2 units in the last place in fp32, the standard library's in fp64.

#pragma once

#include <cmath>

#include "vector.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace thresher {

inline Vector<float> exponential(Vector<float> x) {
    typedef uint32_t Bits __attribute__((vector_size(BYTES)));
    const Vector<float> lowest = Vector<float>{} - 87.0f, highest = Vector<float>{} + 88.0f;
    const auto vanishes = x < lowest;
    x = vanishes ? lowest : x;  // in this order, so that NaN stays NaN
    x = x > highest ? highest : x;
    // x = n log 2 + r, where adding and subtracting 1.5 * 2^23 rounds to the nearest whole number.
    const Vector<float> shifted = x * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f;
    const Vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector<float> y = Vector<float>{} + 1.9875691500e-4f;  // the minimax polynomial of Cephes
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const Bits power = ((Bits)shifted << 23) + (127u << 23);
    y *= (Vector<float>)power;
    return vanishes ? Vector<float>{} : y;
}

inline Vector<double> exponential(Vector<double> x) {
    for (int i = 0; i < Wide<double>::LANES; ++i) x[i] = std::exp(x[i]);
    return x;
}

template <class T>
inline T largest(Vector<T> x) {
    T best = x[0];
    for (int i = 1; i < Wide<T>::LANES; ++i) best = x[i] > best ? x[i] : best;
    return best;
}

template <class T>
inline T total(Vector<T> x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps(x);
#endif
    T sum = x[0];
    for (int i = 1; i < Wide<T>::LANES; ++i) sum += x[i];
    return sum;
}

}  // namespace thresher
