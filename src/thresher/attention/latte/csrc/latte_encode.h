// Codes of queries and keys: the high bits of 8-bit codes, with the operations of the reference in the same order.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "bf16.h"
#include "exponential.h"
#include "latte_arguments.h"
#include "parallel.h"
#include "vector.h"

namespace thresher {

// As many bytes as a vector has numbers.
template <class T>
struct Narrow {
    static constexpr int LANES = Wide<T>::LANES;
    typedef int8_t Vector __attribute__((vector_size(LANES)));
    typedef int8_t Loose __attribute__((vector_size(LANES), aligned(1), may_alias));
};

// Integers as bytes, in two steps: compilers do not vectorise the conversion in one.
inline Narrow<double>::Vector to_codes(Vector<double> x) { return __builtin_convertvector(x, Narrow<double>::Vector); }
inline Narrow<float>::Vector to_codes(Vector<float> x) {
    typedef int32_t Whole __attribute__((vector_size(BYTES)));
    return __builtin_convertvector(__builtin_convertvector(x, Whole), Narrow<float>::Vector);
}

// Round to the nearest integer, ties to even, for numbers below 2^22 in size.
template <class T>
inline Vector<T> nearest(Vector<T> x) {
    constexpr T most = sizeof(T) == 4 ? T(12582912) : T(6755399441055744);  // 1.5 times 2^23 or 2^52
    return (x + most) - most;
}

// The unit of the codes of `width` numbers; NaN if one of them is.
template <class S, class T = Number<S>>
inline T unit_of(const S* x, int64_t width) {
    constexpr int64_t LANES = Wide<T>::LANES;
    Vector<T> large = Vector<T>{} + std::numeric_limits<T>::min() * 127, sum{};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        const Vector<T> some = load_numbers(x + i), size = some < 0 ? -some : some;
        large = size > large ? size : large;
        sum += size;
    }
    T most = largest<T>(large), all = total<T>(sum);
    for (; i < width; ++i) {
        most = std::max(most, std::abs(as_number(x[i])));
        all += std::abs(as_number(x[i]));
    }
    return all == all ? most / 127 : all;
}

// Codes of `bits` bits, and the unit of the 8-bit codes: for each token, or for a whole group.
template <class S, class T = Number<S>>
void encode(const EncodeArguments<S> a) {
    constexpr int64_t LANES = Wide<T>::LANES;
    using Codes = typename Narrow<T>::Vector;
    const int64_t rows = a.per_token ? a.groups * a.n : a.groups, width = a.per_token ? a.d : a.n * a.d;
    const int64_t step = int64_t(1) << (8 - a.bits);
    const T high = T((int64_t(1) << (a.bits - 1)) - 1), part = T(1) / T(step);
    parallel_for(a.groups, a.threads, [&](int64_t g) {
        for (int64_t row = g * rows / a.groups; row < (g + 1) * rows / a.groups; ++row) {
            const T scale = a.unit[row] = unit_of(a.tokens + row * width, width);
            const auto clamped = [](Vector<T> y, T least, T most) {
                y = y < least ? Vector<T>{} + least : y;
                return y > most ? Vector<T>{} + most : y;
            };
            const auto code = [&](Vector<T> y) {
                const Vector<T> share = clamped(nearest<T>(y / scale), T(-127), T(127)) * part;
                const Vector<T> near = nearest<T>(share);
                const Vector<T> whole = a.truncate ? (near > share ? near - 1 : near) : near;
                return to_codes(whole == whole ? clamped(whole, -high - 1, high) : Vector<T>{});
            };
            const S* from = a.tokens + row * width;
            int8_t* to = a.codes + row * width;
            int64_t i = 0;
            for (; i + LANES <= width; i += LANES)
                *reinterpret_cast<typename Narrow<T>::Loose*>(to + i) = code(load_numbers(from + i));
            if (i == width) continue;
            T rest[LANES] = {};
            for (int64_t c = i; c < width; ++c) rest[c - i] = as_number(from[c]);
            const Codes last = code(load(rest));
            for (int64_t c = i; c < width; ++c) to[c] = last[c - i];
        }
    });
}

}  // namespace thresher
