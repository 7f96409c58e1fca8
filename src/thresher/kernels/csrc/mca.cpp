// Values projected from sampled input features: only the rows of W that were drawn are read.
//
// A token draws features by uniform numbers: the first feature whose cumulated chance exceeds a number. A table of where
// equal parts of [0, 1) begin leaves about one step to search. A feature that is drawn more than once is read once.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "buffer.h"
#include "gathered.h"
#include "matrix.h"
#include "parallel.h"

using namespace thresher;

namespace {

constexpr int64_t TOKENS = 32;    // of a task
constexpr int64_t PORTIONS = 16;  // of all tokens, whose gradients of W are summed apart: as many for any number of threads

struct Sizes {
    int64_t examples, m, d, groups, dv, draws;  // draws: examples that have draws of their own; 1 is one for all
};

template <class T>
struct Call {
    const T *x, *rows, *chances, *cumulated, *uniform, *counts;
    // x [b, m, d]; rows of W [groups, d, dv]; chances and their sums [groups, d]; uniform [m, draws, groups, d];
    // counts [b, groups, m]
    Sizes s;
    const T* token(int64_t b, int64_t j) const { return x + (b * s.m + j) * s.d; }
    const T* rows_of(int64_t g) const { return rows + g * s.d * s.dv; }
    T count(int64_t b, int64_t g, int64_t j) const { return counts[(b * s.groups + g) * s.m + j]; }
    const T* numbers(int64_t b, int64_t g, int64_t j) const {
        return uniform + ((j * s.draws + (s.draws > 1 ? b : 0)) * s.groups + g) * s.d;
    }
};

// For each head, the first feature whose cumulated chance exceeds z / parts.
template <class T>
struct Tables {
    int64_t parts = 1;  // a power of two, so that numbers fall into them exactly
    std::vector<int32_t> first;

    explicit Tables(const Call<T>& c) {
        while (parts < 2 * c.s.d) parts *= 2;
        first.resize(c.s.groups * parts);
        for (int64_t g = 0; g < c.s.groups; ++g) {
            int64_t k = 0;
            for (int64_t z = 0; z < parts; ++z) {
                while (k < c.s.d - 1 && !(c.cumulated[g * c.s.d + k] > T(z) / T(parts))) ++k;
                first[g * parts + z] = int32_t(k);
            }
        }
    }
};

// The features of one token and head, each once, and what each counts.
template <class T>
struct Drawn {
    std::vector<int32_t> index, times;
    Buffer<T> share, product;
    int64_t number = 0;

    explicit Drawn(const Sizes& s) : index(s.d), times(s.d, 0), share(s.d), product(s.d) {}

    // Without samples there is none; a count that is no number makes shares that are none.
    void draw(const Call<T>& c, const Tables<T>& tables, int64_t b, int64_t g, int64_t j) {
        const int64_t d = c.s.d;
        const T count = c.count(b, g, j);
        number = 0;
        if (count != count) {
            for (int64_t k = 0; k < d; ++k) index[k] = int32_t(k), share[k] = count;
            number = d;
            return;
        }
        const T* cumulated = c.cumulated + g * d;
        const T* numbers = c.numbers(b, g, j);
        const int32_t* first = tables.first.data() + g * tables.parts;
        for (int64_t i = 0; T(i) < count; ++i) {
            int64_t k = first[int64_t(numbers[i] * T(tables.parts))];
            while (k < d - 1 && !(cumulated[k] > numbers[i])) ++k;
            if (!times[k]++) index[number++] = int32_t(k);
        }
        for (int64_t i = 0; i < number; ++i) {
            const int64_t k = index[i];
            const T expected = count * c.chances[g * d + k];
            share[i] = T(times[k]) / (expected == 0 ? T(1) : expected);
            times[k] = 0;
        }
    }
    auto at() const {
        return [this](int64_t i) { return int64_t(index[i]); };
    }
};

template <class T>
void encode(const Call<T>& c, T* out, int64_t threads) {
    const Sizes& s = c.s;
    const Tables<T> tables(c);
    const int64_t blocks = (s.m + TOKENS - 1) / TOKENS;
    const auto make = [&] { return Drawn<T>(s); };
    parallel_for(s.examples * s.groups * blocks, threads, make, [&](int64_t task, Drawn<T>& drawn) {
        const int64_t b = task / blocks / s.groups, g = task / blocks % s.groups, from = task % blocks * TOKENS;
        for (int64_t j = from; j < std::min(from + TOKENS, s.m); ++j) {
            T* to = out + ((b * s.groups + g) * s.m + j) * s.dv;
            std::fill_n(to, s.dv, T(0));
            drawn.draw(c, tables, b, g, j);
            const T* x = c.token(b, j);
            for (int64_t i = 0; i < drawn.number; ++i) drawn.product[i] = drawn.share[i] * x[drawn.index[i]];
            add_rows(to, drawn.product.data(), c.rows_of(g), s.dv, drawn.number, drawn.at());
        }
    });
}

template <class T>
void back(const Call<T>& c, const T* grad, T* into_x, T* into_rows, int64_t threads) {
    const Sizes& s = c.s;
    const Tables<T> tables(c);
    const auto make = [&] { return Drawn<T>(s); };
    const auto grad_of = [&](int64_t b, int64_t g, int64_t j) { return grad + ((b * s.groups + g) * s.m + j) * s.dv; };
    const int64_t blocks = (s.m + TOKENS - 1) / TOKENS;
    parallel_for(s.examples * blocks, threads, make, [&](int64_t task, Drawn<T>& drawn) {
        const int64_t b = task / blocks, from = task % blocks * TOKENS, end = std::min(from + TOKENS, s.m);
        std::fill(into_x + (b * s.m + from) * s.d, into_x + (b * s.m + end) * s.d, T(0));
        for (int64_t g = 0; g < s.groups; ++g)
            for (int64_t j = from; j < end; ++j) {
                drawn.draw(c, tables, b, g, j);
                dots(grad_of(b, g, j), c.rows_of(g), s.dv, drawn.number, drawn.at(), drawn.product.data());
                T* to = into_x + (b * s.m + j) * s.d;
                for (int64_t i = 0; i < drawn.number; ++i) to[drawn.index[i]] += drawn.share[i] * drawn.product[i];
            }
    });
    const int64_t all = s.examples * s.m, size = s.groups * s.d * s.dv;
    const int64_t portions = std::clamp<int64_t>(all / TOKENS, 1, PORTIONS);
    Buffer<T> sums(portions * size, T(0));
    parallel_for(portions * s.groups, threads, make, [&](int64_t task, Drawn<T>& drawn) {
        const int64_t portion = task / s.groups, g = task % s.groups;
        T* to = sums.data() + portion * size + g * s.d * s.dv;
        for (int64_t z = all * portion / portions; z < all * (portion + 1) / portions; ++z) {
            const int64_t b = z / s.m, j = z % s.m;
            drawn.draw(c, tables, b, g, j);
            const T* x = c.token(b, j);
            for (int64_t i = 0; i < drawn.number; ++i) drawn.product[i] = drawn.share[i] * x[drawn.index[i]];
            add_to_rows(to, drawn.product.data(), grad_of(b, g, j), s.dv, drawn.number, drawn.at());
        }
    });
    std::copy_n(sums.data(), size, into_rows);
    for (int64_t portion = 1; portion < portions; ++portion)
        for (int64_t i = 0; i < size; ++i) into_rows[i] += sums[portion * size + i];
}

}  // namespace

#define FOR_TYPE(T, NAME)                                                                                              \
    extern "C" void encode_##NAME(const T* x, const T* rows, const T* chances, const T* cumulated, const T* uniform,   \
                                  const T* counts, T* out, int64_t examples, int64_t m, int64_t d, int64_t groups,     \
                                  int64_t dv, int64_t draws, int64_t threads) {                                        \
        encode<T>({x, rows, chances, cumulated, uniform, counts, {examples, m, d, groups, dv, draws}}, out, threads);  \
    }                                                                                                                  \
    extern "C" void back_##NAME(const T* x, const T* rows, const T* chances, const T* cumulated, const T* uniform,     \
                                const T* counts, const T* grad, T* into_x, T* into_rows, int64_t examples, int64_t m,  \
                                int64_t d, int64_t groups, int64_t dv, int64_t draws, int64_t threads) {               \
        back<T>({x, rows, chances, cumulated, uniform, counts, {examples, m, d, groups, dv, draws}}, grad, into_x,     \
                into_rows, threads);                                                                                   \
    }

FOR_TYPE(float, float32)
FOR_TYPE(double, float64)
