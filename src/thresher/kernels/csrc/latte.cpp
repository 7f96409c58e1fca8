// LATTE: scores estimated from integer codes, a threshold below the best of each row, attention over what is left.
//
// A task takes some queries. It first lists the keys that each of them needs, then goes through the keys block by block,
// so that a block stays in cache while all its queries look at it: once for scores, once more for what follows from
// them. Backward estimates anew instead of keeping lists: memory is linear in the number of tokens. Work is divided by
// sizes only, never by the number of threads.

#include <memory>

#include "buffer.h"
#include "gathered.h"
#include "latte_decode.h"
#include "latte_encode.h"
#include "latte_queries.h"
#include "latte_select.h"
#include "matrix.h"
#include "parallel.h"
#include "softmax.h"

using namespace thresher;

namespace {

constexpr int64_t QUERIES = 128;         // of a task
constexpr int64_t CACHE = 128 * 1024;    // bytes of keys, or of values, that a task looks at again and again
constexpr int64_t SPLITS = 16;           // tasks that backward makes at least, if there are queries enough
constexpr double MAX_EXCESS = 30;        // nats by which a dropped key may outweigh the best kept one

template <class S, class T>
int64_t block_of_keys(const Call<T>& s) {
    const int64_t bytes = std::max<int64_t>(std::max(s.d, s.dv) * int64_t(sizeof(S)), 1);
    return std::max<int64_t>(CACHE / bytes / KEYS, 1) * KEYS;
}

// How far from the threshold the gate has a gradient; inside: on the kept side alone. 0 is nowhere.
template <class T>
struct Band {
    T width = 0;
    bool inside = false;
};

// Keys that the queries of a task need, ascending; those that are dropped, but near the threshold, as ~key.
template <class T>
struct Lists {
    const int64_t block, blocks;  // of keys: their size and number
    Buffer<int32_t> key;          // with room to grow behind those of the last query
    Buffer<T> slope;              // of the gate, if asked for
    std::vector<int64_t> start;   // of the keys of each query in each block, and the end of those in its last
    std::vector<int64_t> kept;
    std::vector<T> unit;
    Buffer<T> score, through;     // room for what is calculated of each listed pair

    Lists(const Call<T>& s, int64_t block) : block(block), blocks((s.m + block - 1) / block) {}
    void clear() {
        unit.clear();
        kept.clear();
        start.clear();
    }
    void make_room(Buffer<T>& x) const {
        if (int64_t(x.size()) < total()) x.resize(2 * total());
    }
    int64_t queries() const { return kept.size(); }
    int64_t begin(int64_t i) const { return start[i * (blocks + 1)]; }
    int64_t end(int64_t i) const { return start[i * (blocks + 1) + blocks]; }
    int64_t total() const { return start.empty() ? 0 : start.back(); }
    int64_t place(int64_t x) const { return key[x] ^ (key[x] >> 31); }

    // Call look(i, begin, end) for the keys of each query in each block.
    template <class Look>
    void by_blocks(Look&& look) const {
        for (int64_t part = 0; part < blocks; ++part)
            for (int64_t i = 0; i < queries(); ++i) {
                const int64_t* at = &start[i * (blocks + 1) + part];
                if (at[0] < at[1]) look(i, at[0], at[1]);
            }
    }
};

// Give the listed keys [begin, end) of a row their slopes; mark and count those that are kept.
template <class T, class E>
inline int64_t slope_row(const Row<T, E>& row, E top, E cut, T theta, Band<T> band, int64_t always, int64_t begin,
                         int64_t end, Buffer<E>& estimate, Lists<T>& lists) {
    const T a_step = row.step_of_difference(), narrower = 1 / band.width, steepest = band.inside ? T(1.5) : T(0.75);
    const int64_t number = end - begin;
    if (int64_t(estimate.size()) < number) estimate.resize(2 * number);
    int32_t* key = lists.key.data() + begin;
    T* slope = lists.slope.data() + begin;
    E* e = estimate.data();
    for (int64_t x = 0; x < number; ++x) e[x] = row.estimate[key[x]];
    int64_t first = 0, kept = 0;
    for (; first < number && key[first] < always; ++first) slope[first] = T(0);
    for (int64_t x = first; x < number; ++x) {
        const T u = (theta - T(top - e[x]) * a_step) * narrower, steep = steepest * (1 - u * u) * narrower;
        slope[x] = steep > 0 ? steep : T(0);
    }
    for (int64_t x = first; x < number; ++x) kept += e[x] >= cut;
    for (int64_t x = first; x < number; ++x) key[x] = e[x] >= cut ? key[x] : ~key[x];
    return first + kept;
}

template <class T, class E>
inline void list_row(const Call<T>& s, int64_t g, const std::vector<Bits>& seen, const Row<T, E>& row, E top,
                     int64_t stop, Band<T> band, Buffer<E>& estimate, Lists<T>& lists) {
    const T theta = s.theta[g];
    const bool banded = band.width > 0 && !row.broken && std::isfinite(theta);
    const E cut = row.broken ? top : row.cut(top, theta);
    const E low = banded && !band.inside ? row.cut(top, theta + band.width) : cut;
    const int64_t begin = lists.total();
    const size_t room = begin + stop + KEYS;
    if (lists.key.size() < room) lists.key.resize(2 * room);
    int32_t* to = lists.key.data() + begin;
    for (int64_t part = 0; part < lists.blocks; ++part) {
        lists.start.push_back(to - lists.key.data());
        const int64_t end = std::min(stop, (part + 1) * lists.block);
        for (int64_t j = part * lists.block; j < end; j += KEYS) {
            const Bits within = stop - j < KEYS ? (Bits(1) << (stop - j)) - 1 : ~Bits(0);
            const int64_t left = s.always - j;
            const Bits always = left <= 0 ? 0 : left < KEYS ? (Bits(1) << left) - 1 : ~Bits(0);
            to = write_places(seen[j / KEYS] & within & (always | (row.broken ? 0 : reach(row.estimate + j, low))), j, to);
        }
    }
    const int64_t end = to - lists.key.data();
    if (band.width > 0 && lists.slope.size() < lists.key.size()) lists.slope.resize(lists.key.size());
    if (band.width > 0 && !banded) std::fill(lists.slope.begin() + begin, lists.slope.begin() + end, T(0));
    lists.kept.push_back(banded ? slope_row(row, top, cut, theta, band, s.always, begin, end, estimate, lists)
                                : end - begin);
    lists.start.push_back(end);
    lists.unit.push_back(row.unit);
}

template <bool NARROW, class E, class T>
void list_rows(const Call<T>& s, int64_t g, const Packed<T, NARROW>& keys, const Sums<T>& sums, int64_t first,
               int64_t last, Band<T> band, Lists<T>& lists) {
    lists.clear();
    Buffer<E> estimate;
    judge_rows<NARROW, E>(s, g, keys, sums, first, last, [&](int64_t i, const Row<T, E>& row, E top, int64_t stop) {
        const bool shown = !s.shown_q || s.shown_q[g * s.n + i];
        list_row(s, g, keys.seen, row, top, shown ? stop : 0, band, estimate, lists);
    });
}

template <class T, bool NARROW>
struct Prepared {
    Packed<T, NARROW> keys;
    std::vector<Sums<T>> sums;  // of the keys that lie before those of each task

    Prepared(const Call<T>& s, int64_t g, int64_t queries) : keys(s, g) {
        Sums<T> sum(s, g);
        for (int64_t i = 0; i < s.n; i += queries) {
            if (s.spread) sum.advance(s.end(i));
            sums.push_back(sum);
        }
    }
};

template <class T, bool NARROW>
std::vector<std::unique_ptr<Prepared<T, NARROW>>> prepare(const Call<T>& s, int64_t threads) {
    std::vector<std::unique_ptr<Prepared<T, NARROW>>> all(s.groups);
    parallel_for(s.groups, threads, [&](int64_t g) { all[g] = std::make_unique<Prepared<T, NARROW>>(s, g, QUERIES); });
    return all;
}

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

// Turn the scores of a row's pairs, and the products of its gradient with values, into what each pair adds to its value
// and to its score, and slopes into what it adds to the threshold.
template <class T>
void shares_of(const int32_t* key, int64_t number, T top, T mass, T constant, T worth, T* score, T* through,
               T* slope) {
    const Vector<T> excess = Vector<T>{} + T(MAX_EXCESS);
    const T one = mass == 0 ? T(0) : 1 / mass;  // a row that keeps nothing has no gradient
    transform(score, number, T(0), [&](Vector<T> x) {
        const Vector<T> over = x - (mass == 0 ? T(0) : top);
        return exponential(over > excess ? excess : over) * one;
    });
    if (slope)
        for (int64_t x = 0; x < number; ++x) slope[x] *= score[x] * (through[x] - constant);
    for (int64_t x = 0; x < number; ++x) {
        const T benefit = key[x] < 0 ? T(0) : score[x] * (through[x] - constant);
        through[x] = benefit + (slope ? worth * slope[x] : T(0));
        score[x] = key[x] < 0 ? T(0) : score[x];
    }
}

// A task's lists and queries; a thread uses them again for its next task.
template <class S, class T = Number<S>>
struct Task {
    Lists<T> lists;
    Queries<S> queries;

    explicit Task(const Call<T>& s) : lists(s, block_of_keys<S>(s)) {}
};

template <bool NARROW, class E, class S, class T>
void attend(const Call<T>& s, const S* q, const S* k, const S* v, T scale, T* out, int32_t* kept, T* top, T* mass,
            int64_t threads) {
    const auto prepared = prepare<T, NARROW>(s, threads);
    const int64_t tasks = (s.n + QUERIES - 1) / QUERIES;
    parallel_for(s.groups * tasks, threads, [&] { return Task<S>(s); }, [&](int64_t task, Task<S>& of_thread) {
        Lists<T>& lists = of_thread.lists;
        Queries<S>& queries = of_thread.queries;
        const int64_t g = task / tasks, part = task % tasks, first = part * QUERIES, row = g * s.n + first;
        list_rows<NARROW, E>(s, g, prepared[g]->keys, prepared[g]->sums[part], first, std::min(s.n, first + QUERIES),
                             Band<T>{}, lists);
        const S *keys = k + g * s.m * s.d, *values = v + g * s.m * s.dv;
        queries.take(q + row * s.d, lists.queries() * s.d, scale);
        lists.make_room(lists.score);
        Buffer<T>& weight = lists.score;
        lists.by_blocks([&](int64_t i, int64_t begin, int64_t end) {
            const auto at = [key = &lists.key[begin]](int64_t x) { return int64_t(key[x]); };
            queries.scores(i * s.d, keys, s.d, end - begin, at, &weight[begin]);
        });
        for (int64_t i = 0; i < lists.queries(); ++i) {
            const int64_t begin = lists.begin(i), number = lists.end(i) - begin;
            kept[row + i] = int32_t(lists.kept[i]);
            top[row + i] = -std::numeric_limits<T>::infinity();
            mass[row + i] = 0;
            std::fill_n(out + (row + i) * s.dv, s.dv, T(0));
            if (number) soften(&weight[begin], number, top[row + i], mass[row + i]);
        }
        lists.by_blocks([&](int64_t i, int64_t begin, int64_t end) {
            const auto at = [key = &lists.key[begin]](int64_t x) { return int64_t(key[x]); };
            add_rows(out + (row + i) * s.dv, &weight[begin], values, s.dv, end - begin, at);
        });
    });
}

// What the gradients of the outputs, and of how much is kept, are to queries, keys, values and thresholds.
template <bool NARROW, class E, class S, class T>
void back(const Call<T>& s, const T* grad, const T* grad_kept, const S* q, const S* k, const S* v, T scale, const T* out,
          const T* top, const T* mass, Band<T> band, bool into_scores, T* into_q, T* into_k, T* into_v, T* into_theta,
          int64_t threads) {
    const auto prepared = prepare<T, NARROW>(s, threads);
    const int64_t blocks = (s.n + QUERIES - 1) / QUERIES;
    const int64_t splits = std::max<int64_t>(std::min((SPLITS + s.groups - 1) / std::max<int64_t>(s.groups, 1), blocks), 1);
    const int64_t size_k = s.m * s.d, size_v = s.m * s.dv;
    std::vector<Buffer<T>> parts(s.groups * splits);  // of keys and of values; the first of a group adds to the results
    std::vector<double> parts_theta(s.groups * splits, 0.0);
    parallel_for(s.groups * splits, threads, [&] { return Task<S>(s); }, [&](int64_t task, Task<S>& of_thread) {
        Lists<T>& lists = of_thread.lists;
        Queries<S>& queries = of_thread.queries;
        const int64_t g = task / splits;
        const S *keys = k + g * size_k, *values = v + g * size_v;
        const bool own = task % splits != 0;
        if (own) parts[task].resize(size_k + size_v);
        T *to_k = own ? parts[task].data() : into_k + g * size_k, *to_v = own ? to_k + size_k : into_v + g * size_v;
        if (!own) {
            std::fill_n(to_k, size_k, T(0));
            std::fill_n(to_v, size_v, T(0));
        }
        Buffer<T>&score = lists.score, &through = lists.through;
        // Blocks are dealt out in turn: in causal attention the last ones are the longest.
        for (int64_t part = task % splits; part < blocks; part += splits) {
            const int64_t first = part * QUERIES, row = g * s.n + first;
            list_rows<NARROW, E>(s, g, prepared[g]->keys, prepared[g]->sums[part], first,
                                 std::min(s.n, first + QUERIES), band, lists);
            const auto from = [&](int64_t begin) { return [&, begin](int64_t x) { return lists.place(begin + x); }; };
            lists.make_room(score);
            lists.make_room(through);
            T* to_q = into_q + row * s.d;
            const int64_t size_q = lists.queries() * s.d;
            queries.take(q + row * s.d, size_q, scale);
            std::fill_n(to_q, size_q, T(0));
            lists.by_blocks([&](int64_t i, int64_t begin, int64_t end) {
                queries.scores(i * s.d, keys, s.d, end - begin, from(begin), &score[begin]);
            });
            lists.by_blocks([&](int64_t i, int64_t begin, int64_t end) {
                dots(grad + (row + i) * s.dv, values, s.dv, end - begin, from(begin), &through[begin]);
            });
            for (int64_t i = 0; i < lists.queries(); ++i) {
                const int64_t begin = lists.begin(i), number = lists.end(i) - begin;
                T* slope = band.width > 0 ? lists.slope.data() + begin : nullptr;
                if (slope) parts_theta[task] += double(grad_kept[g]) * sum_of(slope, number);
                const T total = mass[row + i], worth = into_scores ? 1 / std::max(lists.unit[i], T(1)) : T(0);
                const T constant = dot(grad + (row + i) * s.dv, out + (row + i) * s.dv, s.dv);
                shares_of(lists.key.data() + begin, number, top[row + i], total, constant, worth, score.data() + begin,
                          through.data() + begin, slope);
                if (slope) parts_theta[task] += sum_of(slope, number);
            }
            lists.by_blocks([&](int64_t i, int64_t begin, int64_t end) {
                add_rows(to_q + i * s.d, &through[begin], keys, s.d, end - begin, from(begin));
                add_to_rows(to_k, &through[begin], &queries.scaled[i * s.d], s.d, end - begin, from(begin));
            });
            for (int64_t x = 0; x < size_q; ++x) to_q[x] *= scale;
            lists.by_blocks([&](int64_t i, int64_t begin, int64_t end) {
                add_to_rows(to_v, &score[begin], grad + (row + i) * s.dv, s.dv, end - begin, from(begin));
            });
        }
    });
    parallel_for(s.groups, threads, [&](int64_t g) {
        for (int64_t split = 1; split < splits; ++split) {
            const T* part = parts[g * splits + split].data();
            for (int64_t x = 0; x < size_k; ++x) into_k[g * size_k + x] += part[x];
            for (int64_t x = 0; x < size_v; ++x) into_v[g * size_v + x] += part[size_k + x];
        }
        double sum = 0;
        for (int64_t split = 0; split < splits; ++split) sum += parts_theta[g * splits + split];
        into_theta[g] = T(sum);
    });
}

// Call run with how products are computed, and what estimates are.
template <class T, class Run>
void with_types(const Call<T>& s, Run&& run) {
    const bool small = narrow(s.step, s.d);
    if (s.each_key)
        small ? run(std::true_type{}, T{}) : run(std::false_type{}, T{});
    else
        small ? run(std::true_type{}, int16_t{}) : run(std::false_type{}, int32_t{});
}

}  // namespace

#define CALL(T)                                                                                                        \
    const int8_t *q_codes, const int8_t *k_codes, const T *q_unit, const T *k_unit, const uint8_t *shown_q,            \
        const uint8_t *shown_k, const T *theta, int64_t groups, int64_t n, int64_t m, int64_t d, int64_t dv,           \
        int64_t causal, int64_t shift, int64_t spread, int64_t always, int64_t each_key, double step
#define GIVEN {q_codes, k_codes, q_unit, k_unit, shown_q, shown_k, theta, groups, n, m, d, dv, causal, shift, spread, \
               always, each_key, step}
#define FOR_TYPE(S, T, NAME)                                                                                           \
    extern "C" void encode_##NAME(const S* x, int64_t groups, int64_t n, int64_t d, int64_t each, int64_t bits,        \
                                  int64_t truncate, int8_t* codes, T* unit, int64_t threads) {                         \
        encode(x, groups, n, d, each, bits, truncate, codes, unit, threads);                                           \
    }                                                                                                                  \
    extern "C" void attend_##NAME(CALL(T), const S* q, const S* k, const S* v, double scale, T* out, int32_t* kept,    \
                                  T* top, T* mass, int64_t threads) {                                                  \
        const Call<T> s GIVEN;                                                                                         \
        with_types(s, [&](auto small, auto e) {                                                                        \
            attend<decltype(small)::value, decltype(e)>(s, q, k, v, T(scale), out, kept, top, mass, threads);          \
        });                                                                                                            \
    }                                                                                                                  \
    extern "C" void back_##NAME(CALL(T), const T* grad, const T* grad_kept, const S* q, const S* k, const S* v,        \
                                double scale, const T* out, const T* top, const T* mass, double width, int64_t inside, \
                                int64_t into_scores, T* into_q, T* into_k, T* into_v, T* into_theta, int64_t threads) {\
        const Call<T> s GIVEN;                                                                                         \
        with_types(s, [&](auto small, auto e) {                                                                        \
            back<decltype(small)::value, decltype(e)>(s, grad, grad_kept, q, k, v, T(scale), out, top, mass,           \
                                                      Band<T>{T(width), inside != 0}, into_scores, into_q, into_k,     \
                                                      into_v, into_theta, threads);                                    \
        });                                                                                                            \
    }                                                                                                                  \
    extern "C" void decode_##NAME(const int8_t* q_codes, const int8_t* k_codes, const T* q_unit, const T* k_unit,      \
                                  const uint8_t* shown_k, const T* theta, int64_t groups, int64_t rows, int64_t m,     \
                                  int64_t d, int64_t dv, int64_t spread, int64_t always, double step, const S* q,      \
                                  const S* k, const S* v, double scale, T* out, int32_t* kept, int64_t threads) {      \
        const Decoded<T> s{q_codes, k_codes, q_unit, k_unit, shown_k, theta, groups, rows, m, d, dv, spread, always,   \
                           step};                                                                                      \
        decode(s, q, k, v, T(scale), out, kept, threads);                                                              \
    }

FOR_TYPE(float, float, float32)
FOR_TYPE(double, double, float64)
FOR_TYPE(Bf16, float, bfloat16)
