// Rows of numbers in their stored type: fp64, fp32, or bf16, which is the upper half of fp32.
//
// Sums are never in bf16. Processors with AVX512_BF16 multiply pairs of bf16 and add in fp32; they treat numbers below
// 2^-126 as zero. Other processors widen bf16 first.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vector.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace thresher {

struct Bf16 {
    uint16_t bits;
};

// Two neighbours of a row; one instruction multiplies them with two others and adds the products.
struct Pair {
    Bf16 first, second;
};

// The type of arithmetic and sums.
template <class S>
using Number = std::conditional_t<std::is_same_v<S, Bf16> || std::is_same_v<S, Pair>, float, S>;

template <class T>
inline T as_number(T x) { return x; }
inline float as_number(Bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

template <class T>
inline Vector<T> load_numbers(const T* p) { return load(p); }
inline Vector<float> load_numbers(const Bf16* p) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#else
    constexpr int LANES = Wide<float>::LANES;
    typedef uint16_t Half __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    typedef uint32_t Whole __attribute__((vector_size(BYTES)));
    return (Vector<float>)(__builtin_convertvector(*reinterpret_cast<const Half*>(p), Whole) << 16);
#endif
}

// The elements of products of rows: numbers, or pairs of bf16 where the processor multiplies them. The last pair of an
// odd row ends in zero. THRESHER_PAIRS uses pairs without that instruction, which is slower: for tests.
#if defined(__AVX512BF16__) || defined(THRESHER_PAIRS)
template <class S>
using Factor = std::conditional_t<std::is_same_v<S, Bf16>, Pair, S>;
#else
template <class S>
using Factor = Number<S>;
#endif
template <class S>
inline int64_t factors(int64_t numbers) {
    return std::is_same_v<Factor<S>, Pair> ? (numbers + 1) / 2 : numbers;
}
template <class S>
inline Factor<S> factor(const S* row, int64_t i, int64_t numbers) {
    if constexpr (std::is_same_v<Factor<S>, Pair>)
        return {row[2 * i], 2 * i + 1 < numbers ? row[2 * i + 1] : Bf16{0}};
    else
        return as_number(row[i]);
}

typedef uint32_t Pairs __attribute__((vector_size(BYTES)));
inline Pairs load(const Pair* p) {
    typedef uint32_t Loose __attribute__((vector_size(BYTES), aligned(2), may_alias));
    return *reinterpret_cast<const Loose*>(p);
}

template <class T>
inline Vector<T> with_product(Vector<T> sum, T x, Vector<T> row) { return sum + x * row; }
inline Vector<float> with_product(Vector<float> sum, Pair x, Pairs row) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const Pairs same = Pairs{} + bits;
#if defined(__AVX512BF16__)
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)same, (__m512bh)row);
#else
    sum += (Vector<float>)(same << 16) * (Vector<float>)(row << 16);
    return sum + (Vector<float>)(same & 0xffff0000u) * (Vector<float>)(row & 0xffff0000u);
#endif
}

}  // namespace thresher
