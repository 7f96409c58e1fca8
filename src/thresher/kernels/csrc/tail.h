// The tail of a row: the weight of its dropped keys, all with their mean score (attention/shared/tail.py).
//
// A tail needs the sums of the keys and of the values that a query sees. All queries of a group share them, or they are
// running sums where attention is causal: memory and time are linear in the number of tokens.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bf16.h"
#include "gathered.h"
#include "parallel.h"
#include "vector.h"

namespace thresher {

constexpr double MAX_EXCESS = 30;  // nats by which a dropped key may outweigh the best kept one

// The tokens of all groups, and which keys a query sees: those of `seen`, up to key i + shift where causal.
template <class S>
struct Tokens {
    const S *queries, *keys, *values;  // [groups, n, d], [groups, m, d], [groups, m, dv]
    const uint8_t* seen;               // [groups, m], or null
    int64_t groups, n, m, d, dv, causal, shift;
    double scale;  // of scores

    bool shows(int64_t g, int64_t j) const { return !seen || seen[g * m + j]; }
    int64_t end(int64_t i) const { return causal ? std::clamp<int64_t>(i + shift + 1, 0, m) : m; }
};

// The tail of one row; sums are over the keys that its query sees.
template <class T>
struct RowTail {
    T factor = 0;               // of the weight of a dropped key
    T number = 0;               // of visible keys
    T scores = 0;               // their sum
    const T* values = nullptr;  // their sum
};

template <class T, class S>
inline void add_row(T* sum, const S* row, int64_t width) {
    for (int64_t c = 0; c < width; ++c) sum[c] += as_number(row[c]);
}
template <class T, class S>
inline void add_row(T* sum, T share, const S* row, int64_t width) {
    for (int64_t c = 0; c < width; ++c) sum[c] += share * as_number(row[c]);
}

// Call look(i, sum, number) for each query of a group, with the sum and the number of the rows [m, width] that it sees.
template <class S, class T, class Look>
inline void sum_seen(const Tokens<S>& tokens, int64_t g, const S* rows, int64_t width, std::vector<T>& sum, Look&& look) {
    sum.assign(width, T(0));
    int64_t j = 0, number = 0;
    for (int64_t i = 0; i < tokens.n; ++i) {
        for (; j < tokens.end(i); ++j)
            if (tokens.shows(g, j)) {
                add_row(sum.data(), rows + (g * tokens.m + j) * width, width);
                ++number;
            }
        look(i, sum.data(), number);
    }
}

// The tails of all rows; none without factors. Where each group has one query, the caller may give the sums over the
// keys [groups, d] and the values [groups, dv] that it sees.
template <class S, class T = Number<S>>
class Tails {
  public:
    Tails(const Tokens<S>& tokens, const T* factor, int64_t threads, const T* key_sum = nullptr,
          const T* value_sum = nullptr)
        : tokens(tokens), factor(factor) {
        if (!factor) return;
        const int64_t rows = tokens.groups * tokens.n;
        scores.resize(rows);
        number.resize(rows);
        if (key_sum) {
            values.assign(value_sum, value_sum + rows * tokens.dv);
            for (int64_t g = 0; g < rows; ++g) look(g, 0, key_sum + g * tokens.d, count_seen(g));
            return;
        }
        values.resize((tokens.causal ? rows : tokens.groups) * tokens.dv);
        parallel_for(2 * tokens.groups, threads, [] { return std::vector<T>(); }, [&](int64_t task, std::vector<T>& sum) {
            task % 2 ? sum_values(task / 2, sum) : sum_keys(task / 2, sum);
        });
    }

    explicit operator bool() const { return factor != nullptr; }
    RowTail<T> row(int64_t row) const {
        const int64_t g = row / tokens.n;
        return {factor[g], number[row], scores[row], &values[(tokens.causal ? row : g) * tokens.dv]};
    }

  private:
    const Tokens<S> tokens;
    const T* factor;  // [groups]
    std::vector<T> scores, number, values;

    void sum_keys(int64_t g, std::vector<T>& sum) {
        sum_seen(tokens, g, tokens.keys, tokens.d, sum,
                 [&](int64_t i, const T* all, int64_t seen) { look(g, i, all, seen); });
    }

    void look(int64_t g, int64_t i, const T* keys, int64_t seen) {
        const int64_t row = g * tokens.n + i;
        number[row] = T(seen);
        scores[row] = dot(keys, tokens.queries + row * tokens.d, tokens.d) * T(tokens.scale);
    }

    int64_t count_seen(int64_t g) const {
        const int64_t end = tokens.end(0);
        return tokens.seen ? std::count(tokens.seen + g * tokens.m, tokens.seen + g * tokens.m + end, 1) : end;
    }

    void sum_values(int64_t g, std::vector<T>& sum) {
        const int64_t dv = tokens.dv;
        sum_seen(tokens, g, tokens.values, dv, sum, [&](int64_t i, const T* all, int64_t) {
            if (tokens.causal || i == 0) std::copy_n(all, dv, &values[(tokens.causal ? g * tokens.n + i : g) * dv]);
        });
    }
};

template <class T>
T sum_of(const T* x, int64_t number) {
    constexpr int64_t LANES = Wide<T>::LANES;
    Vector<T> sum{};
    int64_t i = 0;
    for (; i + LANES <= number; i += LANES) sum += load(x + i);
    T rest = 0;
    for (; i < number; ++i) rest += x[i];
    return total<T>(sum) + rest;
}

// Add the tail to the softmax weights of the `number` kept keys of a row. Afterwards they are the weight of each kept
// key minus that of a dropped one, and row_sum includes the tail. Return the weight of a dropped key before its factor.
// `sum` is the sum of the scores of kept keys.
template <class T>
inline T weigh_tail(const RowTail<T>& tail, int64_t number, T sum, T row_max, T& row_sum, T* weight) {
    const T dropped = tail.number - T(number);
    if (number == 0 || dropped < T(0.5)) return T(0);
    const T mean = (tail.scores - sum) / dropped;
    const T one = std::exp(std::min(mean - row_max, T(MAX_EXCESS))), share = one * tail.factor;
    const T all = row_sum + share * dropped, kept = row_sum / all, less = share / all;
    for (int64_t j = 0; j < number; ++j) weight[j] = weight[j] * kept - less;
    row_sum = all;
    return one / all;
}

// Set the output of a row to the sum of all its visible values, each at the weight of a dropped key.
template <class T>
inline void start_row(const RowTail<T>& tail, int64_t dv, T less_factor, T* out) {
    if (less_factor == T(0)) {
        std::fill_n(out, dv, T(0));
        return;
    }
    const T share = less_factor * tail.factor;
    for (int64_t c = 0; c < dv; ++c) out[c] = share * tail.values[c];
}

// The gradients of the tail of a row.
template <class T>
struct TailGradient {
    T weight = 0;   // of a dropped key
    T mean = 0;     // score of the dropped keys
    T through = 0;  // gradient to the score of one dropped key
    T factor = 0;   // gradient to the factor

    TailGradient() = default;

    // `less_factor` is the weight of a dropped key before its factor, `products` the product of the gradient of the
    // output with the sum of the values of the `dropped` keys, `constant` that with the output.
    TailGradient(T tail_factor, T dropped, T less_factor, T products, T constant) {
        if (less_factor == T(0)) return;
        factor = less_factor * (products - dropped * constant);
        weight = less_factor * tail_factor;
        through = factor * tail_factor / dropped;
    }

    // `less_factor` is the result of weigh_tail; `sum` sums the scores of kept keys, `products` the products of their
    // values with the gradient of the output; `constant` is the product of the output with its gradient.
    TailGradient(const RowTail<T>& tail, int64_t dv, T less_factor, int64_t number, T sum, T products, T constant,
                 const T* grad)
        : TailGradient(tail.factor, tail.number - T(number), less_factor,
                       less_factor == T(0) ? T(0) : dot(grad, tail.values, dv) - products, constant) {
        if (less_factor != T(0)) mean = (tail.scores - sum) / (tail.number - T(number));
    }
};

// The gradients that tails pass to queries, keys, values and factors.
template <class S, class T = Number<S>>
struct TailGradients {
    std::vector<T> weight, through, factor;  // of each row, as in TailGradient

    TailGradients(const Tokens<S>& tokens, bool wanted) {
        if (!wanted) return;
        for (auto* each : {&weight, &through, &factor}) each->assign(tokens.groups * tokens.n, T(0));
    }
    void set(int64_t row, const TailGradient<T>& of_row) {
        weight[row] = of_row.weight;
        through[row] = of_row.through;
        factor[row] = of_row.factor;
    }

    // Add the gradients of the tokens in the sums, and write those of the factors of groups.
    void spread(const Tokens<S>& tokens, const T* grad, T* grad_queries, T* grad_keys, T* grad_values, T* grad_factor,
                int64_t threads) const {
        if (weight.empty()) return;
        parallel_for(2 * tokens.groups, threads, [] { return std::vector<T>(); }, [&](int64_t task, std::vector<T>& sum) {
            const int64_t g = task / 2;
            if (task % 2) {
                add_to_seen(tokens, g, grad, tokens.dv, weight, T(1), sum, grad_values);
                return;
            }
            const T scale = T(tokens.scale);
            sum_seen(tokens, g, tokens.keys, tokens.d, sum, [&](int64_t i, const T* all, int64_t) {
                const int64_t row = g * tokens.n + i;
                if (through[row] != T(0)) add_row(grad_queries + row * tokens.d, through[row] * scale, all, tokens.d);
            });
            add_to_seen(tokens, g, tokens.queries, tokens.d, through, scale, sum, grad_keys);
            double of_factor = 0;
            for (int64_t i = 0; i < tokens.n; ++i) of_factor += double(factor[g * tokens.n + i]);
            grad_factor[g] = T(of_factor);
        });
    }

  private:
    // Add to the row of each key the rows of the queries that see it, each times its share.
    template <class X>
    static void add_to_seen(const Tokens<S>& tokens, int64_t g, const X* rows, int64_t width, const std::vector<T>& share,
                            T scale, std::vector<T>& sum, T* to) {
        sum.assign(width, T(0));
        int64_t i = tokens.n - 1;
        for (int64_t j = tokens.m - 1; j >= 0; --j) {
            for (; i >= 0 && tokens.end(i) > j; --i) {
                const int64_t row = g * tokens.n + i;
                if (share[row] != T(0)) add_row(sum.data(), share[row] * scale, rows + row * width, width);
            }
            if (tokens.shows(g, j)) add_row(to + (g * tokens.m + j) * width, sum.data(), width);
        }
    }
};

}  // namespace thresher
