// One query at a time, whose keys were coded when their tokens were read: decoding. Codes lie row by row, so that what
// follows a token is written behind them; nothing is packed, and a key's numbers are read only if it is kept.

#pragma once

#include <cmath>
#include <cstdint>

#include "buffer.h"
#include "gathered.h"
#include "latte_codes.h"
#include "latte_queries.h"
#include "latte_select.h"
#include "parallel.h"
#include "softmax.h"

namespace thresher {

template <class T>
struct Decoded {
    const int8_t *q_codes, *k_codes;  // [groups, rows, d], [groups, m, d]
    const T *q_unit, *k_unit;         // [groups, rows], [groups, m]
    const uint8_t* shown_k;           // [groups, m], or null
    const T* theta;                   // [groups, rows]
    int64_t groups, rows, m, d, dv;   // rows: queries that share keys
    int64_t spread, always;
    double step;
};

constexpr int64_t SOME = 16;    // keys whose products with a query are made at a time
constexpr int64_t AHEAD = 64;   // keys whose codes memory is asked for before their turn: it is slow to come by itself

#if defined(THRESHER_VNNI)
// The totals of 16 vectors, in their order.
inline __m512i totals(const __m512i (&x)[SOME]) {
    __m512i two[8], four[4], halves[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        two[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]),
                                  _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(two[2 * i], two[2 * i + 1]),
                                   _mm512_unpackhi_epi64(two[2 * i], two[2 * i + 1]));
    const auto by_quarters = [](__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
    };
    for (int i = 0; i < 2; ++i) halves[i] = by_quarters(four[2 * i], four[2 * i + 1]);
    return by_quarters(halves[0], halves[1]);
}
#endif

// Products of a query's codes, which sum up to `all`, with those of SOME keys.
inline void products_of_rows(const int8_t* query, int32_t all, const int8_t* keys, int64_t d, int32_t* to) {
#if defined(THRESHER_VNNI)
    // A product of bytes takes one side unsigned: keys, by 128 more than they are.
    const __m512i more = _mm512_set1_epi8(int8_t(-128));
    __m512i sum[SOME];
#pragma GCC unroll 16
    for (int64_t z = 0; z < SOME; ++z) sum[z] = _mm512_setzero_si512();
    for (int64_t c = 0; c < d; c += 64) {
        const __mmask64 there = d - c < 64 ? (__mmask64(1) << (d - c)) - 1 : ~__mmask64(0);
        const __m512i x = _mm512_maskz_loadu_epi8(there, query + c);
#pragma GCC unroll 16
        for (int64_t z = 0; z < SOME; ++z)
            sum[z] = add_products(sum[z], _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, keys + z * d + c), more), x);
    }
    _mm512_storeu_si512(to, _mm512_add_epi32(totals(sum), _mm512_set1_epi32(-128 * all)));
#else
    (void)all;
    for (int64_t z = 0; z < SOME; ++z) {
        int32_t sum = 0;
        for (int64_t c = 0; c < d; ++c) sum += int32_t(query[c]) * int32_t(keys[z * d + c]);
        to[z] = sum;
    }
#endif
}

template <class S, class T = Number<S>>
struct Decoder {
    const Decoded<T>& s;
    Buffer<T> estimate, weight;
    Queries<S> query;
    Buffer<int32_t> key;
    Buffer<int8_t> last;  // codes of the last keys, filled up to SOME

    explicit Decoder(const Decoded<T>& call)
        : s(call), estimate((s.m + KEYS - 1) / KEYS * KEYS), weight(s.m), key(s.m + KEYS) {}

    // Estimate a row's scores; return how they are judged, and the best of them.
    Row<T, T> judge(int64_t row, int64_t g, T& top) {
        const int8_t *codes = s.q_codes + row * s.d, *keys = s.k_codes + g * s.m * s.d;
        const T *k_unit = s.k_unit + g * s.m, unit = s.q_unit[row], step = T(s.step);
        const uint8_t* shown = s.shown_k ? s.shown_k + g * s.m : nullptr;
        int32_t all = 0;
        for (int64_t c = 0; c < s.d; ++c) all += codes[c];
        double sum[SOME] = {};
        T gone[SOME] = {};  // no number once a scale is none
        const auto some = [&](const int8_t* from, const T* scale, T* to) {
            int32_t product[SOME];
            products_of_rows(codes, all, from, s.d, product);
            for (int64_t z = 0; z < SOME; ++z) sum[z] += double(product[z]) * double(scale[z]);
            for (int64_t z = 0; z < SOME; ++z) gone[z] += scale[z] - scale[z];
            for (int64_t z = 0; z < SOME; ++z) to[z] = (T(product[z]) * step) * (unit * scale[z]);
        };
        int64_t count = s.m;
        const int64_t whole = s.m / SOME * SOME;
        T scale[SOME] = {};
        for (int64_t j = 0; j < whole; j += SOME) {
            if (shown)
                for (int64_t z = 0; z < SOME; ++z) scale[z] = shown[j + z] ? k_unit[j + z] : T(0);
            const int8_t* soon = keys + std::min(j + AHEAD, whole - SOME) * s.d;
            for (int64_t c = 0; c < SOME * s.d; c += 64) __builtin_prefetch(soon + c);
            some(keys + j * s.d, shown ? scale : k_unit + j, &estimate[j]);
        }
        if (whole < s.m) {
            for (int64_t z = 0; z < SOME; ++z)
                scale[z] = whole + z < s.m && (!shown || shown[whole + z]) ? k_unit[whole + z] : T(0);
            last.assign(SOME * s.d, 0);
            std::copy(keys + whole * s.d, keys + s.m * s.d, last.begin());
            some(last.data(), scale, &estimate[whole]);
        }
        std::fill(estimate.begin() + s.m, estimate.end(), LOWEST<T>);
        if (shown)
            for (int64_t j = 0; j < s.m; ++j) {
                count -= !shown[j];
                estimate[j] = shown[j] ? estimate[j] : LOWEST<T>;
            }
        top = greatest(estimate.data(), int64_t(estimate.size()));
        double mean = 0;
        T odd = unit - unit;
        for (int64_t z = 0; z < SOME; ++z) {
            mean += sum[z];
            odd += gone[z];
        }
        Row<T, T> judged{estimate.data(), unit, step, T(0), T(1), bool(s.spread), odd != 0};
        judged.best = judged.value(top);
        if (s.spread) {
            mean *= s.step * double(unit) / double(std::max<int64_t>(count, 1));
            judged.unit = std::max(judged.best - T(mean), std::numeric_limits<T>::epsilon());
        }
        return judged;
    }

    int64_t list(int64_t row, int64_t g, const Row<T, T>& judged, T top) {
        const T cut = judged.broken ? top : judged.cut(top, s.theta[row]);
        const uint8_t* shown = s.shown_k ? s.shown_k + g * s.m : nullptr;
        int32_t* to = key.data();
        for (int64_t j = 0; j < s.m; j += KEYS) {
            const int64_t number = std::min(KEYS, s.m - j), left = s.always - j;
            const Bits always = left <= 0 ? 0 : left < KEYS ? (Bits(1) << left) - 1 : ~Bits(0);
            Bits chosen = always | (judged.broken ? 0 : reach(&estimate[j], cut));
            if (!chosen) continue;
            Bits seen = number < KEYS ? (Bits(1) << number) - 1 : ~Bits(0);
            for (int64_t z = 0; shown && z < number; ++z) seen &= ~(Bits(!shown[j + z]) << z);
            to = write_places(chosen & seen, j, to);
        }
        return to - key.data();
    }

    int64_t attend(int64_t row, const S* q, const S* k, const S* v, T scale, T* out) {
        const int64_t g = row / s.rows;
        T top, best, mass;
        const Row<T, T> judged = judge(row, g, top);
        const int64_t number = list(row, g, judged, top);
        std::fill_n(out + row * s.dv, s.dv, T(0));
        if (!number) return 0;
        query.take(q + row * s.d, s.d, scale);
        const auto at = [&](int64_t x) { return int64_t(key[x]); };
        query.scores(0, k + g * s.m * s.d, s.d, number, at, weight.data());
        soften(weight.data(), number, best, mass);
        add_rows(out + row * s.dv, weight.data(), v + g * s.m * s.dv, s.dv, number, at);
        return number;
    }
};

// Attend with each query to the keys of its group whose estimate lies within theta of the best.
template <class S, class T = Number<S>>
void decode(const Decoded<T>& s, const S* q, const S* k, const S* v, T scale, T* out, int32_t* kept, int64_t threads) {
    parallel_for(s.groups * s.rows, threads, [&] { return Decoder<S>(s); }, [&](int64_t row, Decoder<S>& decoder) {
        kept[row] = int32_t(decoder.attend(row, q, k, v, scale, out));
    });
}

}  // namespace thresher
