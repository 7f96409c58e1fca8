// What a block computes: its queries, its keys, and which of the keys each query keeps.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bitmask.h"
#include "blocks_arguments.h"
#include "buffer.h"
#include "estimates.h"

namespace thresher {

// The slope of the gate of a kept key: steepest at the threshold, zero from `width` on.
template <class T>
inline T slope_inside(T margin, T width) {
    const T u = margin / width, steep = T(1.5) * (1 - u * u) / width;
    return steep > 0 ? steep : T(0);
}

template <class T>
struct Choice {
    std::vector<int64_t> rows;  // queries of the block that are not hidden
    Buffer<int32_t> keys;       // with room to grow behind the first `number`
    int64_t number = 0;
    bool shared = true;         // every row keeps all keys
    Buffer<T> slope;            // of each kept key, or of each kept pair
    // Where rows choose for themselves:
    std::vector<int64_t> start;  // of each row in `column`, and the end of the last one
    Buffer<int32_t> column;      // kept keys of each row, as their places among the keys

    void take_rows(const Gate<T>& gate, const Sharing& sharing, int64_t g, int64_t block) {
        rows.clear();
        for (int64_t i = sharing.begin(block); i < sharing.end(block, gate.n); ++i)
            if (!gate.shown_q || gate.shown_q[g * gate.n + i]) rows.push_back(i);
    }
    void take_keys(const Bits* chosen, int64_t words) {
        number = 0;
        for (int64_t w = 0; w < words; ++w) {
            if (int64_t(keys.size()) < number + 2 * KEYS) keys.resize(2 * (number + 2 * KEYS));
            number = write_indices(chosen[w], w * KEYS, keys.data() + number) - keys.data();
        }
    }
    int64_t kept(int64_t row) const { return shared ? number : start[row + 1] - start[row]; }
};

// The first `always` keys of a word of bits.
inline Bits first_keys(int64_t always, int64_t j) {
    const int64_t left = always - j;
    return left <= 0 ? 0 : left < KEYS ? (Bits(1) << left) - 1 : ~Bits(0);
}

// Let each row of a block choose for itself, as in LATTE; the keys of the block are what any of them chose.
template <class T>
class Union {
  public:
    template <bool NARROW, class E>
    void choose(const Gate<T>& gate, const Sharing& sharing, int64_t g, int64_t block, const Packed<T, NARROW>& keys,
                const Sums<T>& sums, T width, Choice<T>& choice) {
        const int64_t words = gate.blocks();
        choice.shared = false;
        choice.start.assign(1, 0);
        any.assign(words, 0);
        place.resize(gate.m);
        const T threshold = gate.threshold[g];
        const bool banded = width > 0 && std::isfinite(threshold);
        const auto judge = [&](int64_t i, const Row<T, E>& row, E top, int64_t stop) {
            if (gate.shown_q && !gate.shown_q[g * gate.n + i]) return;
            const int64_t begin = choice.start.back();
            const size_t room = begin + stop + 2 * KEYS;
            if (choice.column.size() < room) choice.column.resize(2 * room);
            int32_t *first = choice.column.data() + begin, *to = first;
            const E cut = row.broken ? top : row.cut(top, threshold);
            for (int64_t j = 0; j < stop; j += KEYS) {
                const Bits within = stop - j < KEYS ? (Bits(1) << (stop - j)) - 1 : ~Bits(0);
                const Bits reached = row.broken ? 0 : reach(row.estimate + j, cut);
                const Bits chosen = keys.seen[j / KEYS] & within & (first_keys(gate.always_keep, j) | reached);
                any[j / KEYS] |= chosen;
                to = write_indices(chosen, j, to);
            }
            choice.start.push_back(to - choice.column.data());
            if (width <= 0) return;
            if (choice.slope.size() < choice.column.size()) choice.slope.resize(choice.column.size());
            const T step = row.step_of_difference();
            for (T* slope = choice.slope.data() + begin; first < to; ++first, ++slope) {
                const bool reached = banded && !row.broken && *first >= gate.always_keep;
                *slope = reached ? slope_inside(threshold - T(top - row.estimate[*first]) * step, width) : T(0);
            }
        };
        judge_rows<NARROW, E>(gate, g, keys, sums, sharing.begin(block), sharing.end(block, gate.n), judge);
        choice.take_keys(any.data(), words);
        for (int64_t c = 0; c < choice.number; ++c) place[choice.keys[c]] = int32_t(c);
        for (int64_t x = 0; x < choice.start.back(); ++x) choice.column[x] = place[choice.column[x]];
    }

  private:
    std::vector<Bits> any;
    Buffer<int32_t> place;
};

}  // namespace thresher
