// A cluster of keys with the tiles of queries that attend to it: its part of the outputs and of the gradients.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "bf16.h"
#include "exponential.h"
#include "gathered.h"
#include "matrix.h"
#include "smyrf_arguments.h"
#include "smyrf_repeats.h"
#include "smyrf_rows.h"

namespace thresher {

constexpr int64_t CHUNK = 48;  // queries whose scores are in cache at a time

// What a query drops; without a tail, or where its factor is 0, nothing.
template <class T>
struct Dropping {
    T factor = 0, number = 0;
    T mean = -std::numeric_limits<T>::infinity();  // of scores
};

// What a query meets in a cluster.
template <class T>
struct Fresh {
    bool some = false;          // whether it meets a key at all
    T row_max = 0, row_sum = 0;
    T tail = 0, dropped = 0;    // the weight of a dropped key, and their number
};

// A cluster at a time; a thread uses its room again for its next one.
template <class S>
class Cluster {
    using T = Number<S>;

  public:
    Cluster(const Sizes& sizes, const Part& part)
        : s(sizes), part(part), d(padded(s.d)), dv(padded(s.dv)), by_factors(padded(factors<S>(s.d))),
          scale(1 / std::sqrt(static_cast<T>(s.d))), repeats(sizes, part) {}

    void take(int64_t group, int64_t cluster) {
        g = group;
        round = cluster / (part.clusters / part.rounds);
        keys.take(part.token_k + (g * part.clusters + cluster) * part.cluster, part.cluster, s.m);
        width = padded(keys.size());
        repeats.take(g, round, keys);
        first = last = cluster;
        if (part.tile_cluster) {
            const int64_t *of = part.tile_cluster + g * part.tiles, *end = of + part.tiles;
            first = std::lower_bound(of, end, cluster) - of;
            last = std::upper_bound(of, end, cluster) - of - 1;
        }
        base = part.causal ? g * part.clusters + cluster : g;
    }

    void attend(const AttendArguments<S>& a, int64_t& meetings, int64_t& repeated) {
        if (!keys.size()) return;
        const S *q = a.queries, *k = a.keys, *v = a.values;
        T* out = a.out;
        const T* start = a.tail.tail_factor && a.tail.first ? a.tail.base_values + base * s.dv : nullptr;
        gather(keys, k + g * s.m * s.d, s.d, key);
        fetch(keys, 0, keys.size(), v + g * s.m * s.dv, s.dv);
        turn(key, keys.size(), by_factors, turned_key);
        gather(keys, v + g * s.m * s.dv, s.dv, value);
        sums.resize(CHUNK * dv);
        weights.resize(CHUNK * width);
        for (int64_t tile = first; tile <= last; ++tile) {
            queries.take(part.token_q + (g * part.tiles + tile) * part.tile, part.tile, s.n);
            gather(queries, q + g * s.n * s.d, s.d, query);
            for (int64_t i = 0; i < queries.size(); i += CHUNK) {
                const int64_t number = std::min(CHUNK, queries.size() - i);
                fetch(queries, i, i + number, out + g * s.n * s.dv, s.dv);
                score(i, number, meetings);
                Fresh<T> fresh[CHUNK];
                for (int64_t r = 0; r < number; ++r) {
                    const int64_t token = queries.tokens[i + r], again = repeats.find(token);
                    repeated += again;
                    fresh[r] = soften(&weights[r * width], take_tail(a, g * s.n + token), again);
                }
                T* to = sums.data();
                const int64_t wide = dv;
                multiply(Left<T>{weights.data(), width, 1}, value.data(), dv, number, dv, keys.size(),
                         [=](int64_t r, int64_t c, Vector<T> x) { store(to + r * wide + c, x); });
                for (int64_t r = 0; r < number; ++r) {
                    const int64_t token = g * s.n + queries.tokens[i + r];
                    merge(out + token * s.dv, a.row_max[token], a.row_sum[token], &sums[r * dv], fresh[r], start);
                }
            }
        }
    }

    void back(const BackArguments<S>& a) {
        if (!keys.size()) return;
        const S *q = a.queries, *k = a.keys, *v = a.values;
        const T *grad = a.grad, *out = a.out;
        gather(keys, k + g * s.m * s.d, s.d, key);
        gather(keys, v + g * s.m * s.dv, s.dv, value);
        const std::vector<T>& key_numbers = numbers(keys, k + g * s.m * s.d, s.d, key, wide_key);
        turn(key, keys.size(), by_factors, turned_key);
        turn(value, keys.size(), dv, turned_value);
        weights.resize(CHUNK * width);
        through.resize(CHUNK * width);
        sum_k.assign(keys.size() * d, T(0));
        sum_v.assign(keys.size() * dv, T(0));
        int64_t meetings = 0;
        for (int64_t tile = first; tile <= last; ++tile) {
            queries.take(part.token_q + (g * part.tiles + tile) * part.tile, part.tile, s.n);
            gather(queries, q + g * s.n * s.d, s.d, query);
            const std::vector<T>& query_numbers = numbers(queries, q + g * s.n * s.d, s.d, query, wide_query);
            gather(queries, grad + g * s.n * s.dv, s.dv, grads);
            sums.resize(queries.size() * d);
            for (int64_t i = 0; i < queries.size(); i += CHUNK) {
                const int64_t number = std::min(CHUNK, queries.size() - i);
                score(i, number, meetings);
                T *p = weights.data(), *t = through.data();
                const int64_t wide = width;
                multiply(Left<T>{&grads[i * dv], dv, 1}, turned_value.data(), width, number, width, dv,
                         [=](int64_t r, int64_t c, Vector<T> x) { store(t + r * wide + c, x); });
                for (int64_t r = 0; r < number; ++r) {
                    const int64_t token = g * s.n + queries.tokens[i + r];
                    const T benefit = dot(grad + token * s.dv, out + token * s.dv, s.dv);
                    const bool none = a.row_sum[token] == 0;  // it met nothing
                    const T most = none ? std::numeric_limits<T>::infinity() : a.row_max[token];
                    const T each = none ? T(0) : part.times / a.row_sum[token];
                    const bool tail = a.tail.tail_factor && !part.causal;
                    const T less = tail ? a.weight[token] : T(0);
                    const T less_through = tail ? scale * a.through[token] : T(0);
                    T *of_row = p + r * width, *through_row = t + r * width;
                    for (int64_t c = 0; c < width; c += Wide<T>::LANES) {
                        const Vector<T> weight = exponential(load(of_row + c) - most) * each;
                        store(of_row + c, weight - less);
                        store(through_row + c, scale * weight * (load(through_row + c) - benefit) - less_through);
                    }
                    const int64_t again = tail ? repeats.find(queries.tokens[i + r]) : 0;
                    for (int64_t x = 0; x < again; ++x) {
                        of_row[repeats[x]] += less;
                        through_row[repeats[x]] += less_through;
                    }
                }
                add(Left<T>{p, 1, width}, &grads[i * dv], dv, keys.size(), number, sum_v.data());
                add(Left<T>{t, 1, width}, &query_numbers[i * d], d, keys.size(), number, sum_k.data());
                T* to = &sums[i * d];
                const int64_t row = d;
                multiply(Left<T>{t, width, 1}, key_numbers.data(), d, number, d, keys.size(),
                         [=](int64_t r, int64_t c, Vector<T> x) { store(to + r * row + c, x); });
            }
            add_rows(queries, sums, s.d, a.grad_queries + g * s.n * s.d);
        }
        add_rows(keys, sum_k, s.d, a.grad_keys + g * s.m * s.d);
        add_rows(keys, sum_v, s.dv, a.grad_values + g * s.m * s.dv);
    }

  private:
    const Sizes& s;
    const Part& part;
    const int64_t d, dv, by_factors;  // widths of rows of numbers, and of factors
    const T scale;
    int64_t g = 0, round = 0, width = 0, first = 0, last = 0, base = 0;
    Rows keys, queries;
    std::vector<Factor<S>> key, turned_key, query;
    Repeats repeats;
    std::vector<T> wide_key, wide_query, value, turned_value, grads, weights, through, sums, sum_k, sum_v;

    // Queries or keys as numbers: factors, where they are that, or what is put into `room`.
    static const std::vector<T>& numbers(const Rows& rows, const S* from, int64_t width,
                                         const std::vector<Factor<S>>& gathered, std::vector<T>& room) {
        if constexpr (std::is_same_v<Factor<S>, T>) {
            return gathered;
        } else {
            gather(rows, from, width, room);
            return room;
        }
    }

    // Scores of `number` queries from the i-th on, -inf where a key is hidden or not there; counts those that are.
    void score(int64_t i, int64_t number, int64_t& meetings) {
        const T none = -std::numeric_limits<T>::infinity();
        T* to = weights.data();
        const int64_t wide = width;
        const T times = scale;
        multiply(Left<Factor<S>>{&query[i * by_factors], by_factors, 1}, turned_key.data(), width, number, width,
                 factors<S>(s.d), [=](int64_t r, int64_t c, Vector<T> x) { store(to + r * wide + c, x * times); });
        for (int64_t r = 0; r < number; ++r) {
            const int64_t seen = count_seen(i + r);
            std::fill(&weights[r * width] + seen, &weights[r * width] + width, none);
            meetings += seen;
        }
    }

    // The number of keys that the i-th query sees: the first ones.
    int64_t count_seen(int64_t i) const {
        if (!part.causal) return keys.size();
        const auto &all = keys.tokens;
        return std::upper_bound(all.begin(), all.end(), queries.tokens[i] + part.shift) - all.begin();
    }

    Dropping<T> take_tail(const AttendArguments<S>& a, int64_t row) const {
        if (!a.tail.tail_factor || a.tail.tail_factor[g] == 0 || a.tail.dropped[row] < T(0.5)) return {};
        return {a.tail.tail_factor[g], a.tail.dropped[row], a.tail.product[row] * scale / a.tail.dropped[row]};
    }

    // Turn scores into exp(score - largest), where the mean score of dropped keys may be the largest, too. Take off what
    // a dropped key weighs, except from keys that were met before and in blocks, whose keys no base contains.
    Fresh<T> soften(T* row, const Dropping<T>& tail, int64_t again) const {
        Vector<T> best = load(row);
        for (int64_t c = Wide<T>::LANES; c < width; c += Wide<T>::LANES) {
            const Vector<T> x = load(row + c);
            best = x > best ? x : best;
        }
        const T most = largest<T>(best);
        if (most == -std::numeric_limits<T>::infinity()) return {};
        const T row_max = std::max(most, tail.mean);
        Vector<T> weight{};
        if (tail.factor != 0) weight = tail.factor * exponential(Vector<T>{} + (tail.mean - row_max));
        const Vector<T> less = part.causal ? Vector<T>{} : weight;
        Vector<T> part_sum{};
        for (int64_t c = 0; c < width; c += Wide<T>::LANES) {
            const Vector<T> x = exponential(load(row + c) - row_max);
            store(row + c, x - less);
            part_sum += x;
        }
        for (int64_t x = 0; x < again; ++x) row[repeats[x]] += less[0];
        return {true, row_max, total<T>(part_sum), weight[0], tail.number};
    }

    // Merge what a query met in this cluster with what it met before: at first its tail, whose values `start` sums.
    void merge(T* out, T& row_max, T& row_sum, const T* sum, const Fresh<T>& fresh, const T* start) const {
        if (!fresh.some) return;
        if (row_sum == 0) {
            row_max = fresh.row_max;
            row_sum = part.times * fresh.row_sum + fresh.tail * fresh.dropped;
            const T share = part.times / row_sum, of_start = fresh.tail / row_sum;
            for (int64_t c = 0; c < s.dv; ++c) out[c] = sum[c] * share;
            for (int64_t c = 0; of_start != 0 && c < s.dv; ++c) out[c] += start[c] * of_start;
            return;
        }
        const bool larger = fresh.row_max > row_max;
        const T lower = std::exp(larger ? row_max - fresh.row_max : fresh.row_max - row_max);
        const T before = row_sum * (larger ? lower : 1), times = part.times * (larger ? 1 : lower);
        row_max = larger ? fresh.row_max : row_max;
        row_sum = before + times * fresh.row_sum;
        const T old_share = before / row_sum, share = times / row_sum;
        for (int64_t c = 0; c < s.dv; ++c) out[c] = out[c] * old_share + sum[c] * share;
    }

    void add(Left<T> left, const T* b, int64_t columns, int64_t rows, int64_t inner, T* into) const {
        multiply(left, b, columns, rows, columns, inner, [=](int64_t i, int64_t c, Vector<T> x) {
            store(into + i * columns + c, load(into + i * columns + c) + x);
        });
    }
};

}  // namespace thresher
