// Softmax attention of tiles of queries inside clusters of keys, merged, and its gradients; ranks of hash values, which
// clusters are cut by.
//
// Of each query, row_max is the largest score, row_sum the sum of exp(score - row_max). One number, their log-sum-exp,
// would lose the sum to rounding where scores are huge.
//
// Inside a round a query is in one tile and a key in one cluster, so clusters are independent tasks; rounds follow one
// another. Sums run in one order whatever the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "bf16.h"
#include "exponential.h"
#include "matrix.h"
#include "parallel.h"
#include "ranks.h"

using namespace thresher;

namespace {

constexpr int64_t CHUNK = 48;  // queries whose scores are in cache at a time
constexpr int64_t LINE = 64;   // bytes of a line of the cache

#define SIZES(FIELD)                                                                                \
    FIELD(int64_t, groups)                                                                          \
    FIELD(int64_t, n)                                                                               \
    FIELD(int64_t, m)                                                                               \
    FIELD(int64_t, d)                                                                               \
    FIELD(int64_t, dv)
struct Sizes {
    THRESHER_FIELDS(SIZES)
};

// Which queries meet which keys. A slot without a token holds the number of all tokens. Where causal, query i sees keys
// j <= i + shift.
#define PART(FIELD)                                                                                 \
    FIELD(const int64_t*, token_q)          /* [groups, tiles, tile] */                             \
    FIELD(const int64_t*, token_k)          /* [groups, clusters, cluster] */                       \
    FIELD(const int64_t*, tile_cluster)     /* cluster of each tile, [groups, tiles], or null */    \
    FIELD(const int64_t*, query_cluster)    /* cluster of each query, [rounds, groups, n] */        \
    FIELD(const int64_t*, key_cluster)      /* cluster of each key, [rounds, groups, m] */          \
    FIELD(int64_t, tiles)                   /* of all rounds */                                     \
    FIELD(int64_t, tile)                    /* queries of a tile */                                 \
    FIELD(int64_t, clusters)                /* of all rounds */                                     \
    FIELD(int64_t, cluster)                 /* keys of a cluster */                                 \
    FIELD(int64_t, rounds)                                                                          \
    FIELD(int64_t, causal)                                                                          \
    FIELD(int64_t, shift)                                                                           \
    FIELD(int64_t, times)                   /* how often each meeting counts */
struct Part {
    THRESHER_FIELDS(PART)
};

#define ATTEND_ARGUMENTS(FIELD)                                                                     \
    FIELD(Sizes, sizes)                                                                             \
    FIELD(Part, part)                                                                               \
    FIELD(const S*, queries)                /* [groups, n, d] */                                    \
    FIELD(const S*, keys)                   /* [groups, m, d] */                                    \
    FIELD(const S*, values)                 /* [groups, m, dv] */                                   \
    FIELD(T*, out)                          /* [groups, n, dv], merged with what is there */        \
    FIELD(T*, row_max)                      /* [groups, n] */                                       \
    FIELD(T*, row_sum)                      /* [groups, n] */                                       \
    FIELD(int64_t*, meetings)               /* pairs that meet, summed, [groups] */                 \
    FIELD(int64_t*, repeats)                /* those that met in an earlier round, [groups] */      \
    FIELD(int64_t, threads)
template <class S, class T = Number<S>>
struct AttendArguments {
    THRESHER_FIELDS(ATTEND_ARGUMENTS)
};

#define BACK_ARGUMENTS(FIELD)                                                                       \
    FIELD(Sizes, sizes)                                                                             \
    FIELD(Part, part)                                                                               \
    FIELD(const S*, queries)                                                                        \
    FIELD(const S*, keys)                                                                           \
    FIELD(const S*, values)                                                                         \
    FIELD(const T*, out)                                                                            \
    FIELD(const T*, row_max)                                                                        \
    FIELD(const T*, row_sum)                                                                        \
    FIELD(const T*, grad)                   /* of outputs */                                        \
    FIELD(T*, grad_queries)                 /* added up, as are the next two */                     \
    FIELD(T*, grad_keys)                                                                            \
    FIELD(T*, grad_values)                                                                          \
    FIELD(int64_t, threads)
template <class S, class T = Number<S>>
struct BackArguments {
    THRESHER_FIELDS(BACK_ARGUMENTS)
};

#define RANK_ARGUMENTS(FIELD)                                                                       \
    FIELD(const T*, hashes)                 /* [rows, n] */                                         \
    FIELD(int64_t*, ranks)                  /* [rows, n] */                                         \
    FIELD(int64_t, rows)                                                                            \
    FIELD(int64_t, n)                                                                               \
    FIELD(int64_t, threads)
template <class T>
struct RankArguments {
    THRESHER_FIELDS(RANK_ARGUMENTS)
};

// The tokens of a cluster or a tile.
struct Rows {
    std::vector<int64_t> tokens;
    int64_t size() const { return static_cast<int64_t>(tokens.size()); }

    void take(const int64_t* slots, int64_t number, int64_t none) {
        tokens.clear();
        for (int64_t i = 0; i < number; ++i)
            if (slots[i] < none) tokens.push_back(slots[i]);
    }
};

// Rows as numbers, or as factors, padded with zeros.
template <class E, class S>
void gather(const Rows& rows, const S* from, int64_t width, std::vector<E>& to) {
    constexpr bool pairs = std::is_same_v<E, Pair>;
    const int64_t number = pairs ? factors<S>(width) : width, wide = padded(number);
    if (static_cast<int64_t>(to.size()) < rows.size() * wide) to.resize(rows.size() * wide);
    for (int64_t i = 0; i < rows.size(); ++i) {
        const S* row = from + rows.tokens[i] * width;
        E* out = &to[i * wide];
        for (int64_t c = 0; c < number; ++c) {
            if constexpr (pairs)
                out[c] = factor(row, c, width);
            else
                out[c] = as_number(row[c]);
        }
        std::fill(out + number, out + wide, E{});
    }
}

// Prefetch rows that are read soon: they lie apart, and no processor foresees them. Always inlined, because GCC takes a
// function that only prefetches for one without effect, and drops the call.
template <class S>
__attribute__((always_inline)) inline void fetch(const Rows& rows, int64_t from, int64_t to, const S* x,
                                                 int64_t width) {
    for (int64_t i = from; i < std::min(to, rows.size()); ++i) {
        const char* row = reinterpret_cast<const char*>(x + rows.tokens[i] * width);
        for (int64_t byte = 0; byte < width * int64_t(sizeof(S)); byte += LINE) __builtin_prefetch(row + byte);
    }
}

// to[c, i] = x[i, c], rows of `to` padded with zeros.
template <class E>
void turn(const std::vector<E>& x, int64_t rows, int64_t width, std::vector<E>& to) {
    const int64_t wide = padded(rows);
    if (static_cast<int64_t>(to.size()) < width * wide) to.resize(width * wide);
    for (int64_t c = 0; c < width; c += 8) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t e = 0; e < 8; ++e) to[(c + e) * wide + i] = x[i * width + c + e];
        for (int64_t e = 0; e < 8; ++e) std::fill(&to[(c + e) * wide] + rows, &to[(c + e) * wide] + wide, E{});
    }
}

template <class T>
void add_rows(const Rows& rows, const std::vector<T>& from, int64_t width, T* to) {
    const int64_t wide = padded(width);
    for (int64_t i = 0; i < rows.size(); ++i)
        for (int64_t c = 0; c < width; ++c) to[rows.tokens[i] * width + c] += from[i * wide + c];
}

// A cluster at a time; a thread uses its room again for its next one.
template <class S>
class Cluster {
    using T = Number<S>;

  public:
    Cluster(const Sizes& sizes, const Part& part)
        : s(sizes), part(part), d(padded(s.d)), dv(padded(s.dv)), by_factors(padded(factors<S>(s.d))),
          scale(1 / std::sqrt(static_cast<T>(s.d))) {}

    void take(int64_t group, int64_t cluster) {
        g = group;
        round = cluster / (part.clusters / part.rounds);
        keys.take(part.token_k + (g * part.clusters + cluster) * part.cluster, part.cluster, s.m);
        width = padded(keys.size());
        first = last = cluster;
        if (part.tile_cluster) {
            const int64_t *of = part.tile_cluster + g * part.tiles, *end = of + part.tiles;
            first = std::lower_bound(of, end, cluster) - of;
            last = std::upper_bound(of, end, cluster) - of - 1;
        }
    }

    void attend(const AttendArguments<S>& a, int64_t& meetings, int64_t& repeats) {
        if (!keys.size()) return;
        const S *q = a.queries, *k = a.keys, *v = a.values;
        T* out = a.out;
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
                T maxima[CHUNK], totals[CHUNK];
                for (int64_t r = 0; r < number; ++r) soften(&weights[r * width], maxima[r], totals[r]);
                T* to = sums.data();
                const int64_t wide = dv;
                multiply(Left<T>{weights.data(), width, 1}, value.data(), dv, number, dv, keys.size(),
                         [=](int64_t r, int64_t c, Vector<T> x) { store(to + r * wide + c, x); });
                for (int64_t r = 0; r < number; ++r) {
                    const int64_t token = g * s.n + queries.tokens[i + r];
                    merge(out + token * s.dv, a.row_max[token], a.row_sum[token], &sums[r * dv], maxima[r], totals[r]);
                }
            }
            repeats += count_repeats();
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
                    T benefit = 0;
                    for (int64_t c = 0; c < s.dv; ++c) benefit += grad[token * s.dv + c] * out[token * s.dv + c];
                    const bool none = a.row_sum[token] == 0;  // it met nothing
                    const T most = none ? std::numeric_limits<T>::infinity() : a.row_max[token];
                    const T each = none ? T(0) : part.times / a.row_sum[token];
                    for (int64_t c = 0; c < width; c += Wide<T>::LANES) {
                        const Vector<T> weight = exponential(load(p + r * width + c) - most) * each;
                        store(p + r * width + c, weight);
                        store(t + r * width + c, scale * weight * (load(t + r * width + c) - benefit));
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
    int64_t g = 0, round = 0, width = 0, first = 0, last = 0;
    Rows keys, queries;
    std::vector<Factor<S>> key, turned_key, query;
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
            std::fill(&weights[r * width] + keys.size(), &weights[r * width] + width, none);
            meetings += keys.size();
            if (!part.causal) continue;
            for (int64_t j = 0; j < keys.size(); ++j)
                if (keys.tokens[j] > queries.tokens[i + r] + part.shift) {
                    weights[r * width + j] = none;
                    --meetings;
                }
        }
    }

    void soften(T* row, T& row_max, T& row_sum) const {
        Vector<T> best = load(row);
        for (int64_t c = Wide<T>::LANES; c < width; c += Wide<T>::LANES) {
            const Vector<T> x = load(row + c);
            best = x > best ? x : best;
        }
        row_max = largest<T>(best);
        if (row_max == -std::numeric_limits<T>::infinity()) {
            row_sum = 0;
            return;
        }
        Vector<T> part_sum{};
        for (int64_t c = 0; c < width; c += Wide<T>::LANES) {
            const Vector<T> x = exponential(load(row + c) - row_max);
            store(row + c, x);
            part_sum += x;
        }
        row_sum = total<T>(part_sum);
    }

    // Merge what a query met in this cluster, `fresh`, with what it met before.
    void merge(T* out, T& row_max, T& row_sum, const T* fresh, T fresh_max, T fresh_sum) const {
        if (fresh_sum == 0) return;
        if (row_sum == 0) {
            for (int64_t c = 0; c < s.dv; ++c) out[c] = fresh[c] / fresh_sum;
            row_max = fresh_max;
            row_sum = part.times * fresh_sum;
            return;
        }
        const bool larger = fresh_max > row_max;
        const T lower = std::exp(larger ? row_max - fresh_max : fresh_max - row_max);
        const T before = row_sum * (larger ? lower : 1), times = part.times * (larger ? 1 : lower);
        row_max = larger ? fresh_max : row_max;
        row_sum = before + times * fresh_sum;
        const T old_share = before / row_sum, share = times / row_sum;
        for (int64_t c = 0; c < s.dv; ++c) out[c] = out[c] * old_share + fresh[c] * share;
    }

    void add(Left<T> left, const T* b, int64_t columns, int64_t rows, int64_t inner, T* into) const {
        multiply(left, b, columns, rows, columns, inner, [=](int64_t i, int64_t c, Vector<T> x) {
            store(into + i * columns + c, load(into + i * columns + c) + x);
        });
    }

    // Count the pairs that met in an earlier round.
    int64_t count_repeats() const {
        int64_t found = 0;
        if (!round) return found;
        std::vector<int32_t> of(round * keys.size());
        std::vector<int32_t> seen(keys.size());
        for (int64_t r = 0; r < round; ++r)
            for (int64_t j = 0; j < keys.size(); ++j)
                of[r * keys.size() + j] =
                    static_cast<int32_t>(part.key_cluster[(r * s.groups + g) * s.m + keys.tokens[j]]);
        for (const int64_t token : queries.tokens) {
            std::fill(seen.begin(), seen.end(), 0);
            for (int64_t r = 0; r < round; ++r) {
                const int32_t mine = static_cast<int32_t>(part.query_cluster[(r * s.groups + g) * s.n + token]);
                const int32_t* theirs = &of[r * keys.size()];
                for (int64_t j = 0; j < keys.size(); ++j) seen[j] |= theirs[j] == mine;
            }
            int32_t number = 0;
            for (int64_t j = 0; j < keys.size(); ++j) number += seen[j];
            found += number;
        }
        return found;
    }
};

template <class S>
void attend(const AttendArguments<S> a) {
    const Sizes& sizes = a.sizes;
    const Part& part = a.part;
    const int64_t each = part.clusters / part.rounds;
    const auto make = [&] { return Cluster<S>(sizes, part); };
    std::vector<int64_t> counts(2 * sizes.groups * part.clusters, 0);
    for (int64_t round = 0; round < part.rounds; ++round)
        parallel_for(sizes.groups * each, a.threads, make, [&](int64_t task, Cluster<S>& of_thread) {
            const int64_t g = task / each, cluster = round * each + task % each;
            int64_t* count = &counts[2 * (g * part.clusters + cluster)];
            of_thread.take(g, cluster);
            of_thread.attend(a, count[0], count[1]);
        });
    for (int64_t i = 0; i < sizes.groups * part.clusters; ++i) {
        a.meetings[i / part.clusters] += counts[2 * i];
        a.repeats[i / part.clusters] += counts[2 * i + 1];
    }
}

template <class S>
void back(const BackArguments<S> a) {
    const int64_t each = a.part.clusters / a.part.rounds;
    const auto make = [&] { return Cluster<S>(a.sizes, a.part); };
    for (int64_t round = 0; round < a.part.rounds; ++round)
        parallel_for(a.sizes.groups * each, a.threads, make, [&](int64_t task, Cluster<S>& of_thread) {
            of_thread.take(task / each, round * each + task % each);
            of_thread.back(a);
        });
}

template <class T>
void rank(const RankArguments<T> a) {
    parallel_for(a.rows, a.threads, [] { return Ranks<T>(); },
                 [&](int64_t row, Ranks<T>& ranks) { ranks.take(a.hashes + row * a.n, a.n, a.ranks + row * a.n); });
}

}  // namespace

#define EXPORT_FOR(S, NAME)                             \
    THRESHER_EXPORT(attend, AttendArguments, S, NAME)   \
    THRESHER_EXPORT(back, BackArguments, S, NAME)

EXPORT_FOR(float, float32)
EXPORT_FOR(double, float64)
EXPORT_FOR(Bf16, bfloat16)

THRESHER_EXPORT(rank, RankArguments, float, float32)
THRESHER_EXPORT(rank, RankArguments, double, float64)
