// Softmax attention of tiles of queries inside clusters of keys, merged, and its gradients; ranks of hash values, which
// clusters are cut by.
//
// A query's top is the best of its scores, its mass the sum of exp(score - top): their log-sum-exp as one number would
// lose the mass to rounding where scores are huge.
//
// Inside a round a query is in one tile and a key in one cluster, so clusters are independent tasks; rounds follow one
// another. Sums run in one order whatever the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "bf16.h"
#include "exponential.h"
#include "matrix.h"
#include "parallel.h"
#include "ranks.h"

using namespace thresher;

namespace {

constexpr int64_t CHUNK = 48;  // queries whose scores are in cache at a time
constexpr int64_t LINE = 64;   // bytes of a line of the cache

// Which queries meet which keys; a token that is not there has the number of all tokens.
struct Part {
    const int64_t *token_q, *token_k, *of_tile, *of_query, *of_key;
    int64_t tiles, tile, clusters, cluster, rounds, causal, shift, times;
};

struct Sizes {
    int64_t groups, n, m, d, dv;
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

// Ask for rows that are read soon, while something else is computed: they lie apart, and no processor foresees them.
// Inlined, for GCC takes a function that only asks for one without effect, and drops the call.
template <class S>
__attribute__((always_inline)) inline void fetch(const Rows& rows, int64_t from, int64_t to, const S* x, int64_t width) {
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
        if (part.of_tile) {
            const int64_t *of = part.of_tile + g * part.tiles, *end = of + part.tiles;
            first = std::lower_bound(of, end, cluster) - of;
            last = std::upper_bound(of, end, cluster) - of - 1;
        }
    }

    void attend(const S* q, const S* k, const S* v, T* out, T* top, T* mass, int64_t& met, int64_t& again) {
        if (!keys.size()) return;
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
                score(i, number, met);
                T tops[CHUNK], totals[CHUNK];
                for (int64_t r = 0; r < number; ++r) soften(&weights[r * width], tops[r], totals[r]);
                T* to = sums.data();
                const int64_t wide = dv;
                multiply(Left<T>{weights.data(), width, 1}, value.data(), dv, number, dv, keys.size(),
                         [=](int64_t r, int64_t c, Vector<T> x) { store(to + r * wide + c, x); });
                for (int64_t r = 0; r < number; ++r) {
                    const int64_t token = g * s.n + queries.tokens[i + r];
                    merge(out + token * s.dv, top[token], mass[token], &sums[r * dv], tops[r], totals[r]);
                }
            }
            again += count_again();
        }
    }

    void back(const T* grad, const S* q, const S* k, const S* v, const T* out, const T* top, const T* mass, T* into_q,
              T* into_k, T* into_v) {
        if (!keys.size()) return;
        gather(keys, k + g * s.m * s.d, s.d, key);
        gather(keys, v + g * s.m * s.dv, s.dv, value);
        const std::vector<T>& key_numbers = numbers(keys, k + g * s.m * s.d, s.d, key, wide_key);
        turn(key, keys.size(), by_factors, turned_key);
        turn(value, keys.size(), dv, turned_value);
        weights.resize(CHUNK * width);
        through.resize(CHUNK * width);
        sum_k.assign(keys.size() * d, T(0));
        sum_v.assign(keys.size() * dv, T(0));
        int64_t met = 0;
        for (int64_t tile = first; tile <= last; ++tile) {
            queries.take(part.token_q + (g * part.tiles + tile) * part.tile, part.tile, s.n);
            gather(queries, q + g * s.n * s.d, s.d, query);
            const std::vector<T>& query_numbers = numbers(queries, q + g * s.n * s.d, s.d, query, wide_query);
            gather(queries, grad + g * s.n * s.dv, s.dv, grads);
            sums.resize(queries.size() * d);
            for (int64_t i = 0; i < queries.size(); i += CHUNK) {
                const int64_t number = std::min(CHUNK, queries.size() - i);
                score(i, number, met);
                T *p = weights.data(), *t = through.data();
                const int64_t wide = width;
                multiply(Left<T>{&grads[i * dv], dv, 1}, turned_value.data(), width, number, width, dv,
                         [=](int64_t r, int64_t c, Vector<T> x) { store(t + r * wide + c, x); });
                for (int64_t r = 0; r < number; ++r) {
                    const int64_t token = g * s.n + queries.tokens[i + r];
                    T benefit = 0;
                    for (int64_t c = 0; c < s.dv; ++c) benefit += grad[token * s.dv + c] * out[token * s.dv + c];
                    const bool none = mass[token] == 0;  // it met nothing
                    const T most = none ? std::numeric_limits<T>::infinity() : top[token];
                    const T each = none ? T(0) : part.times / mass[token];
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
            add_rows(queries, sums, s.d, into_q + g * s.n * s.d);
        }
        add_rows(keys, sum_k, s.d, into_k + g * s.m * s.d);
        add_rows(keys, sum_v, s.dv, into_v + g * s.m * s.dv);
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
    void score(int64_t i, int64_t number, int64_t& met) {
        const T none = -std::numeric_limits<T>::infinity();
        T* to = weights.data();
        const int64_t wide = width;
        const T times = scale;
        multiply(Left<Factor<S>>{&query[i * by_factors], by_factors, 1}, turned_key.data(), width, number, width,
                 factors<S>(s.d), [=](int64_t r, int64_t c, Vector<T> x) { store(to + r * wide + c, x * times); });
        for (int64_t r = 0; r < number; ++r) {
            std::fill(&weights[r * width] + keys.size(), &weights[r * width] + width, none);
            met += keys.size();
            if (!part.causal) continue;
            for (int64_t j = 0; j < keys.size(); ++j)
                if (keys.tokens[j] > queries.tokens[i + r] + part.shift) {
                    weights[r * width + j] = none;
                    --met;
                }
        }
    }

    void soften(T* row, T& top, T& sum) const {
        Vector<T> best = load(row);
        for (int64_t c = Wide<T>::LANES; c < width; c += Wide<T>::LANES) {
            const Vector<T> x = load(row + c);
            best = x > best ? x : best;
        }
        top = largest<T>(best);
        if (top == -std::numeric_limits<T>::infinity()) {
            sum = 0;
            return;
        }
        Vector<T> part_sum{};
        for (int64_t c = 0; c < width; c += Wide<T>::LANES) {
            const Vector<T> x = exponential(load(row + c) - top);
            store(row + c, x);
            part_sum += x;
        }
        sum = total<T>(part_sum);
    }

    void merge(T* out, T& top, T& mass, const T* fresh, T of_fresh, T sum) const {
        if (sum == 0) return;
        if (mass == 0) {
            for (int64_t c = 0; c < s.dv; ++c) out[c] = fresh[c] / sum;
            top = of_fresh;
            mass = part.times * sum;
            return;
        }
        const bool better = of_fresh > top;
        const T lower = std::exp(better ? top - of_fresh : of_fresh - top);
        const T before = mass * (better ? lower : 1), times = part.times * (better ? 1 : lower);
        top = better ? of_fresh : top;
        mass = before + times * sum;
        const T old_share = before / mass, share = times / mass;
        for (int64_t c = 0; c < s.dv; ++c) out[c] = out[c] * old_share + fresh[c] * share;
    }

    void add(Left<T> left, const T* b, int64_t columns, int64_t rows, int64_t inner, T* into) const {
        multiply(left, b, columns, rows, columns, inner, [=](int64_t i, int64_t c, Vector<T> x) {
            store(into + i * columns + c, load(into + i * columns + c) + x);
        });
    }

    // Count the pairs that met in an earlier round.
    int64_t count_again() const {
        int64_t found = 0;
        if (!round) return found;
        std::vector<int32_t> of(round * keys.size());
        std::vector<int32_t> seen(keys.size());
        for (int64_t r = 0; r < round; ++r)
            for (int64_t j = 0; j < keys.size(); ++j)
                of[r * keys.size() + j] = static_cast<int32_t>(part.of_key[(r * s.groups + g) * s.m + keys.tokens[j]]);
        for (const int64_t token : queries.tokens) {
            std::fill(seen.begin(), seen.end(), 0);
            for (int64_t r = 0; r < round; ++r) {
                const int32_t mine = static_cast<int32_t>(part.of_query[(r * s.groups + g) * s.n + token]);
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

template <class S, class T = Number<S>>
void attend(const S* q, const S* k, const S* v, T* out, T* top, T* mass, int64_t* met, int64_t* again, Sizes sizes,
            Part part, int64_t threads) {
    const int64_t each = part.clusters / part.rounds;
    const auto make = [&] { return Cluster<S>(sizes, part); };
    std::vector<int64_t> counts(2 * sizes.groups * part.clusters, 0);
    for (int64_t round = 0; round < part.rounds; ++round)
        parallel_for(sizes.groups * each, threads, make, [&](int64_t task, Cluster<S>& of_thread) {
            const int64_t g = task / each, cluster = round * each + task % each;
            int64_t* count = &counts[2 * (g * part.clusters + cluster)];
            of_thread.take(g, cluster);
            of_thread.attend(q, k, v, out, top, mass, count[0], count[1]);
        });
    for (int64_t i = 0; i < sizes.groups * part.clusters; ++i) {
        met[i / part.clusters] += counts[2 * i];
        again[i / part.clusters] += counts[2 * i + 1];
    }
}

template <class S, class T = Number<S>>
void back(const T* grad, const S* q, const S* k, const S* v, const T* out, const T* top, const T* mass, T* into_q,
          T* into_k, T* into_v, Sizes sizes, Part part, int64_t threads) {
    const int64_t each = part.clusters / part.rounds;
    const auto make = [&] { return Cluster<S>(sizes, part); };
    for (int64_t round = 0; round < part.rounds; ++round)
        parallel_for(sizes.groups * each, threads, make, [&](int64_t task, Cluster<S>& of_thread) {
            of_thread.take(task / each, round * each + task % each);
            of_thread.back(grad, q, k, v, out, top, mass, into_q, into_k, into_v);
        });
}

template <class T>
void rank(const T* x, int64_t rows, int64_t n, int64_t* to, int64_t threads) {
    parallel_for(rows, threads, [] { return Ranks<T>(); },
                 [&](int64_t row, Ranks<T>& ranks) { ranks.take(x + row * n, n, to + row * n); });
}

}  // namespace

#define PART                                                                                                           \
    const int64_t *token_q, const int64_t *token_k, const int64_t *of_tile, const int64_t *of_query,                   \
        const int64_t *of_key, int64_t groups, int64_t n, int64_t m, int64_t d, int64_t dv, int64_t tiles,             \
        int64_t tile, int64_t clusters, int64_t cluster, int64_t rounds, int64_t causal, int64_t shift, int64_t times, \
        int64_t threads
#define GIVEN                                                                                                          \
    Sizes{groups, n, m, d, dv},                                                                                        \
        Part{token_q, token_k, of_tile, of_query, of_key, tiles, tile, clusters, cluster, rounds, causal, shift, times}, \
        threads

#define FOR_TYPE(S, T, NAME)                                                                                           \
    extern "C" void attend_##NAME(const S* q, const S* k, const S* v, T* out, T* top, T* mass, int64_t* met,           \
                                  int64_t* again, PART) {                                                              \
        attend(q, k, v, out, top, mass, met, again, GIVEN);                                                            \
    }                                                                                                                  \
    extern "C" void back_##NAME(const T* grad, const S* q, const S* k, const S* v, const T* out, const T* top,         \
                                const T* mass, T* into_q, T* into_k, T* into_v, PART) {                                \
        back(grad, q, k, v, out, top, mass, into_q, into_k, into_v, GIVEN);                                            \
    }

FOR_TYPE(float, float, float32)
FOR_TYPE(double, double, float64)
FOR_TYPE(Bf16, float, bfloat16)

#define FOR_HASHES(T, NAME)                                                                                            \
    extern "C" void rank_##NAME(const T* x, int64_t rows, int64_t n, int64_t* to, int64_t threads) {                   \
        rank(x, rows, n, to, threads);                                                                                 \
    }

FOR_HASHES(float, float32)
FOR_HASHES(double, float64)
