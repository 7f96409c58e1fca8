// Attention of a block's queries to its keys, as products of dense matrices, and its gradients.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "blocks_arguments.h"
#include "blocks_choice.h"
#include "blocks_panels.h"
#include "buffer.h"
#include "gathered.h"
#include "shares.h"
#include "softmax.h"
#include "tail.h"

namespace thresher {

constexpr int64_t IN_CACHE = 512 * 1024;  // bytes of weights at a time
constexpr int64_t AT_LEAST = 12;          // rows at a time

// A block at a time; a thread uses its room again for its next one.
template <class S>
class Dense {
    using T = Number<S>;

  public:
    void attend(const AttendArguments<S>& a, int64_t g, const Choice<T>& choice, const Tails<S>& tails) {
        const Gate<T>& gate = a.gate;
        const int64_t rows = choice.rows.size(), number = choice.number, width = padded(number);
        gather_keys(a.keys + g * gate.m * gate.d, a.queries + g * gate.n * gate.d, T(a.scale), gate.d, choice);
        gather_values(a.values + g * gate.m * gate.dv, gate.dv, choice);
        const int64_t most = rows_at_once(width);
        make_room(weight, std::min(most, rows) * width);
        make_room(own, width);
        for (int64_t from = 0; from < rows; from += most) {
            const int64_t some = std::min(most, rows - from);
            score(from, some, gate.d, width);
            for (int64_t r = 0; r < some; ++r) {
                const int64_t i = from + r, row = g * gate.n + choice.rows[i], kept = choice.kept(i);
                T* of_row = take(choice, i, weight.data() + r * width, own);
                a.row_max[row] = -std::numeric_limits<T>::infinity();
                a.row_sum[row] = 0;
                const T sum = tails ? sum_of(of_row, kept) : T(0);
                if (kept) soften(of_row, kept, a.row_max[row], a.row_sum[row]);
                T of_dropped = 0;
                const RowTail<T> tail = tails ? tails.row(row) : RowTail<T>();
                if (tails) {
                    of_dropped = weigh_tail(tail, kept, sum, a.row_max[row], a.row_sum[row], of_row);
                    a.tail_weight[row] = of_dropped;
                }
                start_row(tail, gate.dv, of_dropped, a.out + row * gate.dv);
                put_back(choice, i, of_row, weight.data() + r * width);
            }
            T* out = a.out + g * gate.n * gate.dv;
            multiply_panels(Left<T>{weight.data(), width, 1}, value, some, padded(gate.dv), number,
                            [&](int64_t r, int64_t c, Vector<T> x) {
                                add_vector(out + choice.rows[from + r] * gate.dv, c, gate.dv, x);
                            });
        }
        break_rows(choice, gate.dv, a.out + g * gate.n * gate.dv);
    }

    // Add to gradients; return that of the threshold.
    double back(const BackArguments<S>& a, int64_t g, const Choice<T>& choice, const Tails<S>& tails, T* grad_keys,
                T* grad_values, TailGradients<S>& of_tails) {
        const Gate<T>& gate = a.gate;
        const int64_t rows = choice.rows.size(), number = choice.number, width = padded(number);
        const int64_t d = gate.d, dv = gate.dv;
        const auto key_of = [&](int64_t c) { return int64_t(choice.keys[c]); };
        const auto row_of = [&](int64_t i) { return choice.rows[i]; };
        const T* grads = a.grad + g * gate.n * dv;
        gather_keys(a.keys + g * gate.m * d, a.queries + g * gate.n * d, T(a.scale), d, choice);
        gather(a.keys + g * gate.m * d, d, number, key_of, key_rows);
        gather_turned(a.values + g * gate.m * dv, dv, number, key_of, value);
        make_room(grad, rows * dv);
        for (int64_t i = 0; i < rows; ++i) std::copy_n(grads + row_of(i) * dv, dv, &grad[i * dv]);
        const int64_t most = rows_at_once(2 * width);
        for (auto* each : {&weight, &through}) make_room(*each, std::min(most, rows) * width);
        for (auto* each : {&own, &own_through, &slope}) make_room(*each, width);
        double of_threshold = 0;
        for (int64_t from = 0; from < rows; from += most) {
            const int64_t some = std::min(most, rows - from);
            score(from, some, d, width);
            T* to = through.data();
            multiply_panels(Left<T>{&grad[from * dv], dv, 1}, value, some, width, dv,
                            [=](int64_t r, int64_t c, Vector<T> x) { store(to + r * width + c, x); });
            for (int64_t r = 0; r < some; ++r) {
                const int64_t i = from + r;
                T* of_row = take(choice, i, weight.data() + r * width, own);
                T* through_row = take(choice, i, through.data() + r * width, own_through);
                of_threshold += back_row(a, g, choice, i, tails, of_row, through_row, of_tails);
                put_back(choice, i, of_row, weight.data() + r * width);
                put_back(choice, i, through_row, through.data() + r * width);
            }
            const auto row_at = [&](int64_t i) { return from + i; };
            gather(grad.data(), dv, some, row_at, right);
            multiply_panels(Left<T>{weight.data(), 1, width}, right, number, padded(dv), some,
                            [&](int64_t c, int64_t z, Vector<T> x) {
                                add_vector(grad_values + key_of(c) * dv, z, dv, x);
                            });
            gather(query.data(), d, some, row_at, right);
            multiply_panels(Left<T>{through.data(), 1, width}, right, number, padded(d), some,
                            [&](int64_t c, int64_t z, Vector<T> x) { add_vector(grad_keys + key_of(c) * d, z, d, x); });
            const T scale = T(a.scale);
            multiply_panels(Left<T>{through.data(), width, 1}, key_rows, some, padded(d), number,
                            [&](int64_t r, int64_t z, Vector<T> x) {
                                T* of = a.grad_queries + (g * gate.n + row_of(from + r)) * d;
                                add_vector(of, z, d, x * scale);
                            });
        }
        return of_threshold;
    }

  private:
    Buffer<T> query, key, key_rows, value, grad, right;
    Buffer<T> weight, through, own, own_through, slope;
    std::vector<int64_t> broken;  // kept keys whose values are not finite

    static int64_t rows_at_once(int64_t width) {
        const int64_t most = IN_CACHE / int64_t(sizeof(T)) / std::max<int64_t>(width, 1);
        return std::max<int64_t>(most / AT_LEAST, 1) * AT_LEAST;
    }

    void gather_keys(const S* keys, const S* queries, T scale, int64_t d, const Choice<T>& choice) {
        gather_turned(keys, d, choice.number, [&](int64_t c) { return int64_t(choice.keys[c]); }, key);
        make_room(query, int64_t(choice.rows.size()) * d);
        for (size_t i = 0; i < choice.rows.size(); ++i) {
            const S* row = queries + choice.rows[i] * d;
            for (int64_t c = 0; c < d; ++c) query[i * d + c] = as_number(row[c]) * scale;
        }
    }

    // Gather values; those that are not finite become zero, lest they reach rows that do not keep their keys.
    void gather_values(const S* values, int64_t dv, const Choice<T>& choice) {
        gather(values, dv, choice.number, [&](int64_t c) { return int64_t(choice.keys[c]); }, value);
        broken.clear();
        for (int64_t c = 0; c < choice.number; ++c) {
            Vector<T> sum{};
            for (int64_t z = 0; z < padded(dv); z += BLOCK)
                for (int64_t x = 0; x < BLOCK; x += Wide<T>::LANES)
                    sum += load(&value[z * choice.number + c * BLOCK + x]) * T(0);
            if (total<T>(sum) == 0) continue;
            broken.push_back(c);
            for (int64_t z = 0; z < padded(dv); z += BLOCK)
                std::fill_n(&value[z * choice.number + c * BLOCK], BLOCK, T(0));
        }
    }

    void break_rows(const Choice<T>& choice, int64_t dv, T* out) const {
        for (const int64_t c : broken)
            for (size_t i = 0; i < choice.rows.size(); ++i)
                if (choice.shared || std::binary_search(choice.column.begin() + choice.start[i],
                                                        choice.column.begin() + choice.start[i + 1], int32_t(c)))
                    std::fill_n(out + choice.rows[i] * dv, dv, std::numeric_limits<T>::quiet_NaN());
    }

    void score(int64_t from, int64_t some, int64_t d, int64_t width) {
        T* to = weight.data();
        multiply_panels(Left<T>{&query[from * d], d, 1}, key, some, width, d,
                        [=](int64_t r, int64_t c, Vector<T> x) { store(to + r * width + c, x); });
    }

    // What a row has of its kept keys side by side: as it is where it keeps all.
    static T* take(const Choice<T>& choice, int64_t i, T* row, Buffer<T>& room) {
        if (choice.shared) return row;
        const int32_t* column = choice.column.data() + choice.start[i];
        for (int64_t x = 0; x < choice.kept(i); ++x) room[x] = row[column[x]];
        return room.data();
    }
    static void put_back(const Choice<T>& choice, int64_t i, const T* kept, T* row) {
        if (choice.shared) return;
        const int32_t* column = choice.column.data() + choice.start[i];
        std::fill_n(row, choice.number, T(0));
        for (int64_t x = 0; x < choice.kept(i); ++x) row[column[x]] = kept[x];
    }

    // Turn a row's scores and the products of its gradient with values into what its pairs add to values and to scores.
    double back_row(const BackArguments<S>& a, int64_t g, const Choice<T>& choice, int64_t i, const Tails<S>& tails,
                    T* score, T* through_row, TailGradients<S>& of_tails) {
        const int64_t dv = a.gate.dv, row = g * a.gate.n + choice.rows[i], kept = choice.kept(i);
        const T *of_out = a.grad + row * dv, constant = dot(of_out, a.out + row * dv, dv);
        T* moved = nullptr;
        double of_threshold = 0;
        if (a.width > 0) {
            moved = slope.data();
            std::copy_n(choice.slope.data() + (choice.shared ? 0 : choice.start[i]), kept, moved);
            of_threshold += double(a.grad_kept[g]) * double(sum_of(moved, kept));
        }
        const int32_t* key = choice.keys.data();  // of any keys, all of which are kept
        if (tails) {
            const TailGradient<T> tail(tails.row(row), dv, a.tail_weight[row], kept, sum_of(score, kept),
                                       sum_of(through_row, kept), constant, of_out);
            of_tails.set(row, tail);
            shares_with_tail(key, kept, a.row_max[row], a.row_sum[row], constant, T(0), tail, score, through_row,
                             moved);
        } else {
            shares_of(key, kept, a.row_max[row], a.row_sum[row], constant, T(0), score, through_row, moved);
        }
        return moved ? of_threshold + double(sum_of(moved, kept)) : of_threshold;
    }
};

}  // namespace thresher
