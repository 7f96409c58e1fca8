// LATTE: estimate scores from integer codes, keep the keys within a threshold of each row's best, attend to them.
//
// A task takes a few queries. It lists the keys that each query keeps, then goes through the keys block by block, once
// for scores and once for outputs, so that a block stays in cache while all queries read it. Backward estimates again
// instead of storing lists, so that memory is linear in the number of tokens. Only sizes divide the work, not the
// number of threads, so that results do not depend on it.

#include <memory>

#include "buffer.h"
#include "estimates.h"
#include "gathered.h"
#include "latte_decode.h"
#include "latte_encode.h"
#include "latte_queries.h"
#include "matrix.h"
#include "parallel.h"
#include "shares.h"
#include "softmax.h"
#include "splits.h"
#include "tail.h"

using namespace thresher;

namespace {

constexpr int64_t QUERIES = 128;         // of a task
constexpr int64_t CACHE = 128 * 1024;    // bytes of the keys, or values, that all queries of a task read in turn

template <class S, class T>
int64_t block_of_keys(const Gate<T>& gate) {
    const int64_t bytes = std::max<int64_t>(std::max(gate.d, gate.dv) * int64_t(sizeof(S)), 1);
    return std::max<int64_t>(CACHE / bytes / KEYS, 1) * KEYS;
}

// How far from the threshold the gate has a gradient, 0 without one; `inside`: on the kept side only.
template <class T>
struct Band {
    T width = 0;
    bool inside = false;
};

// The keys that the queries of a task need, ascending; dropped keys near the threshold are listed as ~key.
template <class T>
struct Lists {
    const int64_t block, blocks;  // of keys: size and number
    Buffer<int32_t> key;          // with room after those of the last query
    Buffer<T> slope;              // of the gate, where it has a gradient
    std::vector<int64_t> start;   // of the keys of each query in each block, and the end of the last ones
    std::vector<int64_t> kept;
    std::vector<T> unit;
    Buffer<T> score, through;     // one number for each listed pair

    Lists(const Gate<T>& gate, int64_t block) : block(block), blocks((gate.m + block - 1) / block) {}
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
    int64_t key_of(int64_t x) const { return key[x] ^ (key[x] >> 31); }

    // Call look(i, begin, end) for the listed keys of each query in a block.
    template <class Look>
    void by_blocks(Look&& look) const {
        for (int64_t part = 0; part < blocks; ++part)
            for (int64_t i = 0; i < queries(); ++i) {
                const int64_t* at = &start[i * (blocks + 1) + part];
                if (at[0] < at[1]) look(i, at[0], at[1]);
            }
    }
};

// Compute the slopes of the listed keys [begin, end) of a row; mark and count the kept ones.
template <class T, class E>
inline int64_t slope_row(const Row<T, E>& row, E top, E cut, T threshold, Band<T> band, int64_t always_keep,
                         int64_t begin, int64_t end, Buffer<E>& estimate, Lists<T>& lists) {
    const T a_step = row.step_of_difference(), narrower = 1 / band.width, steepest = band.inside ? T(1.5) : T(0.75);
    const int64_t number = end - begin;
    if (int64_t(estimate.size()) < number) estimate.resize(2 * number);
    int32_t* key = lists.key.data() + begin;
    T* slope = lists.slope.data() + begin;
    E* e = estimate.data();
    for (int64_t x = 0; x < number; ++x) e[x] = row.estimate[key[x]];
    int64_t first = 0, kept = 0;
    for (; first < number && key[first] < always_keep; ++first) slope[first] = T(0);
    for (int64_t x = first; x < number; ++x) {
        const T u = (threshold - T(top - e[x]) * a_step) * narrower, steep = steepest * (1 - u * u) * narrower;
        slope[x] = steep > 0 ? steep : T(0);
    }
    for (int64_t x = first; x < number; ++x) kept += e[x] >= cut;
    for (int64_t x = first; x < number; ++x) key[x] = e[x] >= cut ? key[x] : ~key[x];
    return first + kept;
}

template <class T, class E>
inline void list_row(const Gate<T>& gate, int64_t g, const std::vector<Bits>& seen, const Row<T, E>& row, E top,
                     int64_t stop, Band<T> band, Buffer<E>& estimate, Lists<T>& lists) {
    const T threshold = gate.threshold[g];
    const bool banded = band.width > 0 && !row.broken && std::isfinite(threshold);
    const E cut = row.broken ? top : row.cut(top, threshold);
    const E low = banded && !band.inside ? row.cut(top, threshold + band.width) : cut;
    const int64_t begin = lists.total();
    const size_t room = begin + stop + KEYS;
    if (lists.key.size() < room) lists.key.resize(2 * room);
    int32_t* to = lists.key.data() + begin;
    for (int64_t part = 0; part < lists.blocks; ++part) {
        lists.start.push_back(to - lists.key.data());
        const int64_t end = std::min(stop, (part + 1) * lists.block);
        for (int64_t j = part * lists.block; j < end; j += KEYS) {
            const Bits within = stop - j < KEYS ? (Bits(1) << (stop - j)) - 1 : ~Bits(0);
            const int64_t left = gate.always_keep - j;
            const Bits always = left <= 0 ? 0 : left < KEYS ? (Bits(1) << left) - 1 : ~Bits(0);
            const Bits reached = row.broken ? 0 : reach(row.estimate + j, low);
            to = write_indices(seen[j / KEYS] & within & (always | reached), j, to);
        }
    }
    const int64_t end = to - lists.key.data();
    if (band.width > 0 && lists.slope.size() < lists.key.size()) lists.slope.resize(lists.key.size());
    if (band.width > 0 && !banded) std::fill(lists.slope.begin() + begin, lists.slope.begin() + end, T(0));
    const auto mark = [&] {
        return slope_row(row, top, cut, threshold, band, gate.always_keep, begin, end, estimate, lists);
    };
    lists.kept.push_back(banded ? mark() : end - begin);
    lists.start.push_back(end);
    lists.unit.push_back(row.unit);
}

template <bool NARROW, class E, class T>
void list_rows(const Gate<T>& gate, int64_t g, const Packed<T, NARROW>& keys, const Sums<T>& sums, int64_t first,
               int64_t last, Band<T> band, Lists<T>& lists) {
    lists.clear();
    Buffer<E> estimate;
    judge_rows<NARROW, E>(gate, g, keys, sums, first, last, [&](int64_t i, const Row<T, E>& row, E top, int64_t stop) {
        const bool shown = !gate.shown_q || gate.shown_q[g * gate.n + i];
        list_row(gate, g, keys.seen, row, top, shown ? stop : 0, band, estimate, lists);
    });
}

template <class T, bool NARROW>
struct Prepared {
    Packed<T, NARROW> keys;
    std::vector<Sums<T>> sums;  // of the keys before those of each task

    Prepared(const Gate<T>& gate, int64_t g, int64_t queries) : keys(gate, g) {
        Sums<T> sum(gate, g);
        for (int64_t i = 0; i < gate.n; i += queries) {
            if (gate.spread) sum.advance(gate.end(i));
            sums.push_back(sum);
        }
    }
};

template <class T, bool NARROW>
std::vector<std::unique_ptr<Prepared<T, NARROW>>> prepare(const Gate<T>& gate, int64_t threads) {
    std::vector<std::unique_ptr<Prepared<T, NARROW>>> all(gate.groups);
    parallel_for(gate.groups, threads,
                 [&](int64_t g) { all[g] = std::make_unique<Prepared<T, NARROW>>(gate, g, QUERIES); });
    return all;
}

// The lists and queries of a task; a thread reuses their memory for its next task.
template <class S, class T = Number<S>>
struct Task {
    Lists<T> lists;
    Queries<S> queries;

    explicit Task(const Gate<T>& gate) : lists(gate, block_of_keys<S>(gate)) {}
};

template <bool NARROW, class E, class S, class T>
void attend_as(const AttendArguments<S, T> a) {
    const Gate<T>& gate = a.gate;
    const int64_t threads = a.threads;
    const auto prepared = prepare<T, NARROW>(gate, threads);
    const Tails<S> tails(tokens_of(a), a.tail_factor, threads);
    const int64_t tasks = (gate.n + QUERIES - 1) / QUERIES;
    parallel_for(gate.groups * tasks, threads, [&] { return Task<S>(gate); }, [&](int64_t task, Task<S>& of_thread) {
        Lists<T>& lists = of_thread.lists;
        Queries<S>& queries = of_thread.queries;
        const int64_t g = task / tasks, part = task % tasks, first = part * QUERIES, row = g * gate.n + first;
        list_rows<NARROW, E>(gate, g, prepared[g]->keys, prepared[g]->sums[part], first,
                             std::min(gate.n, first + QUERIES), Band<T>{}, lists);
        const S *keys = a.keys + g * gate.m * gate.d, *values = a.values + g * gate.m * gate.dv;
        queries.take(a.queries + row * gate.d, lists.queries() * gate.d, T(a.scale));
        lists.make_room(lists.score);
        Buffer<T>& weight = lists.score;
        lists.by_blocks([&](int64_t i, int64_t begin, int64_t end) {
            const auto at = [key = &lists.key[begin]](int64_t x) { return int64_t(key[x]); };
            queries.scores(i * gate.d, keys, gate.d, end - begin, at, &weight[begin]);
        });
        for (int64_t i = 0; i < lists.queries(); ++i) {
            const int64_t begin = lists.begin(i), number = lists.end(i) - begin;
            a.kept[row + i] = int32_t(lists.kept[i]);
            a.row_max[row + i] = -std::numeric_limits<T>::infinity();
            a.row_sum[row + i] = 0;
            const T sum = tails ? sum_of(&weight[begin], number) : T(0);
            if (number) soften(&weight[begin], number, a.row_max[row + i], a.row_sum[row + i]);
            T of_dropped = 0;
            const RowTail<T> tail = tails ? tails.row(row + i) : RowTail<T>();
            if (tails) {
                of_dropped = weigh_tail(tail, number, sum, a.row_max[row + i], a.row_sum[row + i], &weight[begin]);
                a.tail_weight[row + i] = of_dropped;
            }
            start_row(tail, gate.dv, of_dropped, a.out + (row + i) * gate.dv);
        }
        lists.by_blocks([&](int64_t i, int64_t begin, int64_t end) {
            const auto at = [key = &lists.key[begin]](int64_t x) { return int64_t(key[x]); };
            add_rows(a.out + (row + i) * gate.dv, &weight[begin], values, gate.dv, end - begin, at);
        });
    });
}

// The gradients of queries, keys, values and thresholds, from those of outputs and of the number of kept pairs.
template <bool NARROW, class E, class S, class T>
void back_as(const BackArguments<S, T> a) {
    const Gate<T>& gate = a.gate;
    const Band<T> band{T(a.width), a.inside != 0};
    const int64_t threads = a.threads;
    const T scale = T(a.scale);
    const T* grad = a.grad;
    const auto prepared = prepare<T, NARROW>(gate, threads);
    const Tokens<S> tokens = tokens_of(a);
    const Tails<S> tails(tokens, a.tail_factor, threads);
    TailGradients<S> of_tails(tokens, bool(tails));
    const int64_t blocks = (gate.n + QUERIES - 1) / QUERIES;
    const int64_t size_k = gate.m * gate.d, size_v = gate.m * gate.dv;
    Splits<T> splits(gate.groups, blocks, size_k, size_v, a.grad_keys, a.grad_values, a.grad_threshold);
    parallel_for(splits.tasks(), threads, [&] { return Task<S>(gate); }, [&](int64_t task, Task<S>& of_thread) {
        Lists<T>& lists = of_thread.lists;
        Queries<S>& queries = of_thread.queries;
        const int64_t g = task / splits.number;
        const S *keys = a.keys + g * size_k, *values = a.values + g * size_v;
        splits.begin(task);
        T *to_k = splits.keys(task), *to_v = splits.values(task);
        Buffer<T>&score = lists.score, &through = lists.through;
        // Splits take blocks in turn: in causal attention the last ones are the longest.
        for (int64_t part = task % splits.number; part < blocks; part += splits.number) {
            const int64_t first = part * QUERIES, row = g * gate.n + first;
            list_rows<NARROW, E>(gate, g, prepared[g]->keys, prepared[g]->sums[part], first,
                                 std::min(gate.n, first + QUERIES), band, lists);
            const auto from = [&](int64_t begin) { return [&, begin](int64_t x) { return lists.key_of(begin + x); }; };
            lists.make_room(score);
            lists.make_room(through);
            T* to_q = a.grad_queries + row * gate.d;
            const int64_t size_q = lists.queries() * gate.d;
            queries.take(a.queries + row * gate.d, size_q, scale);
            std::fill_n(to_q, size_q, T(0));
            lists.by_blocks([&](int64_t i, int64_t begin, int64_t end) {
                queries.scores(i * gate.d, keys, gate.d, end - begin, from(begin), &score[begin]);
            });
            lists.by_blocks([&](int64_t i, int64_t begin, int64_t end) {
                dots(grad + (row + i) * gate.dv, values, gate.dv, end - begin, from(begin), &through[begin]);
            });
            for (int64_t i = 0; i < lists.queries(); ++i) {
                const int64_t begin = lists.begin(i), number = lists.end(i) - begin;
                T* slope = band.width > 0 ? lists.slope.data() + begin : nullptr;
                if (slope) splits.threshold(task) += double(a.grad_kept[g]) * sum_of(slope, number);
                const T worth = a.into_scores ? 1 / std::max(lists.unit[i], T(1)) : T(0);
                const T constant = dot(grad + (row + i) * gate.dv, a.out + (row + i) * gate.dv, gate.dv);
                const int32_t* key = lists.key.data() + begin;
                if (tails) {
                    const TailGradient<T> of_tail(
                        tails.row(row + i), gate.dv, a.tail_weight[row + i], lists.kept[i],
                        sum_of_kept(key, score.data() + begin, number), sum_of_kept(key, through.data() + begin, number),
                        constant, grad + (row + i) * gate.dv);
                    of_tails.set(row + i, of_tail);
                    shares_with_tail(key, number, a.row_max[row + i], a.row_sum[row + i], constant, worth, of_tail,
                                     score.data() + begin, through.data() + begin, slope);
                } else {
                    shares_of(key, number, a.row_max[row + i], a.row_sum[row + i], constant, worth,
                              score.data() + begin, through.data() + begin, slope);
                }
                if (slope) splits.threshold(task) += sum_of(slope, number);
            }
            lists.by_blocks([&](int64_t i, int64_t begin, int64_t end) {
                add_rows(to_q + i * gate.d, &through[begin], keys, gate.d, end - begin, from(begin));
                add_to_rows(to_k, &through[begin], &queries.scaled[i * gate.d], gate.d, end - begin, from(begin));
            });
            for (int64_t x = 0; x < size_q; ++x) to_q[x] *= scale;
            lists.by_blocks([&](int64_t i, int64_t begin, int64_t end) {
                add_to_rows(to_v, &score[begin], grad + (row + i) * gate.dv, gate.dv, end - begin, from(begin));
            });
        }
    });
    splits.add_up(threads);
    of_tails.spread(tokens, grad, a.grad_queries, a.grad_keys, a.grad_values, a.grad_tail_factor, threads);
}

template <class S>
void attend(const AttendArguments<S> a) {
    with_types(a.gate, [&](auto small, auto e) { attend_as<decltype(small)::value, decltype(e)>(a); });
}

template <class S>
void back(const BackArguments<S> a) {
    with_types(a.gate, [&](auto small, auto e) { back_as<decltype(small)::value, decltype(e)>(a); });
}

}  // namespace

#define EXPORT_FOR(S, NAME)                             \
    THRESHER_EXPORT(encode, EncodeArguments, S, NAME)   \
    THRESHER_EXPORT(attend, AttendArguments, S, NAME)   \
    THRESHER_EXPORT(back, BackArguments, S, NAME)       \
    THRESHER_EXPORT(decode, DecodeArguments, S, NAME)

EXPORT_FOR(float, float32)
EXPORT_FOR(double, float64)
EXPORT_FOR(Bf16, bfloat16)
