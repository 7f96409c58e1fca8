// Products with scattered rows of a matrix: at(0), at(1), ... are their indices.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "bf16.h"
#include "exponential.h"
#include "vector.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace thresher {

constexpr int ROWS_AT_ONCE = 8;
constexpr int USUAL_WIDTH = 64;  // of heads

// The totals of ROWS_AT_ONCE vectors.
template <class T>
inline void totals(const Vector<T> (&sum)[ROWS_AT_ONCE], T* to) {
    for (int z = 0; z < ROWS_AT_ONCE; ++z) to[z] = total<T>(sum[z]);
}
#if defined(__AVX512F__)
template <>
inline void totals<float>(const Vector<float> (&sum)[ROWS_AT_ONCE], float* to) {
    // Each quarter of the result holds a part of four totals.
    const auto of_four = [](Vector<float> a, Vector<float> b, Vector<float> c, Vector<float> d) {
        const __m512 one = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const __m512 two = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        return _mm512_add_ps(_mm512_shuffle_ps(one, two, 0x44), _mm512_shuffle_ps(one, two, 0xEE));
    };
    const __m512 first = of_four(sum[0], sum[1], sum[2], sum[3]), second = of_four(sum[4], sum[5], sum[6], sum[7]);
    const __m512 halves =
        _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xDD));
    const __m512 all = _mm512_add_ps(halves, _mm512_shuffle_f32x4(halves, halves, 0xB1));
    _mm_storeu_ps(to, _mm512_castps512_ps128(all));
    _mm_storeu_ps(to + 4, _mm512_extractf32x4_ps(all, 2));
}
#elif defined(__AVX__)
template <>
inline void totals<float>(const Vector<float> (&sum)[ROWS_AT_ONCE], float* to) {
    for (int z = 0; z < ROWS_AT_ONCE; z += 4) {
        const __m256 two = _mm256_hadd_ps((__m256)sum[z], (__m256)sum[z + 1]);
        const __m256 all = _mm256_hadd_ps(two, _mm256_hadd_ps((__m256)sum[z + 2], (__m256)sum[z + 3]));
        _mm_storeu_ps(to + z, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
    }
}
#endif

template <class X, class Y, class T = Number<X>>
inline T dot(const X* x, const Y* y, int64_t d) {
    constexpr int64_t LANES = Wide<T>::LANES;
    Vector<T> sum{};
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) sum += load_numbers(x + c) * load_numbers(y + c);
    T all = total<T>(sum);
    for (; c < d; ++c) all += as_number(x[c]) * as_number(y[c]);
    return all;
}

template <class X, class Y, class Width, class At>
inline void dots_of(const X* x, const Y* y, Width d, int64_t number, const At& at, Number<X>* to) {
    using T = Number<X>;
    constexpr int64_t LANES = Wide<T>::LANES, MANY = ROWS_AT_ONCE;
    for (int64_t i = 0; i < number; i += MANY) {
        const bool all_there = i + MANY <= number;
        const Y* row[MANY];
        if (all_there)
            for (int64_t z = 0; z < MANY; ++z) row[z] = y + at(i + z) * d;
        else
            for (int64_t z = 0; z < MANY; ++z) row[z] = y + at(std::min(i + z, number - 1)) * d;
        Vector<T> sum[MANY] = {};
        int64_t c = 0;
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<X, Bf16> && std::is_same_v<Y, Bf16>)
            for (; c + 2 * LANES <= d; c += 2 * LANES) {
                const auto pairs = [](const Bf16* p) { return (__m512bh)_mm512_loadu_si512(p); };
                const __m512bh some = pairs(x + c);
                for (int64_t z = 0; z < MANY; ++z) sum[z] = _mm512_dpbf16_ps(sum[z], some, pairs(row[z] + c));
            }
#endif
#pragma GCC unroll 4
        for (; c + LANES <= d; c += LANES) {
            const Vector<T> some = load_numbers(x + c);
            for (int64_t z = 0; z < MANY; ++z) sum[z] += some * load_numbers(row[z] + c);
        }
        T some[MANY];
        T* all = all_there ? to + i : some;
        totals<T>(sum, all);
        for (; c < d; ++c)
            for (int64_t z = 0; z < MANY; ++z) all[z] += as_number(x[c]) * as_number(row[z][c]);
        if (!all_there) std::copy_n(some, number - i, to + i);
    }
}

template <int N>
using Constant = std::integral_constant<int, N>;

// Dot products of x with rows of y. For the usual width of heads, known at compile time, x stays in registers, which
// saves 6 % of LATTE's time.
template <class X, class Y, class At>
inline void dots(const X* x, const Y* y, int64_t d, int64_t number, const At& at, Number<X>* to) {
    if (d == USUAL_WIDTH)
        dots_of(x, y, Constant<USUAL_WIDTH>{}, number, at, to);
    else
        dots_of(x, y, d, number, at, to);
}

// Call take(Constant<vectors>, first column) for the columns of a row, four vectors at a time while there are as many;
// return the first column that fills no vector.
template <class T, class Take>
inline int64_t in_vectors(int64_t d, const Take& take) {
    constexpr int64_t LANES = Wide<T>::LANES;
    int64_t c = 0;
    for (; c + 4 * LANES <= d; c += 4 * LANES) take(Constant<4>{}, c);
    for (; c + 2 * LANES <= d; c += 2 * LANES) take(Constant<2>{}, c);
    for (; c + LANES <= d; c += LANES) take(Constant<1>{}, c);
    return c;
}

// Add rows of y, each times its share, to `to`.
template <class T, class Y, class At>
inline void add_rows(T* to, const T* share, const Y* y, int64_t d, int64_t number, const At& at) {
    constexpr int64_t LANES = Wide<T>::LANES;
    const int64_t rest = in_vectors<T>(d, [&](auto many, int64_t c) {
        constexpr int MANY = decltype(many)::value;
        // Two sums of each column: an addition waits for the previous one to the same sum.
        Vector<T> sum[2][MANY] = {};
        const auto add = [&](Vector<T>(&into)[MANY], int64_t i) {
            const Y* row = y + at(i) * d + c;
            for (int64_t z = 0; z < MANY; ++z) into[z] += share[i] * load_numbers(row + z * LANES);
        };
        int64_t i = 0;
        for (; i + 2 <= number; i += 2) {
            add(sum[0], i);
            add(sum[1], i + 1);
        }
        if (i < number) add(sum[0], i);
        for (int64_t z = 0; z < MANY; ++z)
            store(to + c + z * LANES, load(to + c + z * LANES) + (sum[0][z] + sum[1][z]));
    });
    for (int64_t c = rest; c < d; ++c) {
        T sum = to[c];
        for (int64_t i = 0; i < number; ++i) sum += share[i] * as_number(y[at(i) * d + c]);
        to[c] = sum;
    }
}

// Add x times its share to each row of y; rows are distinct.
template <class T, class At>
inline void add_to_rows(T* y, const T* share, const T* x, int64_t d, int64_t number, const At& at) {
    constexpr int64_t LANES = Wide<T>::LANES;
    const int64_t rest = in_vectors<T>(d, [&](auto many, int64_t c) {
        constexpr int MANY = decltype(many)::value;
        Vector<T> some[MANY];
        for (int64_t z = 0; z < MANY; ++z) some[z] = load(x + c + z * LANES);
        for (int64_t i = 0; i < number; ++i) {
            T* row = y + at(i) * d + c;
            for (int64_t z = 0; z < MANY; ++z) store(row + z * LANES, load(row + z * LANES) + share[i] * some[z]);
        }
    });
    for (int64_t i = 0; i < number && rest < d; ++i)
        for (int64_t c = rest; c < d; ++c) y[at(i) * d + c] += share[i] * x[c];
}

}  // namespace thresher
