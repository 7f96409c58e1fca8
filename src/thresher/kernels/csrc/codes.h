// Integer codes of queries and keys, packed for the widest byte products of the processor.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "bitmask.h"
#include "buffer.h"
#include "gate.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace thresher {

// KEYS lie side by side in packed codes.
constexpr int64_t AT_ONCE = 4;  // queries whose estimates are in memory at a time

inline bool narrow(double step, int64_t d) { return step >= 256 && d < 512; }  // 64 d fits into 16 bits
template <bool NARROW>
using Product = std::conditional_t<NARROW, int16_t, int32_t>;

// Codes of keys: unsigned bytes, which store the value plus BIAS, or 16-bit numbers.
#if defined(THRESHER_VNNI)
template <bool NARROW>
using Code = uint8_t;
template <bool NARROW>
constexpr int BIAS = NARROW ? 8 : 128;
#else
template <bool NARROW>
using Code = std::conditional_t<NARROW, uint8_t, int16_t>;
template <bool NARROW>
constexpr int BIAS = NARROW ? 8 : 0;
#endif

// The lane of a key among KEYS: packing two vectors of 32-bit sums into one takes four from each in turn.
template <bool NARROW>
inline int64_t lane_of(int64_t j) {
#if defined(THRESHER_VNNI)
    if (NARROW) return j / 32 * 32 + j / 4 % 2 * 16 + j % 32 / 8 * 4 + j % 4;
#endif
    return j;
}

#if defined(THRESHER_VNNI)
// Add the products of unsigned and signed bytes, four by four. The intrinsic does the same, but GCC 12 copies the sums
// before and after it.
inline __m512i add_products(__m512i sum, __m512i bytes, __m512i signs) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(signs));
    return sum;
}
#endif

// Products of AT_ONCE queries, given as words, with KEYS keys; those of the next query lie
// `stride` further on.
template <bool NARROW>
inline void products(const int32_t* query, const int32_t* offset, int64_t words, const Code<NARROW>* keys,
                     Product<NARROW>* to, int64_t stride) {
#if defined(THRESHER_VNNI)
    constexpr int64_t VECTORS = KEYS / 16;
    __m512i sum[AT_ONCE][VECTORS];
#pragma GCC unroll 4
    for (int64_t i = 0; i < AT_ONCE; ++i)
#pragma GCC unroll 4
        for (int64_t z = 0; z < VECTORS; ++z) sum[i][z] = _mm512_set1_epi32(offset[i]);
    for (int64_t c = 0; c < words; ++c) {
        __m512i some[VECTORS];
#pragma GCC unroll 4
        for (int64_t z = 0; z < VECTORS; ++z) some[z] = _mm512_loadu_si512(keys + (c * VECTORS + z) * 64);
#pragma GCC unroll 4
        for (int64_t i = 0; i < AT_ONCE; ++i) {
            const __m512i x = _mm512_set1_epi32(query[i * words + c]);
#pragma GCC unroll 4
            for (int64_t z = 0; z < VECTORS; ++z) sum[i][z] = add_products(sum[i][z], some[z], x);
        }
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < AT_ONCE; ++i) {
#pragma GCC unroll 4
        for (int64_t z = 0; z < VECTORS; z += NARROW ? 2 : 1) {
            const __m512i all = NARROW ? _mm512_packs_epi32(sum[i][z], sum[i][z + NARROW]) : sum[i][z];
            _mm512_storeu_si512(to + i * stride + z * 16, all);
        }
    }
#elif defined(__AVX2__)
    const auto load = [](const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); };
    constexpr int64_t STEP = NARROW ? 32 : 16;  // keys in two vectors of sums
    for (int64_t part = 0; part < KEYS; part += STEP) {
        __m256i sum[AT_ONCE][2];
        for (int64_t i = 0; i < AT_ONCE; ++i)
            sum[i][0] = sum[i][1] = NARROW ? _mm256_set1_epi16(int16_t(offset[i])) : _mm256_setzero_si256();
        for (int64_t c = 0; c < words; ++c) {
            const Code<NARROW>* from = keys + (c * KEYS + part) * 2;
            const __m256i one = load(from), two = load(from + STEP);
            for (int64_t i = 0; i < AT_ONCE; ++i) {
                const __m256i x = _mm256_set1_epi32(query[i * words + c]);
                if constexpr (NARROW) {
                    sum[i][0] = _mm256_add_epi16(sum[i][0], _mm256_maddubs_epi16(one, x));
                    sum[i][1] = _mm256_add_epi16(sum[i][1], _mm256_maddubs_epi16(two, x));
                } else {
                    sum[i][0] = _mm256_add_epi32(sum[i][0], _mm256_madd_epi16(one, x));
                    sum[i][1] = _mm256_add_epi32(sum[i][1], _mm256_madd_epi16(two, x));
                }
            }
        }
        for (int64_t i = 0; i < AT_ONCE; ++i)
            for (int64_t x = 0; x < 2; ++x)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * stride + part + STEP / 2 * x), sum[i][x]);
    }
#else
    for (int64_t i = 0; i < AT_ONCE; ++i) {
        Product<NARROW> sum[KEYS];
        for (int64_t j = 0; j < KEYS; ++j) sum[j] = Product<NARROW>(offset[i]);
        for (int64_t c = 0; c < words; ++c) {
            int16_t both[2];
            std::memcpy(both, query + i * words + c, sizeof both);
            const int32_t one = both[0], two = both[1];
            const Code<NARROW>* x = keys + c * 2 * KEYS;
            for (int64_t j = 0; j < KEYS; ++j)
                sum[j] = Product<NARROW>(sum[j] + Product<NARROW>(one * x[2 * j] + two * x[2 * j + 1]));
        }
        std::copy_n(sum, KEYS, to + i * stride);
    }
#endif
}

// Write the codes of a query as words for `products`; return the offset of its sums.
template <bool NARROW>
inline int32_t write_words(const int8_t* codes, int64_t d, int64_t words, int32_t* to) {
    int32_t all = 0;
    for (int64_t c = 0; c < words; ++c) {
        int8_t some[GROUP] = {};
        for (int64_t x = 0; x < GROUP && c * GROUP + x < d; ++x) some[x] = codes[c * GROUP + x];
        for (const int8_t x : some) all += x;
#if defined(THRESHER_VNNI)
        std::memcpy(to + c, some, sizeof some);
#else
        const int8_t twice[] = {some[0], some[1], some[0], some[1]};
        const int16_t wide[] = {some[0], some[1]};
#if defined(__AVX2__)
        if (NARROW) {
            std::memcpy(to + c, twice, sizeof twice);
            continue;
        }
#endif
        std::memcpy(to + c, wide, sizeof wide);
#endif
    }
    return -BIAS<NARROW> * all;
}

// The packed keys of a group, with their visibility and scales.
template <class T, bool NARROW>
struct Packed {
    Buffer<Code<NARROW>> codes;
    std::vector<Bits> seen;         // a bit for each key
    std::vector<int32_t> hidden;
    int64_t broken_from;            // the first visible key whose scale is NaN

    Packed(const Gate<T>& gate, int64_t g)
        : codes(gate.blocks() * gate.words() * GROUP * KEYS, BIAS<NARROW>), seen(gate.blocks(), 0) {
        broken_from = gate.m;
        for (int64_t j = gate.m - 1; j >= 0; --j) {
            if (gate.shown_k && !gate.shown_k[g * gate.m + j]) {
                hidden.push_back(int32_t(j));
                continue;
            }
            if (!std::isfinite(gate.unit_per_key ? gate.k_unit[g * gate.m + j] : gate.k_unit[g])) broken_from = j;
            put(gate, g, j, j);
        }
    }

    // The listed keys alone, in the order of the list.
    Packed(const Gate<T>& gate, int64_t g, const int32_t* keys, int64_t number)
        : codes((number + KEYS - 1) / KEYS * gate.words() * GROUP * KEYS, BIAS<NARROW>),
          seen((number + KEYS - 1) / KEYS, 0), broken_from(number) {
        for (int64_t j = 0; j < number; ++j) put(gate, g, keys[j], j);
    }

  private:
    void put(const Gate<T>& gate, int64_t g, int64_t key, int64_t j) {
        seen[j / KEYS] |= Bits(1) << (j % KEYS);
        const int8_t* from = gate.k_codes + (g * gate.m + key) * gate.d;
        Code<NARROW>* to = &codes[(j / KEYS * gate.words() * KEYS + lane_of<NARROW>(j % KEYS)) * GROUP];
        for (int64_t c = 0; c < gate.d; ++c)
            to[c / GROUP * GROUP * KEYS + c % GROUP] = Code<NARROW>(from[c] + BIAS<NARROW>);
    }
};

}  // namespace thresher
