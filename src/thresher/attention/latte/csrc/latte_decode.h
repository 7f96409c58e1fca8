// Decoding: one query at a time, whose keys were coded when their tokens came. Codes lie row by row, so that the codes
// of the next token are appended; nothing is packed, and a key is read only if it is kept.

#pragma once

#include <cmath>
#include <cstdint>

#include "buffer.h"
#include "codes.h"
#include "estimates.h"
#include "gathered.h"
#include "latte_arguments.h"
#include "latte_queries.h"
#include "parallel.h"
#include "softmax.h"
#include "tail.h"

namespace thresher {

constexpr int64_t SOME = 16;    // keys that a query is multiplied with at a time
constexpr int64_t AHEAD = 64;   // keys whose codes are prefetched: the hardware's own prefetching is too slow

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

// Products of the codes of a query, whose sum is `all`, with those of SOME keys.
inline void products_of_rows(const int8_t* query, int32_t all, const int8_t* keys, int64_t d, int32_t* to) {
#if defined(THRESHER_VNNI)
    // A product of bytes has one unsigned side: keys plus 128.
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
    const DecodeArguments<S>& a;
    Buffer<T> estimate, weight;
    Queries<S> query;
    Buffer<int32_t> key;
    Buffer<int8_t> last;  // codes of the last keys, padded to SOME
    int64_t count = 0;    // of visible keys

    explicit Decoder(const DecodeArguments<S>& arguments)
        : a(arguments), estimate((a.m + KEYS - 1) / KEYS * KEYS), weight(a.m), key(a.m + KEYS) {}

    // Estimate the scores of a row; return its rule and the best estimate.
    Row<T, T> judge(int64_t row, int64_t g, T& top) {
        const int8_t *codes = a.q_codes + row * a.d, *keys = a.k_codes + g * a.m * a.d;
        const T *k_unit = a.k_unit + g * a.m, unit = a.q_unit[row], step = T(a.step);
        const uint8_t* shown = a.shown_k ? a.shown_k + g * a.m : nullptr;
        int32_t all = 0;
        for (int64_t c = 0; c < a.d; ++c) all += codes[c];
        double sum[SOME] = {};
        T gone[SOME] = {};  // NaN once a scale is NaN
        const auto some = [&](const int8_t* from, const T* scale, T* to) {
            int32_t product[SOME];
            products_of_rows(codes, all, from, a.d, product);
            for (int64_t z = 0; z < SOME; ++z) sum[z] += double(product[z]) * double(scale[z]);
            for (int64_t z = 0; z < SOME; ++z) gone[z] += scale[z] - scale[z];
            for (int64_t z = 0; z < SOME; ++z) to[z] = (T(product[z]) * step) * (unit * scale[z]);
        };
        count = a.m;
        const int64_t whole = a.m / SOME * SOME;
        T scale[SOME] = {};
        for (int64_t j = 0; j < whole; j += SOME) {
            if (shown)
                for (int64_t z = 0; z < SOME; ++z) scale[z] = shown[j + z] ? k_unit[j + z] : T(0);
            const int8_t* soon = keys + std::min(j + AHEAD, whole - SOME) * a.d;
            for (int64_t c = 0; c < SOME * a.d; c += 64) __builtin_prefetch(soon + c);
            some(keys + j * a.d, shown ? scale : k_unit + j, &estimate[j]);
        }
        if (whole < a.m) {
            for (int64_t z = 0; z < SOME; ++z)
                scale[z] = whole + z < a.m && (!shown || shown[whole + z]) ? k_unit[whole + z] : T(0);
            last.assign(SOME * a.d, 0);
            std::copy(keys + whole * a.d, keys + a.m * a.d, last.begin());
            some(last.data(), scale, &estimate[whole]);
        }
        std::fill(estimate.begin() + a.m, estimate.end(), LOWEST<T>);
        if (shown)
            for (int64_t j = 0; j < a.m; ++j) {
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
        Row<T, T> judged{estimate.data(), unit, step, T(0), T(1), bool(a.spread), odd != 0};
        judged.best = judged.value(top);
        if (a.spread) {
            mean *= a.step * double(unit) / double(std::max<int64_t>(count, 1));
            judged.unit = std::max(judged.best - T(mean), std::numeric_limits<T>::epsilon());
        }
        return judged;
    }

    int64_t list(int64_t row, int64_t g, const Row<T, T>& judged, T top) {
        const T cut = judged.broken ? top : judged.cut(top, a.threshold[row]);
        const uint8_t* shown = a.shown_k ? a.shown_k + g * a.m : nullptr;
        int32_t* to = key.data();
        for (int64_t j = 0; j < a.m; j += KEYS) {
            const int64_t number = std::min(KEYS, a.m - j), left = a.always_keep - j;
            const Bits always = left <= 0 ? 0 : left < KEYS ? (Bits(1) << left) - 1 : ~Bits(0);
            Bits chosen = always | (judged.broken ? 0 : reach(&estimate[j], cut));
            if (!chosen) continue;
            Bits seen = number < KEYS ? (Bits(1) << number) - 1 : ~Bits(0);
            for (int64_t z = 0; shown && z < number; ++z) seen &= ~(Bits(!shown[j + z]) << z);
            to = write_indices(chosen & seen, j, to);
        }
        return to - key.data();
    }

    void attend(int64_t row) {
        const int64_t g = row / a.rows;
        T top, row_max, row_sum;
        const Row<T, T> judged = judge(row, g, top);
        const int64_t number = list(row, g, judged, top);
        a.kept[row] = int32_t(number);
        if (!number) {
            std::fill_n(a.out + row * a.dv, a.dv, T(0));
            return;
        }
        query.take(a.queries + row * a.d, a.d, T(a.scale));
        const auto at = [&](int64_t x) { return int64_t(key[x]); };
        query.scores(0, a.keys + g * a.m * a.d, a.d, number, at, weight.data());
        RowTail<T> tail;
        T sum = 0, of_dropped = 0;
        if (a.tail_factor) {
            const T scores = dot(a.key_sum + g * a.d, a.queries + row * a.d, a.d) * T(a.scale);
            tail = {a.tail_factor[row], T(count), scores, a.value_sum + g * a.dv};
            sum = sum_of(weight.data(), number);
        }
        soften(weight.data(), number, row_max, row_sum);
        if (a.tail_factor) of_dropped = weigh_tail(tail, number, sum, row_max, row_sum, weight.data());
        start_row(tail, a.dv, of_dropped, a.out + row * a.dv);
        add_rows(a.out + row * a.dv, weight.data(), a.values + g * a.m * a.dv, a.dv, number, at);
    }
};

// Attend with each query to the keys of its group whose estimate lies within the threshold of the best.
template <class S>
void decode(const DecodeArguments<S> a) {
    parallel_for(a.groups * a.rows, a.threads, [&] { return Decoder<S>(a); },
                 [](int64_t row, Decoder<S>& decoder) { decoder.attend(row); });
}

}  // namespace thresher
