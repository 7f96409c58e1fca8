// Blocks: consecutive queries share their kept keys, which are gathered once and attended to by dense products.
//
// A task takes a block of queries. A vote on estimates, or the choice of each row, lists its keys. Gradients to keys
// are summed in parts that sizes alone divide, never the number of threads, so that results do not depend on it.

#include <memory>

#include "blocks_choice.h"
#include "blocks_dense.h"
#include "blocks_votes.h"
#include "parallel.h"
#include "splits.h"

using namespace thresher;

namespace {

// Keys of a group, packed, and sums of those that lie before each block where rows choose for themselves.
template <class T, bool NARROW>
struct Prepared {
    Packed<T, NARROW> keys;
    std::vector<Sums<T>> sums;

    Prepared(const Gate<T>& gate, const Sharing& sharing, int64_t g) : keys(gate, g) {
        if (sharing.votes) return;
        Sums<T> sum(gate, g);
        for (int64_t block = 0; block < sharing.blocks(gate.n); ++block) {
            if (gate.spread) sum.advance(gate.end(sharing.begin(block)));
            sums.push_back(sum);
        }
    }
};

template <class T, bool NARROW>
std::vector<std::unique_ptr<Prepared<T, NARROW>>> prepare(const Gate<T>& gate, const Sharing& sharing,
                                                          int64_t threads) {
    std::vector<std::unique_ptr<Prepared<T, NARROW>>> all(gate.groups);
    parallel_for(gate.groups, threads,
                 [&](int64_t g) { all[g] = std::make_unique<Prepared<T, NARROW>>(gate, sharing, g); });
    return all;
}

// What a thread needs for a block.
template <class S, bool NARROW, class T = Number<S>>
struct Task {
    Choice<T> choice;
    Votes<NARROW, T> votes;
    Union<T> each;
    Dense<S> dense;
};

template <bool NARROW, class E, class S, class T>
void attend_as(const AttendArguments<S, T> a) {
    const Gate<T>& gate = a.gate;
    const Sharing& sharing = a.sharing;
    const auto prepared = prepare<T, NARROW>(gate, sharing, a.threads);
    const Tails<S> tails(tokens_of(a), a.tail_factor, a.threads);
    const int64_t blocks = sharing.blocks(gate.n);
    const auto make = [] { return Task<S, NARROW>(); };
    parallel_for(gate.groups * blocks, a.threads, make, [&](int64_t task, Task<S, NARROW>& of_thread) {
        const int64_t g = task / blocks, block = task % blocks, first = sharing.begin(block);
        const int64_t row = g * gate.n + first, all = sharing.end(block, gate.n) - first;
        const Packed<T, NARROW>& keys = prepared[g]->keys;
        Choice<T>& choice = of_thread.choice;
        choice.take_rows(gate, sharing, g, block);
        std::fill_n(a.kept + row, all, 0);
        std::fill_n(a.computed + row, all, 0);
        std::fill_n(a.out + row * gate.dv, all * gate.dv, T(0));
        std::fill_n(a.row_max + row, all, T(0));
        std::fill_n(a.row_sum + row, all, T(0));
        if (a.tail_weight) std::fill_n(a.tail_weight + row, all, T(0));
        if (sharing.votes) {
            const Chosen<T>& by_vote = a.by_vote;
            Bits* chosen = reinterpret_cast<Bits*>(by_vote.chosen) + task * gate.blocks();
            std::fill_n(by_vote.vote_max + row, all, T(0));
            std::fill_n(by_vote.vote_share + row, all, T(0));
            of_thread.votes.count(gate, sharing, g, choice.rows, keys, true, by_vote);
            of_thread.votes.take_logarithms();
            of_thread.votes.choose(gate, g, keys, chosen, by_vote.best[task], by_vote.unit[task]);
            choice.take_keys(chosen, gate.blocks());
        } else {
            of_thread.each.template choose<NARROW, E>(gate, sharing, g, block, keys, prepared[g]->sums[block], T(0),
                                                      choice);
        }
        for (size_t i = 0; i < choice.rows.size(); ++i) {
            const int64_t at = g * gate.n + choice.rows[i];
            const int32_t *begin = choice.keys.data(), *end = begin + choice.number;
            a.kept[at] = int32_t(choice.kept(i));
            a.computed[at] = int32_t(std::lower_bound(begin, end, gate.end(choice.rows[i])) - begin);
        }
        of_thread.dense.attend(a, g, choice, tails);
    });
}

template <bool NARROW, class E, class S, class T>
void back_as(const BackArguments<S, T> a) {
    const Gate<T>& gate = a.gate;
    const Sharing& sharing = a.sharing;
    const T width = T(a.width);
    std::vector<std::unique_ptr<Prepared<T, NARROW>>> prepared;
    if (!sharing.votes) prepared = prepare<T, NARROW>(gate, sharing, a.threads);
    const Tokens<S> tokens = tokens_of(a);
    const Tails<S> tails(tokens, a.tail_factor, a.threads);
    TailGradients<S> of_tails(tokens, bool(tails));
    const int64_t blocks = sharing.blocks(gate.n);
    Splits<T> splits(gate.groups, blocks, gate.m * gate.d, gate.m * gate.dv, a.grad_keys, a.grad_values,
                     a.grad_threshold);
    const auto make = [] { return Task<S, NARROW>(); };
    parallel_for(splits.tasks(), a.threads, make, [&](int64_t task, Task<S, NARROW>& of_thread) {
        const int64_t g = task / splits.number;
        splits.begin(task);
        T *to_k = splits.keys(task), *to_v = splits.values(task);
        // Splits take blocks in turn: in causal attention the last ones are the longest.
        for (int64_t block = task % splits.number; block < blocks; block += splits.number) {
            Choice<T>& choice = of_thread.choice;
            const int64_t first = sharing.begin(block), at = g * blocks + block;
            std::fill_n(a.grad_queries + (g * gate.n + first) * gate.d,
                        (sharing.end(block, gate.n) - first) * gate.d, T(0));
            choice.take_rows(gate, sharing, g, block);
            if (sharing.votes) {
                choice.take_keys(reinterpret_cast<const Bits*>(a.by_vote.chosen) + at * gate.blocks(), gate.blocks());
                if (width > 0) {
                    const Packed<T, NARROW> kept(gate, g, choice.keys.data(), choice.number);
                    of_thread.votes.count(gate, sharing, g, choice.rows, kept, false, a.by_vote);
                    of_thread.votes.take_logarithms();
                    of_thread.votes.find_slopes(gate, g, a.by_vote.best[at], a.by_vote.unit[at], width, choice);
                }
            } else {
                of_thread.each.template choose<NARROW, E>(gate, sharing, g, block, prepared[g]->keys,
                                                          prepared[g]->sums[block], width, choice);
            }
            splits.threshold(task) += of_thread.dense.back(a, g, choice, tails, to_k, to_v, of_tails);
        }
    });
    splits.add_up(a.threads);
    of_tails.spread(tokens, a.grad, a.grad_queries, a.grad_keys, a.grad_values, a.grad_tail_factor, a.threads);
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
    THRESHER_EXPORT(attend, AttendArguments, S, NAME)   \
    THRESHER_EXPORT(back, BackArguments, S, NAME)

EXPORT_FOR(float, float32)
EXPORT_FOR(double, float64)
EXPORT_FOR(Bf16, bfloat16)
