// The tail of SMYRF's rows: the weight of the keys that a query meets in no round (attention/shared/tail.py).
//
// In each round a query drops all that it sees but its cluster. So the sum over dropped keys is a base, which all
// queries share, less the sums over the query's clusters, plus what these sums take out twice: the keys that it met in
// an earlier round. In causal attention the clusters of the first part are blocks of the sequence; a query sees all keys
// of the blocks before its own and drops none of its own block, so that the base belongs to the block.
//
// Attention starts a row with its base and takes the weight of a dropped key off the weight of each met one.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "gathered.h"
#include "smyrf_arguments.h"
#include "smyrf_repeats.h"
#include "smyrf_rows.h"
#include "tail.h"

namespace thresher {

inline int64_t bases_of(const Part& part) { return part.causal ? part.clusters : 1; }

// The base of a query, or what a key belongs to, by its cluster in the first round; -1 where it has none.
inline int64_t base_of(const Part& part, const int64_t* cluster, int64_t token) {
    return part.causal || cluster[token] < 0 ? cluster[token] : 0;
}

// Call take(base, tokens, number) for runs of tokens of the same base, whose clusters are given.
template <class Take>
void by_base(const Part& part, const int64_t* cluster, int64_t tokens, Take&& take) {
    std::vector<int64_t> run;
    int64_t of_run = -1;
    const auto end = [&] {
        if (!run.empty()) take(of_run, run.data(), int64_t(run.size()));
        run.clear();
    };
    for (int64_t token = 0; token < tokens; ++token) {
        const int64_t base = base_of(part, cluster, token);
        if (base < 0) continue;
        if (base != of_run) end();
        of_run = base;
        run.push_back(token);
    }
    end();
}

// Make the sum of each base that of all bases before it.
template <class T>
void sum_earlier(int64_t bases, int64_t width, T* sums) {
    std::vector<T> before(width, T(0));
    for (T* row = sums; row < sums + bases * width; row += width)
        for (int64_t c = 0; c < width; ++c) before[c] += std::exchange(row[c], before[c]);
}

// Compute the bases of a group; return the number of their keys.
template <class S, class T>
std::vector<T> sum_bases(const AttendArguments<S, T>& a, int64_t g) {
    const Sizes& s = a.sizes;
    const int64_t bases = bases_of(a.part);
    const S *keys = a.keys + g * s.m * s.d, *values = a.values + g * s.m * s.dv;
    T *of_keys = a.tail.base_keys + g * bases * s.d, *of_values = a.tail.base_values + g * bases * s.dv;
    std::vector<T> count(bases, T(0));
    const std::vector<T> ones(s.m, T(1));
    std::fill_n(of_keys, bases * s.d, T(0));
    std::fill_n(of_values, bases * s.dv, T(0));
    by_base(a.part, a.part.key_cluster + g * s.m, s.m, [&](int64_t base, const int64_t* tokens, int64_t number) {
        const auto at = [=](int64_t x) { return tokens[x]; };
        add_rows(of_values + base * s.dv, ones.data(), values, s.dv, number, at);
        add_rows(of_keys + base * s.d, ones.data(), keys, s.d, number, at);
        count[base] += T(number);
    });
    if (a.part.causal) {
        sum_earlier(bases, s.d, of_keys);
        sum_earlier(bases, s.dv, of_values);
        sum_earlier(bases, 1, count.data());
    }
    return count;
}

// What the queries of a group drop in a part. X is the type of their rows, S that of the rows of keys.
template <class S, class X, class T = Number<S>>
class Dropped {
  public:
    const X* of_queries;       // [n, width]
    const S* of_keys;          // [m, width]
    const T* base = nullptr;   // [bases, width], in the first part
    const T* count = nullptr;  // of the keys of each base, where `number` is wanted
    T *product, *number;       // [n]

    Dropped(const Sizes& sizes, const Part& part, int64_t width)
        : s(sizes), part(part), width(width), ones(part.cluster, T(1)), sum(width), repeats(sizes, part) {}

    void add_up(int64_t g) {
        if (base) {
            std::fill_n(product, s.n, T(0));
            if (number) std::fill_n(number, s.n, T(0));
        }
        const int64_t* of_tile = part.tile_cluster ? part.tile_cluster + g * part.tiles : nullptr;
        for (int64_t cluster = 0, tile = 0; cluster < part.clusters; ++cluster) {
            const int64_t round = cluster / (part.clusters / part.rounds);
            keys.take(part.token_k + (g * part.clusters + cluster) * part.cluster, part.cluster, s.m);
            const T of_cluster = sum_cluster(cluster, round);
            if (!part.causal) repeats.take(g, round, keys);
            const int64_t first = tile;
            while (tile < part.tiles && (of_tile ? of_tile[tile] : tile) == cluster) ++tile;
            queries.take(part.token_q + (g * part.tiles + first) * part.tile, (tile - first) * part.tile, s.n);
            add_queries(of_cluster);
        }
    }

  private:
    const Sizes& s;
    const Part& part;
    const int64_t width;
    const std::vector<T> ones;
    std::vector<T> sum, products;
    Rows keys, queries;
    Repeats repeats;

    // Sum what the queries of a cluster drop by meeting it; return the number.
    T sum_cluster(int64_t cluster, int64_t round) {
        std::fill(sum.begin(), sum.end(), T(0));
        T keys_of_sum = 0;
        if (!part.causal) {
            fetch(keys, 0, keys.size(), of_keys, width);
            add_rows(sum.data(), ones.data(), of_keys, width, keys.size(), [&](int64_t j) { return keys.tokens[j]; });
            for (T& x : sum) x = -x;
            keys_of_sum = -T(keys.size());
        }
        if (base && round == 0) {
            const int64_t own = part.causal ? cluster : 0;
            add_row(sum.data(), base + own * width, width);
            if (count) keys_of_sum += count[own];
        }
        return keys_of_sum;
    }

    void add_queries(T of_cluster) {
        fetch(queries, 0, queries.size(), of_queries, width);
        products.resize(queries.size());
        dots(sum.data(), of_queries, width, queries.size(), [&](int64_t i) { return queries.tokens[i]; }, products.data());
        for (int64_t i = 0; i < queries.size(); ++i) {
            const int64_t token = queries.tokens[i], found = part.causal ? 0 : repeats.find(token);
            T all = products[i];
            for (int64_t x = 0; x < found; ++x)
                all += dot(of_queries + token * width, of_keys + keys.tokens[repeats[x]] * width, width);
            product[token] += all;
            if (number) number[token] += of_cluster + T(found);
        }
    }
};

template <class S, class T>
void drop_in_group(const AttendArguments<S, T>& a, int64_t g) {
    const Sizes& s = a.sizes;
    std::vector<T> count;
    if (a.tail.first) count = sum_bases(a, g);
    Dropped<S, S> dropped(s, a.part, s.d);
    dropped.of_queries = a.queries + g * s.n * s.d;
    dropped.of_keys = a.keys + g * s.m * s.d;
    dropped.base = a.tail.first ? a.tail.base_keys + g * bases_of(a.part) * s.d : nullptr;
    dropped.count = a.tail.first ? count.data() : nullptr;
    dropped.product = a.tail.product + g * s.n;
    dropped.number = a.tail.dropped + g * s.n;
    dropped.add_up(g);
}

template <class S, class T>
void drop_back_in_group(const BackArguments<S, T>& a, int64_t g) {
    const Sizes& s = a.sizes;
    Dropped<S, T> dropped(s, a.part, s.dv);
    dropped.of_queries = a.grad + g * s.n * s.dv;
    dropped.of_keys = a.values + g * s.m * s.dv;
    dropped.base = a.tail.first ? a.tail.base_values + g * bases_of(a.part) * s.dv : nullptr;
    dropped.product = a.dropped_benefit + g * s.n;
    dropped.number = nullptr;
    dropped.add_up(g);
}

// Set the rows of keys to what their base got; in causal attention to what all later ones got. `sums` ends in zeros.
template <class T>
void spread_to_keys(const Sizes& s, const Part& part, int64_t g, std::vector<T>& sums, int64_t width, T* to) {
    const int64_t* cluster = part.key_cluster + g * s.m;
    for (int64_t base = bases_of(part) - 2; part.causal && base >= 0; --base)
        add_row(&sums[base * width], &sums[(base + 1) * width], width);
    for (int64_t j = 0; j < s.m; ++j) {
        const int64_t base = base_of(part, cluster, j);
        T* row = to + (g * s.m + j) * width;
        if (base < 0)
            std::fill_n(row, width, T(0));
        else
            std::copy_n(&sums[(part.causal ? base + 1 : 0) * width], width, row);
    }
}

// The gradients of the tail of a row.
template <class S, class T>
TailGradient<T> find_gradient(const BackArguments<S, T>& a, int64_t g, int64_t row) {
    const int64_t dv = a.sizes.dv;
    const T dropped = a.tail.dropped[row];
    if (a.row_sum[row] == 0 || dropped < T(0.5)) return {};
    const T mean = a.tail.product[row] / (dropped * std::sqrt(T(a.sizes.d)));
    const T less_factor = std::exp(std::min(mean - a.row_max[row], T(MAX_EXCESS))) / a.row_sum[row];
    const T constant = dot(a.grad + row * dv, a.out + row * dv, dv);
    return {a.tail.tail_factor[g], dropped, less_factor, a.dropped_benefit[row], constant};
}

// What tails add to the gradients of the tokens of a group: each base passes the gradients of its queries to its keys.
template <class S, class T>
void start_back_in_group(const BackArguments<S, T>& a, int64_t g) {
    const Sizes& s = a.sizes;
    const Part& part = a.part;
    const int64_t bases = bases_of(part), d = s.d, dv = s.dv, *cluster = part.query_cluster + g * s.n;
    const T scale = 1 / std::sqrt(T(d));
    std::vector<T> to_keys((bases + 1) * d, T(0)), to_values((bases + 1) * dv, T(0)), share, weight;
    double of_factor = 0;
    for (int64_t i = 0; i < s.n; ++i) {
        const int64_t row = g * s.n + i;
        const TailGradient<T> of_row = find_gradient(a, g, row);
        a.weight[row] = of_row.weight;
        a.through[row] = of_row.through;
        of_factor += double(of_row.factor);
        T* to = a.grad_queries + row * d;
        if (of_row.through == 0) {
            std::fill_n(to, d, T(0));
            continue;
        }
        const T* of_base = a.tail.base_keys + (g * bases + base_of(part, cluster, i)) * d;
        for (int64_t c = 0; c < d; ++c) to[c] = of_row.through * scale * of_base[c];
    }
    by_base(part, cluster, s.n, [&](int64_t base, const int64_t* tokens, int64_t number) {
        const auto at = [=](int64_t x) { return g * s.n + tokens[x]; };
        share.resize(number);
        weight.resize(number);
        for (int64_t x = 0; x < number; ++x) {
            share[x] = a.through[at(x)] * scale;
            weight[x] = a.weight[at(x)];
        }
        add_rows(&to_keys[base * d], share.data(), a.queries, d, number, at);
        add_rows(&to_values[base * dv], weight.data(), a.grad, dv, number, at);
    });
    a.grad_tail_factor[g] = T(of_factor);
    spread_to_keys(s, part, g, to_keys, d, a.grad_keys);
    spread_to_keys(s, part, g, to_values, dv, a.grad_values);
}

}  // namespace thresher
