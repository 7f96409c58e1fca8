// Project values from sampled input features: read only the rows of W that a token draws.
//
// A uniform number draws the first feature whose cumulative probability exceeds it. A table of where equal parts of
// [0, 1) begin shortens the search to about one step. A feature that a token draws more than once is read once.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "arguments.h"
#include "buffer.h"
#include "gathered.h"
#include "matrix.h"
#include "parallel.h"

using namespace thresher;

namespace {

constexpr int64_t TOKENS = 32;    // of a task
constexpr int64_t PORTIONS = 16;  // of the tokens, each with a sum of gradients of W of its own

// The tokens, and the features that they draw.
#define SAMPLES(FIELD)                                                                          \
    FIELD(const T*, tokens)         /* [examples, m, d] */                                      \
    FIELD(const T*, rows)           /* what a feature adds to a value, [groups, d, dv] */       \
    FIELD(const T*, chances)        /* of features, [groups, d] */                              \
    FIELD(const T*, cumulated)      /* sums of chances, [groups, d] */                          \
    FIELD(const T*, uniform)        /* random numbers, [m, draws, groups, d] */                 \
    FIELD(const T*, counts)         /* how many of them a token uses, [examples, groups, m] */  \
    FIELD(int64_t, examples)                                                                    \
    FIELD(int64_t, m)                                                                           \
    FIELD(int64_t, d)                                                                           \
    FIELD(int64_t, groups)                                                                      \
    FIELD(int64_t, dv)                                                                          \
    FIELD(int64_t, draws)           /* examples that have draws of their own; 1 is one for all */
template <class T>
struct Samples {
    THRESHER_FIELDS(SAMPLES)
    const T* token(int64_t b, int64_t j) const { return tokens + (b * m + j) * d; }
    const T* rows_of(int64_t g) const { return rows + g * d * dv; }
    T count(int64_t b, int64_t g, int64_t j) const { return counts[(b * groups + g) * m + j]; }
    const T* numbers(int64_t b, int64_t g, int64_t j) const {
        return uniform + ((j * draws + (draws > 1 ? b : 0)) * groups + g) * d;
    }
};

#define ENCODE_ARGUMENTS(FIELD)                                                                 \
    FIELD(Samples<T>, samples)                                                                  \
    FIELD(T*, values)               /* [examples, groups, m, dv] */                             \
    FIELD(int64_t, threads)
template <class T>
struct EncodeArguments {
    THRESHER_FIELDS(ENCODE_ARGUMENTS)
};

#define BACK_ARGUMENTS(FIELD)                                                                   \
    FIELD(Samples<T>, samples)                                                                  \
    FIELD(const T*, grad)           /* of values */                                             \
    FIELD(T*, grad_tokens)                                                                      \
    FIELD(T*, grad_rows)                                                                        \
    FIELD(int64_t, threads)
template <class T>
struct BackArguments {
    THRESHER_FIELDS(BACK_ARGUMENTS)
};

// For each group, the first feature whose cumulative probability exceeds z / parts.
template <class T>
struct Tables {
    int64_t parts = 1;  // a power of two, so that z / parts is exact
    std::vector<int32_t> first;

    explicit Tables(const Samples<T>& s) {
        while (parts < 2 * s.d) parts *= 2;
        first.resize(s.groups * parts);
        for (int64_t g = 0; g < s.groups; ++g) {
            int64_t k = 0;
            for (int64_t z = 0; z < parts; ++z) {
                while (k < s.d - 1 && !(s.cumulated[g * s.d + k] > T(z) / T(parts))) ++k;
                first[g * parts + z] = int32_t(k);
            }
        }
    }
};

// The distinct features of one token and head, and the share of each.
template <class T>
struct Drawn {
    std::vector<int32_t> index, times;
    Buffer<T> share, product;
    int64_t number = 0;

    explicit Drawn(const Samples<T>& s) : index(s.d), times(s.d, 0), share(s.d), product(s.d) {}

    // Without samples there are no features; a count of NaN gives shares of NaN.
    void draw(const Samples<T>& s, const Tables<T>& tables, int64_t b, int64_t g, int64_t j) {
        const int64_t d = s.d;
        const T count = s.count(b, g, j);
        number = 0;
        if (count != count) {
            for (int64_t k = 0; k < d; ++k) index[k] = int32_t(k), share[k] = count;
            number = d;
            return;
        }
        const T* cumulated = s.cumulated + g * d;
        const T* numbers = s.numbers(b, g, j);
        const int32_t* first = tables.first.data() + g * tables.parts;
        for (int64_t i = 0; T(i) < count; ++i) {
            int64_t k = first[int64_t(numbers[i] * T(tables.parts))];
            while (k < d - 1 && !(cumulated[k] > numbers[i])) ++k;
            if (!times[k]++) index[number++] = int32_t(k);
        }
        for (int64_t i = 0; i < number; ++i) {
            const int64_t k = index[i];
            const T expected = count * s.chances[g * d + k];
            share[i] = T(times[k]) / (expected == 0 ? T(1) : expected);
            times[k] = 0;
        }
    }
    auto at() const {
        return [this](int64_t i) { return int64_t(index[i]); };
    }
};

template <class T>
void encode(const EncodeArguments<T> a) {
    const Samples<T>& s = a.samples;
    const Tables<T> tables(s);
    const int64_t blocks = (s.m + TOKENS - 1) / TOKENS;
    const auto make = [&] { return Drawn<T>(s); };
    parallel_for(s.examples * s.groups * blocks, a.threads, make, [&](int64_t task, Drawn<T>& drawn) {
        const int64_t b = task / blocks / s.groups, g = task / blocks % s.groups, from = task % blocks * TOKENS;
        for (int64_t j = from; j < std::min(from + TOKENS, s.m); ++j) {
            T* to = a.values + ((b * s.groups + g) * s.m + j) * s.dv;
            std::fill_n(to, s.dv, T(0));
            drawn.draw(s, tables, b, g, j);
            const T* x = s.token(b, j);
            for (int64_t i = 0; i < drawn.number; ++i) drawn.product[i] = drawn.share[i] * x[drawn.index[i]];
            add_rows(to, drawn.product.data(), s.rows_of(g), s.dv, drawn.number, drawn.at());
        }
    });
}

template <class T>
void back(const BackArguments<T> a) {
    const Samples<T>& s = a.samples;
    const int64_t threads = a.threads;
    const Tables<T> tables(s);
    const auto make = [&] { return Drawn<T>(s); };
    const auto grad_of = [&](int64_t b, int64_t g, int64_t j) {
        return a.grad + ((b * s.groups + g) * s.m + j) * s.dv;
    };
    const int64_t blocks = (s.m + TOKENS - 1) / TOKENS;
    parallel_for(s.examples * blocks, threads, make, [&](int64_t task, Drawn<T>& drawn) {
        const int64_t b = task / blocks, from = task % blocks * TOKENS, end = std::min(from + TOKENS, s.m);
        std::fill(a.grad_tokens + (b * s.m + from) * s.d, a.grad_tokens + (b * s.m + end) * s.d, T(0));
        for (int64_t g = 0; g < s.groups; ++g)
            for (int64_t j = from; j < end; ++j) {
                drawn.draw(s, tables, b, g, j);
                dots(grad_of(b, g, j), s.rows_of(g), s.dv, drawn.number, drawn.at(), drawn.product.data());
                T* to = a.grad_tokens + (b * s.m + j) * s.d;
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
            drawn.draw(s, tables, b, g, j);
            const T* x = s.token(b, j);
            for (int64_t i = 0; i < drawn.number; ++i) drawn.product[i] = drawn.share[i] * x[drawn.index[i]];
            add_to_rows(to, drawn.product.data(), grad_of(b, g, j), s.dv, drawn.number, drawn.at());
        }
    });
    std::copy_n(sums.data(), size, a.grad_rows);
    for (int64_t portion = 1; portion < portions; ++portion)
        for (int64_t i = 0; i < size; ++i) a.grad_rows[i] += sums[portion * size + i];
}

}  // namespace

#define EXPORT_FOR(T, NAME)                             \
    THRESHER_EXPORT(encode, EncodeArguments, T, NAME)   \
    THRESHER_EXPORT(back, BackArguments, T, NAME)

EXPORT_FOR(float, float32)
EXPORT_FOR(double, float64)
