// Select the keys of a row: estimates, the best of the row, its unit, and the cut.
//
// Products of codes are exact integers. Where all keys share a scale the products are compared, otherwise the
// estimates. The cut is the least of these that the rule of the reference keeps, computed with its operations in their
// order, so that both keep the same keys.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "bitmask.h"
#include "buffer.h"
#include "codes.h"
#include "vector.h"

namespace thresher {

// Integers that sort like floats, and back.
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

// The rule of a row.
template <class T, class E>
struct Row {
    const E* estimate;
    T scale;   // the unit of estimates that are integers
    T step;
    T best, unit;
    bool spread, broken;  // broken: an estimate is NaN, and the rule keeps nothing

    // Not inlined, so that both numbers are rounded before their difference.
    __attribute__((noinline)) T value(E e) const {
        if constexpr (std::is_integral_v<E>) return (T(e) * step) * scale;
        return T(e);
    }
    T difference(E e) const {
        const T below = best - value(e);
        return spread ? below / unit : below;
    }
    // The size of a difference of 1 between estimates.
    T step_of_difference() const { return (std::is_integral_v<E> ? step * scale : T(1)) / (spread ? unit : T(1)); }
    // Find the least estimate whose difference is at most `limit`; the best, with difference 0, always is.
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
            const int64_t middle = (low & high) + ((low ^ high) >> 1);  // their sum may overflow
            (keeps(middle) ? high : low) = middle;
        }
        return from_order<E>(high);
    }
};

// The sum over the keys that a query sees of codes times scales, for each dimension, and the number of these keys.
template <class T>
struct Sums {
    const Gate<T>& gate;
    int64_t g, end = 0, count = 0;
    std::vector<double> sum;

    Sums(const Gate<T>& gate, int64_t group) : gate(gate), g(group), sum(gate.d, 0.0) {}
    void advance(int64_t to) {
        for (; end < to; ++end) {
            if (gate.shown_k && !gate.shown_k[g * gate.m + end]) continue;
            const int8_t* codes = gate.k_codes + (g * gate.m + end) * gate.d;
            const double unit = gate.unit_per_key ? double(gate.k_unit[g * gate.m + end]) : double(gate.k_unit[g]);
            for (int64_t c = 0; c < gate.d; ++c) sum[c] += unit * codes[c];
            ++count;
        }
    }
    double mean(int64_t i) const {
        const int8_t* codes = gate.q_codes + (g * gate.n + i) * gate.d;
        double all = 0;
        for (int64_t c = 0; c < gate.d; ++c) all += sum[c] * codes[c];
        return all * gate.step * double(gate.q_unit[g * gate.n + i]) / double(std::max<int64_t>(count, 1));
    }
};

// Call judge(i, row, top, stop) for each query i in [first, last): the rule of its row, the best of what is compared,
// and the end of the keys that it may see.
template <bool NARROW, class E, class T, class Judge>
void judge_rows(const Gate<T>& gate, int64_t g, const Packed<T, NARROW>& keys, Sums<T> sums, int64_t first,
                int64_t last, Judge&& judge) {
    const int64_t width = gate.blocks() * KEYS, words = gate.words();
    Buffer<int32_t> query(AT_ONCE * words);
    Buffer<E> estimate(AT_ONCE * width);
    for (int64_t from = first; from < last; from += AT_ONCE) {
        const int64_t number = std::min(AT_ONCE, last - from), end = gate.end(from + number - 1);
        int32_t offset[AT_ONCE] = {};
        for (int64_t i = 0; i < number; ++i) {
            const int8_t* codes = gate.q_codes + (g * gate.n + from + i) * gate.d;
            offset[i] = write_words<NARROW>(codes, gate.d, words, &query[i * words]);
        }
        for (int64_t j = 0; j < end; j += KEYS) {
            const Code<NARROW>* codes = &keys.codes[j * words * GROUP];
            if constexpr (std::is_integral_v<E>) {
                products<NARROW>(query.data(), offset, words, codes, &estimate[j], width);
            } else {
                Product<NARROW> sum[AT_ONCE * KEYS];
                products<NARROW>(query.data(), offset, words, codes, sum, KEYS);
                const int64_t there = std::min(KEYS, gate.m - j);
                for (int64_t i = 0; i < number; ++i) {
                    const T unit = gate.q_unit[g * gate.n + from + i], step = T(gate.step);
                    const T* scale = gate.k_unit + g * gate.m + j;
                    for (int64_t x = 0; x < there; ++x)
                        estimate[i * width + j + x] = E((T(sum[i * KEYS + x]) * step) * (unit * scale[x]));
                }
            }
        }
        for (int64_t i = 0; i < number; ++i) {
            const int64_t query_i = from + i, stop = gate.end(query_i), padded = (stop + KEYS - 1) / KEYS * KEYS;
            E* e = &estimate[i * width];
            for (const int32_t j : keys.hidden) e[j] = LOWEST<E>;
            std::fill(e + stop, e + padded, LOWEST<E>);
            const E top = greatest(e, padded);
            const T shared = gate.unit_per_key ? T(1) : gate.k_unit[g];
            Row<T, E> row{e,    gate.q_unit[g * gate.n + query_i] * shared, T(gate.step),
                          T(0), T(1), bool(gate.spread), false};
            row.broken = stop > keys.broken_from || !std::isfinite(gate.q_unit[g * gate.n + query_i]);
            row.best = row.value(top);
            if (gate.spread) {
                sums.advance(stop);
                row.unit = std::max(row.best - T(sums.mean(query_i)), std::numeric_limits<T>::epsilon());
            }
            judge(query_i, row, top, stop);
        }
    }
}

// Call run with the type of products and the type of estimates.
template <class T, class Run>
void with_types(const Gate<T>& gate, Run&& run) {
    const bool small = narrow(gate.step, gate.d);
    if (gate.unit_per_key)
        small ? run(std::true_type{}, T{}) : run(std::false_type{}, T{});
    else
        small ? run(std::true_type{}, int16_t{}) : run(std::false_type{}, int32_t{});
}

}  // namespace thresher
