// Which keys of a row are kept: estimates, the best of a row, its unit, and the cut.
//
// Products of codes are exact. Where all keys share a scale they are compared as they are, as whole numbers; else as
// estimates. Whatever is compared, the cut is the least that the rule of the reference keeps when it is computed in the
// reference's order of operations, so that both keep the same keys.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "buffer.h"
#include "latte_codes.h"
#include "vector.h"

namespace thresher {

// Whole numbers in the order of floats, and back.
inline int64_t order_of(int16_t x) { return x; }
inline int64_t order_of(int32_t x) { return x; }
inline int64_t order_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline int64_t order_of(double x) {
    int64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits ^ ((bits >> 63) & 0x7fffffffffffffff);
}
template <class E>
inline E from_order(int64_t order) {
    if constexpr (std::is_same_v<E, float>) {
        const int32_t bits = int32_t(order) ^ ((int32_t(order) >> 31) & 0x7fffffff);
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    } else if constexpr (std::is_same_v<E, double>) {
        const int64_t bits = order ^ ((order >> 63) & 0x7fffffffffffffff);
        double x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    } else {
        return E(order);
    }
}

template <class E>
constexpr E LOWEST = std::is_integral_v<E> ? std::numeric_limits<E>::min() : -std::numeric_limits<E>::infinity();

template <class E>
inline E greatest(const E* x, int64_t n) {  // n is a multiple of KEYS
    typedef E Vector __attribute__((vector_size(BYTES)));
    typedef E Loose __attribute__((vector_size(BYTES), aligned(sizeof(E)), may_alias));
    constexpr int64_t LANES = BYTES / sizeof(E);
    static_assert(KEYS % (2 * LANES) == 0);
    const auto larger = [](Vector a, Vector b) { return a > b ? a : b; };
    Vector best[2] = {Vector{} + LOWEST<E>, Vector{} + LOWEST<E>};
    for (int64_t j = 0; j < n; j += 2 * LANES)
        for (int64_t z = 0; z < 2; ++z) best[z] = larger(*reinterpret_cast<const Loose*>(x + j + z * LANES), best[z]);
    best[0] = larger(best[0], best[1]);
    E one = best[0][0];
    for (int64_t j = 1; j < LANES; ++j) one = best[0][j] > one ? best[0][j] : one;
    return one;
}

// Bit j says whether x[j] is at least the cut.
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
inline Bits reach(const float* x, float cut) {
    const __m256 low = _mm256_set1_ps(cut);
    Bits bits = 0;
    for (int j = 0; j < KEYS; j += 8)
        bits |= Bits(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + j), low, _CMP_GE_OQ))) << j;
    return bits;
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
struct Places {
    uint64_t of[256];  // of the set bits of a byte, a byte each, the lowest first
    constexpr Places() : of{} {
        for (int byte = 0; byte < 256; ++byte)
            for (int bit = 7; bit >= 0; --bit)
                if (byte >> bit & 1) of[byte] = of[byte] << 8 | uint64_t(bit);
    }
};
constexpr Places PLACES;
#endif

// Write j plus the place of each set bit, ascending; return the end. There must be room for KEYS numbers.
inline int32_t* write_places(Bits bits, int64_t j, int32_t* to) {
#if defined(__AVX512VBMI2__)
    if (!bits) return to;
    alignas(64) static constexpr int16_t LANES[] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    for (int64_t from = j; from < j + KEYS; bits >>= 32, from += 32) {
        const __m512i some = _mm512_maskz_compress_epi16(__mmask32(bits), _mm512_load_si512(LANES));
        const __m512i base = _mm512_set1_epi32(int32_t(from));
        const int number = __builtin_popcount(uint32_t(bits));
        _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(some)), base));
        if (number > 16)
            _mm512_storeu_si512(to + 16, _mm512_add_epi32(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(some, 1)), base));
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
        const __m256i places = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(PLACES.of[bits & 255])));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_add_epi32(places, _mm256_set1_epi32(int32_t(from))));
        to += __builtin_popcount(bits & 255);
    }
#else
    for (; bits; bits &= bits - 1) *to++ = int32_t(j + __builtin_ctzll(bits));
#endif
    return to;
}

// How a row is judged.
template <class T, class E>
struct Row {
    const E* estimate;
    T scale;   // what an estimate that is a whole number stands for
    T step;
    T best, unit;
    bool spread, broken;  // broken: an estimate is no number, and nothing is kept by its estimate

    // Not inlined: the difference must be that of two rounded numbers.
    __attribute__((noinline)) T value(E e) const {
        if constexpr (std::is_integral_v<E>) return (T(e) * step) * scale;
        return T(e);
    }
    T difference(E e) const {
        const T below = best - value(e);
        return spread ? below / unit : below;
    }
    // What a difference of 1 between estimates is worth.
    T step_of_difference() const { return (std::is_integral_v<E> ? step * scale : T(1)) / (spread ? unit : T(1)); }
    // The least estimate whose difference is at most `limit`; that of the best, 0, is.
    E cut(E top, T limit) const {
        const auto keeps = [&](int64_t order) { return difference(from_order<E>(order)) <= limit; };
        const int64_t least = order_of(LOWEST<E>), most = order_of(top);
        T guess = best - limit * unit;
        if constexpr (std::is_integral_v<E>) guess /= step * scale;
        guess = std::isnan(guess) ? T(0) : guess;
        guess = std::max<T>(guess, T(std::is_integral_v<E> ? T(LOWEST<E>) : std::numeric_limits<T>::lowest()));
        const int64_t near = guess < T(top) ? order_of(E(guess)) : most;
        int64_t low = std::max(near - 4, least), high = std::min(near + 4, most);
        if (keeps(low)) {
            if (keeps(least)) return LOWEST<E>;
            high = low;
            low = least;
        } else if (!keeps(high)) {
            low = high;
            high = most;
        }
        while (low + 1 < high) {
            const int64_t middle = (low & high) + ((low ^ high) >> 1);  // their difference may not fit
            (keeps(middle) ? high : low) = middle;
        }
        return from_order<E>(high);
    }
};

// The sum of codes times scales over the keys that a query sees, for each dimension, and their number.
template <class T>
struct Sums {
    const Call<T>& s;
    int64_t g, end = 0, count = 0;
    std::vector<double> sum;

    Sums(const Call<T>& call, int64_t group) : s(call), g(group), sum(call.d, 0.0) {}
    void advance(int64_t to) {
        for (; end < to; ++end) {
            if (s.shown_k && !s.shown_k[g * s.m + end]) continue;
            const int8_t* codes = s.k_codes + (g * s.m + end) * s.d;
            const double unit = s.each_key ? double(s.k_unit[g * s.m + end]) : double(s.k_unit[g]);
            for (int64_t c = 0; c < s.d; ++c) sum[c] += unit * codes[c];
            ++count;
        }
    }
    double mean(int64_t i) const {
        const int8_t* codes = s.q_codes + (g * s.n + i) * s.d;
        double all = 0;
        for (int64_t c = 0; c < s.d; ++c) all += sum[c] * codes[c];
        return all * s.step * double(s.q_unit[g * s.n + i]) / double(std::max<int64_t>(count, 1));
    }
};

// Call judge(i, row, top, stop) for each query i in [first, last): how its estimates are judged, the best of them as it
// is compared, and the end of the keys that it may see.
template <bool NARROW, class E, class T, class Judge>
void judge_rows(const Call<T>& s, int64_t g, const Packed<T, NARROW>& keys, Sums<T> sums, int64_t first, int64_t last,
                Judge&& judge) {
    const int64_t width = s.blocks() * KEYS, words = s.words();
    Buffer<int32_t> query(AT_ONCE * words);
    Buffer<E> estimate(AT_ONCE * width);
    for (int64_t from = first; from < last; from += AT_ONCE) {
        const int64_t number = std::min(AT_ONCE, last - from), end = s.end(from + number - 1);
        int32_t offset[AT_ONCE] = {};
        for (int64_t i = 0; i < number; ++i)
            offset[i] = write_words<NARROW>(s.q_codes + (g * s.n + from + i) * s.d, s.d, words, &query[i * words]);
        for (int64_t j = 0; j < end; j += KEYS) {
            const Code<NARROW>* codes = &keys.codes[j * words * GROUP];
            if constexpr (std::is_integral_v<E>) {
                products<NARROW>(query.data(), offset, words, codes, &estimate[j], width);
            } else {
                Product<NARROW> sum[AT_ONCE * KEYS];
                products<NARROW>(query.data(), offset, words, codes, sum, KEYS);
                const int64_t there = std::min(KEYS, s.m - j);
                for (int64_t i = 0; i < number; ++i) {
                    const T unit = s.q_unit[g * s.n + from + i], step = T(s.step);
                    const T* scale = s.k_unit + g * s.m + j;
                    for (int64_t x = 0; x < there; ++x)
                        estimate[i * width + j + x] = E((T(sum[i * KEYS + x]) * step) * (unit * scale[x]));
                }
            }
        }
        for (int64_t i = 0; i < number; ++i) {
            const int64_t query_i = from + i, stop = s.end(query_i), padded = (stop + KEYS - 1) / KEYS * KEYS;
            E* e = &estimate[i * width];
            for (const int32_t j : keys.hidden) e[j] = LOWEST<E>;
            std::fill(e + stop, e + padded, LOWEST<E>);
            const E top = greatest(e, padded);
            Row<T, E> row{e, s.q_unit[g * s.n + query_i] * (s.each_key ? T(1) : s.k_unit[g]), T(s.step), T(0), T(1),
                          bool(s.spread), false};
            row.broken = stop > keys.broken_from || !std::isfinite(s.q_unit[g * s.n + query_i]);
            row.best = row.value(top);
            if (s.spread) {
                sums.advance(stop);
                row.unit = std::max(row.best - T(sums.mean(query_i)), std::numeric_limits<T>::epsilon());
            }
            judge(query_i, row, top, stop);
        }
    }
}

}  // namespace thresher
