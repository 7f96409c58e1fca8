// The share of each listed pair in the gradients.

#pragma once

#include <algorithm>
#include <cstdint>

#include "exponential.h"
#include "softmax.h"
#include "tail.h"
#include "vector.h"

namespace thresher {

// Turn the scores of a row into softmax weights; a row that keeps nothing has none.
template <class T>
void weigh_scores(T* score, int64_t number, T row_max, T row_sum) {
    const Vector<T> excess = Vector<T>{} + T(MAX_EXCESS);
    const T one = row_sum == 0 ? T(0) : 1 / row_sum, largest = row_sum == 0 ? T(0) : row_max;
    transform(score, number, T(0), [&](Vector<T> x) {
        const Vector<T> over = x - largest;
        return exponential(over > excess ? excess : over) * one;
    });
}

// From the scores of the pairs of a row and the products of its gradient with values, compute what each pair adds to
// the gradients of its value and its score; slopes become what it adds to the gradient of the threshold.
template <class T>
void shares_of(const int32_t* key, int64_t number, T row_max, T row_sum, T constant, T worth, T* score, T* through,
               T* slope) {
    weigh_scores(score, number, row_max, row_sum);
    if (slope)
        for (int64_t x = 0; x < number; ++x) slope[x] *= score[x] * (through[x] - constant);
    for (int64_t x = 0; x < number; ++x) {
        const T benefit = key[x] < 0 ? T(0) : score[x] * (through[x] - constant);
        through[x] = benefit + (slope ? worth * slope[x] : T(0));
        score[x] = key[x] < 0 ? T(0) : score[x];
    }
}

// Sum the entries of the kept keys of a row.
template <class T>
T sum_of_kept(const int32_t* key, const T* x, int64_t number) {
    T sum = 0;
    for (int64_t i = 0; i < number; ++i) sum += key[i] < 0 ? T(0) : x[i];
    return sum;
}

// The same for a row with a tail: a kept key adds to its value its weight minus that of a dropped key, and each key
// that the gate moves changes the tail, too.
template <class T>
void shares_with_tail(const int32_t* key, int64_t number, T row_max, T row_sum, T constant, T worth,
                      const TailGradient<T>& tail, T* score, T* through, T* slope) {
    constexpr int64_t PART = 64;
    for (int64_t begin = 0; begin < number; begin += PART, key += PART, score += PART, through += PART) {
        const int64_t many = std::min(PART, number - begin);
        T raw[PART], weight[PART];
        std::copy_n(score, many, raw);
        std::copy_n(score, many, weight);
        weigh_scores(weight, many, row_max, row_sum);
        T added[PART] = {};
        if (slope) {
            for (int64_t x = 0; x < many; ++x)
                slope[x] *= (weight[x] - tail.weight) * (through[x] - constant) + tail.through * (tail.mean - raw[x]);
            for (int64_t x = 0; x < many; ++x) added[x] = worth * slope[x];
            slope += PART;
        }
        for (int64_t x = 0; x < many; ++x) {
            const T benefit = weight[x] * (through[x] - constant) - tail.through;
            through[x] = (key[x] < 0 ? T(0) : benefit) + added[x];
        }
        for (int64_t x = 0; x < many; ++x) score[x] = key[x] < 0 ? T(0) : weight[x] - tail.weight;
    }
}

}  // namespace thresher
