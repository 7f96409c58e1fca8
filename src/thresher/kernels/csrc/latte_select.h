// Which keys of a row are kept: products of integer codes, estimates, the best of a row, its unit, and the cut.
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

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace thresher {

constexpr int64_t KEYS = 32;    // side by side in packed codes
constexpr int64_t AT_ONCE = 4;  // queries whose estimates are in memory

template <class T>
struct Call {
    const int8_t *q_codes, *k_codes;    // [groups, n, d], [groups, m, d]
    const T *q_unit, *k_unit;           // [groups, n], [groups, m] or [groups]
    const uint8_t *shown_q, *shown_k;   // [groups, n], [groups, m], or null
    const T* theta;                     // [groups]
    int64_t groups, n, m, d, dv;
    int64_t causal, shift;              // query i sees keys j <= i + shift
    int64_t spread, always, each_key;   // unit of thresholds, leading keys that are kept, whether keys have own scales
    double step;                        // what a product of codes is multiplied by
    int64_t half() const { return (d + 1) / 2; }
    int64_t blocks() const { return (m + KEYS - 1) / KEYS; }
    int64_t end(int64_t i) const { return causal ? std::min(m, i + shift + 1) : m; }
};

// Codes of 4 bits are unsigned bytes, 8 more than their value; wider ones are 16-bit numbers.
template <bool NARROW>
using Code = std::conditional_t<NARROW, uint8_t, int16_t>;
template <bool NARROW>
using Product = std::conditional_t<NARROW, int16_t, int32_t>;
inline bool narrow(double step, int64_t d) { return step >= 256 && d < 512; }  // 64 d fits into 16 bits

// Products of AT_ONCE queries, whose pairs of codes are given, and KEYS keys.
template <bool NARROW>
inline void products(const int16_t* query, const int32_t* offset, int64_t half, const Code<NARROW>* keys,
                     Product<NARROW> (*sum)[KEYS]) {
    for (int64_t i = 0; i < AT_ONCE; ++i) {
        Product<NARROW> acc[KEYS];
        for (int64_t j = 0; j < KEYS; ++j) acc[j] = Product<NARROW>(offset[i]);
        for (int64_t c = 0; c < half; ++c) {
            const int32_t one = query[(i * half + c) * 2], two = query[(i * half + c) * 2 + 1];
            const Code<NARROW>* x = keys + c * 2 * KEYS;
            for (int64_t j = 0; j < KEYS; ++j)
                acc[j] = Product<NARROW>(acc[j] + Product<NARROW>(one * x[2 * j] + two * x[2 * j + 1]));
        }
        std::copy_n(acc, KEYS, sum[i]);
    }
}

#if defined(__AVX2__)
inline __m256i load_codes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

template <>
inline void products<true>(const int16_t* query, const int32_t* offset, int64_t half, const uint8_t* keys,
                           int16_t (*sum)[KEYS]) {
    __m256i acc[AT_ONCE][2];
    for (int64_t i = 0; i < AT_ONCE; ++i) acc[i][0] = acc[i][1] = _mm256_set1_epi16(int16_t(offset[i]));
    const auto* pairs = reinterpret_cast<const int8_t*>(query);  // here the codes of a pair are bytes, twice
    for (int64_t c = 0; c < half; ++c) {
        const __m256i one = load_codes(keys + c * 2 * KEYS), two = load_codes(keys + c * 2 * KEYS + 32);
        for (int64_t i = 0; i < AT_ONCE; ++i) {
            int32_t both;
            std::memcpy(&both, pairs + (i * half + c) * 4, sizeof both);
            const __m256i x = _mm256_set1_epi32(both);
            acc[i][0] = _mm256_add_epi16(acc[i][0], _mm256_maddubs_epi16(one, x));
            acc[i][1] = _mm256_add_epi16(acc[i][1], _mm256_maddubs_epi16(two, x));
        }
    }
    for (int64_t i = 0; i < AT_ONCE; ++i)
        for (int64_t x = 0; x < 2; ++x)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(sum[i] + 16 * x), acc[i][x]);
}

template <>
inline void products<false>(const int16_t* query, const int32_t*, int64_t half, const int16_t* keys,
                            int32_t (*sum)[KEYS]) {
    for (int64_t part = 0; part < KEYS; part += 16) {
        __m256i acc[AT_ONCE][2];
        for (auto& x : acc) x[0] = x[1] = _mm256_setzero_si256();
        for (int64_t c = 0; c < half; ++c) {
            const int16_t* from = keys + (c * KEYS + part) * 2;
            const __m256i one = load_codes(from), two = load_codes(from + 16);
            for (int64_t i = 0; i < AT_ONCE; ++i) {
                int32_t both;
                std::memcpy(&both, query + (i * half + c) * 2, sizeof both);
                const __m256i x = _mm256_set1_epi32(both);
                acc[i][0] = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(one, x));
                acc[i][1] = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(two, x));
            }
        }
        for (int64_t i = 0; i < AT_ONCE; ++i)
            for (int64_t x = 0; x < 2; ++x)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(sum[i] + part + 8 * x), acc[i][x]);
    }
}
#endif

// Write the pairs of codes of a query the way that `products` reads them; return what offsets its sums.
template <bool NARROW>
inline int32_t write_pairs(const int8_t* codes, int64_t d, int64_t half, int16_t* pairs) {
    int32_t all = 0;
    for (int64_t c = 0; c < half; ++c) {
        const int8_t one = codes[2 * c], two = 2 * c + 1 < d ? codes[2 * c + 1] : int8_t(0);
        all += one + two;
#if defined(__AVX2__)
        if (NARROW) {
            const int8_t twice[] = {one, two, one, two};
            std::memcpy(pairs + 2 * c, twice, sizeof twice);
            continue;
        }
#endif
        pairs[2 * c] = one;
        pairs[2 * c + 1] = two;
    }
    return NARROW ? -8 * all : 0;
}

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
    typedef E Vector __attribute__((vector_size(32)));
    typedef E Loose __attribute__((vector_size(32), aligned(sizeof(E)), may_alias));
    constexpr int64_t LANES = 32 / sizeof(E);
    Vector best = Vector{} + LOWEST<E>;
    for (int64_t j = 0; j < n; j += LANES) {
        const Vector y = *reinterpret_cast<const Loose*>(x + j);
        best = y > best ? y : best;
    }
    E one = best[0];
    for (int64_t j = 1; j < LANES; ++j) one = best[j] > one ? best[j] : one;
    return one;
}

// Bit j says whether x[j] is at least the cut.
template <class E>
inline uint32_t reach(const E* x, E cut) {
    uint32_t bits = 0;
    for (int64_t j = 0; j < KEYS; ++j) bits |= uint32_t(x[j] >= cut) << j;
    return bits;
}
#if defined(__AVX2__)
inline uint32_t reach(const int16_t* x, int16_t cut) {
    const __m256i low = _mm256_set1_epi16(cut), one = load_codes(x), two = load_codes(x + 16);
    const __m256i first = _mm256_cmpeq_epi16(_mm256_max_epi16(one, low), one);
    const __m256i second = _mm256_cmpeq_epi16(_mm256_max_epi16(two, low), two);
    return uint32_t(_mm256_movemask_epi8(_mm256_permute4x64_epi64(_mm256_packs_epi16(first, second), 0xD8)));
}
inline uint32_t reach(const float* x, float cut) {
    const __m256 low = _mm256_set1_ps(cut);
    uint32_t bits = 0;
    for (int j = 0; j < KEYS; j += 8)
        bits |= uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + j), low, _CMP_GE_OQ))) << j;
    return bits;
}
#endif

#if defined(__AVX2__)
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
inline int32_t* write_places(uint32_t bits, int64_t j, int32_t* to) {
#if defined(__AVX2__)
    for (int64_t from = j; bits; bits >>= 8, from += 8) {
        const __m256i places = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(PLACES.of[bits & 255])));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_add_epi32(places, _mm256_set1_epi32(int32_t(from))));
        to += __builtin_popcount(bits & 255);
    }
#else
    for (; bits; bits &= bits - 1) *to++ = int32_t(j + __builtin_ctz(bits));
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
        while (high - low > 1) {
            const int64_t middle = low + (high - low) / 2;
            (keeps(middle) ? high : low) = middle;
        }
        return from_order<E>(high);
    }
};

// Keys of a group, packed, and what follows from them.
template <class T, bool NARROW>
struct Packed {
    std::vector<Code<NARROW>> codes;
    std::vector<uint32_t> seen;     // a bit for each key
    std::vector<int32_t> hidden;
    int64_t broken_from;            // the first visible key whose scale is no number

    Packed(const Call<T>& s, int64_t g) : codes(s.blocks() * s.half() * 2 * KEYS, NARROW ? 8 : 0), seen(s.blocks(), 0) {
        broken_from = s.m;
        for (int64_t j = s.m - 1; j >= 0; --j) {
            if (s.shown_k && !s.shown_k[g * s.m + j]) {
                hidden.push_back(int32_t(j));
                continue;
            }
            seen[j / KEYS] |= 1u << (j % KEYS);
            if (!std::isfinite(s.each_key ? s.k_unit[g * s.m + j] : s.k_unit[g])) broken_from = j;
            const int8_t* from = s.k_codes + (g * s.m + j) * s.d;
            Code<NARROW>* to = &codes[(j / KEYS * s.half() * KEYS + j % KEYS) * 2];
            for (int64_t c = 0; c < s.d; ++c) to[c / 2 * 2 * KEYS + c % 2] = Code<NARROW>(from[c] + (NARROW ? 8 : 0));
        }
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
    const int64_t width = s.blocks() * KEYS, half = s.half();
    std::vector<int16_t> query(AT_ONCE * half * 2);
    std::vector<E> estimate(AT_ONCE * width);
    for (int64_t from = first; from < last; from += AT_ONCE) {
        const int64_t number = std::min(AT_ONCE, last - from), end = s.end(from + number - 1);
        int32_t offset[AT_ONCE] = {};
        for (int64_t i = 0; i < number; ++i)
            offset[i] = write_pairs<NARROW>(s.q_codes + (g * s.n + from + i) * s.d, s.d, half, &query[i * half * 2]);
        for (int64_t j = 0; j < end; j += KEYS) {
            Product<NARROW> sum[AT_ONCE][KEYS];
            products<NARROW>(query.data(), offset, half, &keys.codes[j * half * 2], sum);
            for (int64_t i = 0; i < number; ++i) {
                E* to = &estimate[i * width + j];
                if constexpr (std::is_integral_v<E>) {
                    std::copy_n(sum[i], KEYS, to);
                } else {
                    const T unit = s.q_unit[g * s.n + from + i], step = T(s.step);
                    const T* scale = s.k_unit + g * s.m + j;
                    const int64_t there = std::min(KEYS, s.m - j);
                    for (int64_t x = 0; x < there; ++x) to[x] = (T(sum[i][x]) * step) * (unit * scale[x]);
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
