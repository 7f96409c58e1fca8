// A bit for each of 64 keys that says whether it reaches a cut, and the indices of the keys that do.

#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace thresher {

constexpr int64_t KEYS = 64;
using Bits = uint64_t;  // one for each of KEYS

// Set bit j where x[j] is at least the cut.
template <class E>
inline Bits reach(const E* x, E cut) {
    Bits bits = 0;
    for (int64_t j = 0; j < KEYS; ++j) bits |= Bits(x[j] >= cut) << j;
    return bits;
}
#if defined(__AVX512BW__)
inline Bits reach(const int16_t* x, int16_t cut) {
    const __m512i low = _mm512_set1_epi16(cut);
    const Bits more = _mm512_cmpge_epi16_mask(_mm512_loadu_si512(x + 32), low);
    return more << 32 | _mm512_cmpge_epi16_mask(_mm512_loadu_si512(x), low);
}
inline Bits reach(const int32_t* x, int32_t cut) {
    const __m512i low = _mm512_set1_epi32(cut);
    Bits bits = 0;
    for (int j = 0; j < KEYS; j += 16) bits |= Bits(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(x + j), low)) << j;
    return bits;
}
inline Bits reach(const float* x, float cut) {
    const __m512 low = _mm512_set1_ps(cut);
    Bits bits = 0;
    for (int j = 0; j < KEYS; j += 16) bits |= Bits(_mm512_cmp_ps_mask(_mm512_loadu_ps(x + j), low, _CMP_GE_OQ)) << j;
    return bits;
}
#elif defined(__AVX2__)
inline Bits reach(const int16_t* x, int16_t cut) {
    const auto load = [](const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
    const __m256i low = _mm256_set1_epi16(cut);
    Bits bits = 0;
    for (int j = 0; j < KEYS; j += 32) {
        const __m256i one = load(x + j), two = load(x + j + 16);
        const __m256i first = _mm256_cmpeq_epi16(_mm256_max_epi16(one, low), one);
        const __m256i second = _mm256_cmpeq_epi16(_mm256_max_epi16(two, low), two);
        const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi16(first, second), 0xD8);
        bits |= Bits(uint32_t(_mm256_movemask_epi8(both))) << j;
    }
    return bits;
}
inline Bits reach(const int32_t* x, int32_t cut) {
    const __m256i low = _mm256_set1_epi32(cut);
    Bits below = 0;
    for (int j = 0; j < KEYS; j += 8) {
        const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + j));
        below |= Bits(uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(low, some))))) << j;
    }
    return ~below;
}
inline Bits reach(const float* x, float cut) {
    const __m256 low = _mm256_set1_ps(cut);
    Bits bits = 0;
    for (int j = 0; j < KEYS; j += 8)
        bits |= Bits(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + j), low, _CMP_GE_OQ))) << j;
    return bits;
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
struct BitIndices {
    uint64_t of[256];  // positions of the set bits of each byte, one byte each, the lowest first
    constexpr BitIndices() : of{} {
        for (int byte = 0; byte < 256; ++byte)
            for (int bit = 7; bit >= 0; --bit)
                if (byte >> bit & 1) of[byte] = of[byte] << 8 | uint64_t(bit);
    }
};
constexpr BitIndices BIT_INDICES;
#endif

// Write j plus the index of each set bit, ascending; return the end. There must be room for KEYS numbers.
inline int32_t* write_indices(Bits bits, int64_t j, int32_t* to) {
#if defined(__AVX512VBMI2__)
    if (!bits) return to;
    alignas(64) static constexpr int16_t LANES[] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    for (int64_t from = j; from < j + KEYS; bits >>= 32, from += 32) {
        const __m512i some = _mm512_maskz_compress_epi16(__mmask32(bits), _mm512_load_si512(LANES));
        const __m512i base = _mm512_set1_epi32(int32_t(from));
        const int number = __builtin_popcount(uint32_t(bits));
        _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(some)), base));
        if (number > 16) {
            const __m256i upper = _mm512_extracti64x4_epi64(some, 1);
            _mm512_storeu_si512(to + 16, _mm512_add_epi32(_mm512_cvtepi16_epi32(upper), base));
        }
        to += number;
    }
#elif defined(__AVX512F__)
    if (!bits) return to;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t from = j; from < j + KEYS; bits >>= 16, from += 16) {
        const __m512i all = _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(from)));
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(bits), all));
        to += __builtin_popcount(bits & 0xffff);
    }
#elif defined(__AVX2__)
    for (int64_t from = j; bits; bits >>= 8, from += 8) {
        const __m256i indices = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(BIT_INDICES.of[bits & 255])));
        const __m256i base = _mm256_set1_epi32(int32_t(from));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_add_epi32(indices, base));
        to += __builtin_popcount(bits & 255);
    }
#else
    for (; bits; bits &= bits - 1) *to++ = int32_t(j + __builtin_ctzll(bits));
#endif
    return to;
}

}  // namespace thresher
