// Votes: the mean probability that the voting rows of a block give to each key, by estimates from integer codes.
//
// A few voters at a time, so that their products and exponentials stay in cache; memory is linear in the keys.
// Gradients need the votes for kept keys only, and make these again from what is known of the voters.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "blocks_arguments.h"
#include "blocks_choice.h"
#include "blocks_panels.h"
#include "buffer.h"
#include "codes.h"
#include "estimates.h"
#include "exponential.h"
#include "gathered.h"
#include "vector.h"

namespace thresher {

constexpr double LEAST_VOTE = 1e-30;

inline Vector<double> logarithm(Vector<double> x) {
    for (int i = 0; i < Wide<double>::LANES; ++i) x[i] = std::log(x[i]);
    return x;
}
// Of what is at least LEAST_VOTE.
inline Vector<float> logarithm(Vector<float> x) {
    typedef int32_t Whole __attribute__((vector_size(BYTES)));
    const Whole bits = (Whole)x;
    // x = 2^n y with y between the square roots of 1/2 and 2.
    const Whole n = (bits - 0x3f3504f3) >> 23;
    const Vector<float> y = (Vector<float>)(bits - (n << 23)) - 1.0f, z = y * y;
    Vector<float> of_y = Vector<float>{} + 7.0376836292e-2f;  // the minimax polynomial of Cephes
    of_y = of_y * y - 1.1514610310e-1f;
    of_y = of_y * y + 1.1676998740e-1f;
    of_y = of_y * y - 1.2420140846e-1f;
    of_y = of_y * y + 1.4249322787e-1f;
    of_y = of_y * y - 1.6668057665e-1f;
    of_y = of_y * y + 2.0000714765e-1f;
    of_y = of_y * y - 2.4999993993e-1f;
    of_y = of_y * y + 3.3333331174e-1f;
    const Vector<float> times = __builtin_convertvector(n, Vector<float>);
    return (y + (of_y * y * z + (times * -2.12194440e-4f - 0.5f * z))) + times * 0.693359375f;
}

// 2^x for x at most about 0, to a few units in the last place; what is below 2^-125 counts as that.
inline Vector<double> power_of_two(Vector<double> x) {
    for (int i = 0; i < Wide<double>::LANES; ++i) x[i] = std::exp2(x[i]);
    return x;
}
inline Vector<float> power_of_two(Vector<float> x) {
    typedef int32_t Whole __attribute__((vector_size(BYTES)));
    const Vector<float> least = Vector<float>{} - 125.0f;
    x = x < least ? least : x;
    const Vector<float> shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);
    Vector<float> y = Vector<float>{} + 1.3276471519e-03f;
    y = y * r + 9.6755413306e-03f;
    y = y * r + 5.5507132750e-02f;
    y = y * r + 2.4022119724e-01f;
    y = y * r + 6.9314696706e-01f;
    y = y * r + 1.0000000717e+00f;
    return (Vector<float>)((Whole)y + ((Whole)shifted << 23));
}

template <class T, class E>
inline Vector<T> widen(const E* x) {
    Vector<T> y;
    for (int i = 0; i < Wide<T>::LANES; ++i) y[i] = T(x[i]);
    return y;
}
#if defined(__AVX512F__)
template <>
inline Vector<float> widen<float>(const int16_t* x) {
    return (Vector<float>)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)x)));
}
template <>
inline Vector<float> widen<float>(const int32_t* x) { return (Vector<float>)_mm512_cvtepi32_ps(_mm512_loadu_si512(x)); }
#elif defined(__AVX2__)
template <>
inline Vector<float> widen<float>(const int16_t* x) {
    return (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)x)));
}
template <>
inline Vector<float> widen<float>(const int32_t* x) {
    return (Vector<float>)_mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)x));
}
#endif

template <bool NARROW, class T>
class Votes {
    using E = Product<NARROW>;
    static constexpr int64_t ROOM = 256 * 1024;     // bytes of products, which stay in cache
    static constexpr int64_t LINE = 16;             // numbers between rows, lest all fall on one set of a cache

  public:
    // Count the votes of a block for packed keys. `first` says whether the voters' largest estimates and sums are still
    // to be found; keys are then all of the group.
    void count(const Gate<T>& gate, const Sharing& sharing, int64_t g, const std::vector<int64_t>& rows,
               const Packed<T, NARROW>& keys, bool first, const Chosen<T>& known) {
        const int64_t width = int64_t(keys.seen.size()) * KEYS, stride = width + 2 * LINE;
        const int64_t number = (int64_t(rows.size()) + sharing.every - 1) / sharing.every;
        const int64_t fitting = ROOM / (stride * int64_t(sizeof(E))) / AT_ONCE * AT_ONCE;
        const int64_t most = std::clamp(fitting, AT_ONCE, (number + AT_ONCE - 1) / AT_ONCE * AT_ONCE + AT_ONCE);
        make_room(product, most * stride);
        make_room(weight, AT_ONCE * stride);
        vote.assign(width, T(0));
        for (int64_t from = 0; from < number; from += most) {
            const int64_t some = std::min(most, number - from);
            multiply(gate, sharing, g, rows, keys, from, some, stride);
            for (int64_t i = 0; i < some; i += AT_ONCE) {
                const int64_t few = std::min(AT_ONCE, some - i);
                T share[AT_ONCE] = {};
                for (int64_t z = 0; z < few; ++z) {
                    const int64_t row = g * gate.n + rows[(from + i + z) * sharing.every];
                    const T scale = gate.q_unit[row] * gate.k_unit[g], step = T(gate.step);
                    E* x = &product[(i + z) * stride];
                    if (first) {
                        for (const int32_t j : keys.hidden) x[j] = LOWEST<E>;
                        std::fill(x + gate.m, x + width, LOWEST<E>);
                        known.vote_max[row] = T(greatest(x, width));
                    }
                    const T sum = raise(x, width, step * scale, known.vote_max[row], keys.seen, &weight[z * stride]);
                    if (first) known.vote_share[row] = sum > 0 ? 1 / (sum * T(number)) : T(0);
                    share[z] = known.vote_share[row];
                }
                few == AT_ONCE ? add(share, Constant<AT_ONCE>{}, width, stride) : add(share, few, width, stride);
            }
        }
    }

    // Turn votes into their logarithms.
    void take_logarithms() {
        constexpr int64_t LANES = Wide<T>::LANES;
        const Vector<T> least = Vector<T>{} + T(LEAST_VOTE);
        for (size_t j = 0; j < vote.size(); j += LANES) {
            const Vector<T> x = load(&vote[j]);
            store(&vote[j], logarithm(x > least ? x : least));
        }
    }

    // Choose the keys of a block by the logarithms of its votes.
    void choose(const Gate<T>& gate, int64_t g, const Packed<T, NARROW>& keys, Bits* chosen, T& best, T& unit) {
        constexpr int64_t LANES = Wide<T>::LANES;
        Vector<T> most = Vector<T>{} - std::numeric_limits<T>::infinity();
        double sum = 0;
        int64_t number = 0;
        for (size_t w = 0; w < keys.seen.size(); ++w) {
            T* log = &vote[w * KEYS];
            if (keys.seen[w] != ~Bits(0))  // what is not seen counts as nothing and is never the best
                for (int64_t j = 0; j < KEYS; ++j)
                    if (!(keys.seen[w] >> j & 1)) log[j] = std::numeric_limits<T>::lowest();
            Vector<T> part{};
            for (int64_t j = 0; j < KEYS; j += LANES) {
                const Vector<T> x = load(log + j);
                most = x > most ? x : most;
                part += x == std::numeric_limits<T>::lowest() ? Vector<T>{} : x;
            }
            sum += double(total<T>(part));
            number += __builtin_popcountll(keys.seen[w]);
        }
        best = number ? largest<T>(most) : T(0);
        const T mean = T(sum / double(std::max<int64_t>(number, 1)));
        unit = gate.spread ? std::max(best - mean, std::numeric_limits<T>::epsilon()) : T(1);
        const T cut = -gate.threshold[g];
        for (size_t j = 0; j < vote.size(); ++j) vote[j] = (vote[j] - best) / unit;
        for (size_t w = 0; w < keys.seen.size(); ++w)
            chosen[w] = keys.seen[w] & (first_keys(gate.always_keep, w * KEYS) | reach(&vote[w * KEYS], cut));
    }

    // Give each listed key the slope of its gate; `vote` has their logarithms.
    void find_slopes(const Gate<T>& gate, int64_t g, T best, T unit, T width, Choice<T>& choice) const {
        if (int64_t(choice.slope.size()) < choice.number) choice.slope.resize(choice.keys.size());
        for (int64_t c = 0; c < choice.number; ++c) {
            const T margin = gate.threshold[g] - (best - vote[c]) / unit;
            choice.slope[c] = choice.keys[c] < gate.always_keep ? T(0) : slope_inside(margin, width);
        }
    }

  private:
    Buffer<int32_t> query, offset;
    Buffer<E> product;
    Buffer<T> weight, vote;

    void multiply(const Gate<T>& gate, const Sharing& sharing, int64_t g, const std::vector<int64_t>& rows,
                  const Packed<T, NARROW>& keys, int64_t from, int64_t some, int64_t stride) {
        const int64_t words = gate.words();
        const int64_t rounded = (some + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
        query.assign(rounded * words, 0);
        offset.assign(rounded, 0);
        for (int64_t i = 0; i < some; ++i) {
            const int64_t row = g * gate.n + rows[(from + i) * sharing.every];
            offset[i] = write_words<NARROW>(gate.q_codes + row * gate.d, gate.d, words, &query[i * words]);
        }
        for (size_t w = 0; w < keys.seen.size(); ++w)
            for (int64_t i = 0; i < some; i += AT_ONCE)
                products<NARROW>(&query[i * words], &offset[i], words, &keys.codes[w * KEYS * words * GROUP],
                                 &product[i * stride + w * KEYS], stride);
    }

    // Write exp((x - most) scale) of each key, 0 of those that are not seen; return their sum.
    static T raise(const E* x, int64_t width, T scale, T most, const std::vector<Bits>& seen, T* to) {
        constexpr int64_t LANES = Wide<T>::LANES;
        scale *= T(1.4426950408889634);  // powers of 2, not of e
        Vector<T> sum{};
        for (int64_t j = 0; j < width; j += KEYS) {
            const Bits here = seen[j / KEYS];
            for (int64_t z = j; z < j + KEYS; z += LANES) {
                const Vector<T> e = power_of_two((widen<T>(x + z) - most) * scale);
                store(to + z, e);
                if (here == ~Bits(0)) sum += e;
            }
            if (here == ~Bits(0)) continue;
            for (int64_t z = 0; z < KEYS; ++z)
                if (!(here >> z & 1)) to[j + z] = 0;
            for (int64_t z = j; z < j + KEYS; z += LANES) sum += load(to + z);
        }
        return total<T>(sum);
    }

    template <class Some>
    void add(const T (&share)[AT_ONCE], Some some, int64_t width, int64_t stride) {
        constexpr int64_t LANES = Wide<T>::LANES;
        for (int64_t j = 0; j < width; j += LANES) {
            Vector<T> sum = load(&vote[j]);
            for (int64_t i = 0; i < some; ++i) sum += share[i] * load(&weight[i * stride + j]);
            store(&vote[j], sum);
        }
    }
};

}  // namespace thresher
