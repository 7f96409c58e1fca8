// Rows of numbers as they are stored: fp32 and fp64, and bf16, whose numbers are the upper halves of fp32 ones.
//
// Sums are never in bf16. Processors with AVX512_BF16 multiply pairs of it and add in fp32; others widen it first.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "matrix.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace thresher {

struct Bf16 {
    uint16_t bits;
};

// What numbers are calculated in.
template <class S>
using Number = std::conditional_t<std::is_same_v<S, Bf16>, float, S>;

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

}  // namespace thresher
