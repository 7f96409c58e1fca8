// Attention over the k largest scores of each query, and its gradients.
//
// Scores of a few queries at a time become integers that sort like the floats, with NaN as the largest. The k-th
// largest of the maxima of groups of keys is a lower bound: at least k scores reach it, and few more do. Only those are
// searched for the k-th largest score. Of equal scores the lower index wins.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "bitmask.h"
#include "gathered.h"
#include "matrix.h"
#include "parallel.h"
#include "softmax.h"
#include "tail.h"

using namespace thresher;

namespace {

constexpr int64_t SCORES = 320 * 1024;  // bytes of scores in memory, to stay in the L2 cache
constexpr int64_t CHANNELS = 32;        // of keys and values that one task of backward sums
constexpr int64_t QUERIES = 64;         // of a task
constexpr int64_t FEW = 16;             // queries, as in decoding: packing the keys would not pay

template <class T>
using Key = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class T>
constexpr Key<T> NOTHING = std::numeric_limits<Key<T>>::min();

template <class T>
struct Keys {
    typedef Key<T> Vector __attribute__((vector_size(BYTES)));
    typedef Key<T> Loose __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
};

template <class T>
inline typename Keys<T>::Vector ordered(Vector<T> x) {
    const Vector<T> number = x + T(0);  // turns -0 into 0
    const auto bits = (typename Keys<T>::Vector)number;
    const auto order = bits ^ ((bits >> (8 * sizeof(T) - 1)) & std::numeric_limits<Key<T>>::max());
    const typename Keys<T>::Vector nan = typename Keys<T>::Vector{} + std::numeric_limits<Key<T>>::max();
    return x == x ? order : nan;
}

template <class T>
inline T number_of(Key<T> order) {
    const Key<T> bits = order ^ ((order >> (8 * sizeof(T) - 1)) & std::numeric_limits<Key<T>>::max());
    T x;
    std::memcpy(&x, &bits, sizeof(T));
    return x;
}

template <class K>
inline int64_t count_from(const K* x, int64_t n, K bound) {
    int64_t total = 0;
    for (int64_t i = 0; i < n; i += 1024) {
        K found = 0;
        for (int64_t j = i; j < std::min(n, i + 1024); ++j) found += x[j] >= bound;
        total += found;
    }
    return total;
}

template <class K>
inline K middle(K low, K high) {
    return (low & high) + ((low ^ high) >> 1);
}

// Find a bound that at least k of x reach, and at most `enough` if a few steps suffice; 0 asks for the exact one.
template <class K>
K bound_of(const K* x, int64_t n, int64_t k, int64_t enough) {
    K low = x[0], high = x[0];
    for (int64_t i = 1; i < n; ++i) {
        low = std::min(low, x[i]);
        high = std::max(high, x[i]);
    }
    while (low < high) {
        const K half = middle<K>(low, high) + 1;
        const int64_t count = count_from(x, n, half);
        if (count >= k) {
            low = half;
            if (count <= std::max(enough, k)) break;
        } else {
            high = half - 1;
        }
    }
    return low;
}

template <class T>
class Selector {
  public:
    // Write the indices of the k largest of m scores to `index`, ascending; hidden scores are NOTHING.
    void select(const Key<T>* row, int64_t m, int64_t k, int32_t* index) {
        using K = Key<T>;
        constexpr int LANES = Wide<T>::LANES;
        const int64_t vectors = m / LANES, each = vectors * LANES / (2 * k);
        K bound = NOTHING<T> + 1;
        if (each >= 2) {
            highest.resize((vectors + each - 1) / each * LANES);
            K* to = highest.data();
            for (int64_t i = 0; i < vectors; i += each, to += LANES) {
                auto best = *reinterpret_cast<const typename Keys<T>::Loose*>(row + i * LANES);
                for (int64_t j = i + 1; j < std::min(vectors, i + each); ++j) {
                    const auto x = *reinterpret_cast<const typename Keys<T>::Loose*>(row + j * LANES);
                    best = x > best ? x : best;
                }
                *reinterpret_cast<typename Keys<T>::Loose*>(to) = best;
            }
            bound = std::max<K>(bound, bound_of(highest.data(), highest.size(), k, k + k / 16));
        }
        if (static_cast<int64_t>(candidate.size()) < m + KEYS) candidate.resize(m + KEYS), value.resize(m + KEYS);
        const int64_t found = filter(row, m, bound);
        for (int64_t i = 0; i < found; ++i) value[i] = row[candidate[i]];
        const K last = found > k ? bound_of(value.data(), found, k, 0) : NOTHING<T>;
        int64_t equals = k, number = 0;  // that are kept
        for (int64_t i = 0; i < found; ++i) equals -= value[i] > last;
        for (int64_t i = 0; i < found && number < k; ++i) {
            const bool equal = value[i] == last;
            index[number] = candidate[i];
            number += (value[i] > last) | (equal & (equals > 0));
            equals -= equal;
        }
    }

  private:
    std::vector<Key<T>> highest, value;
    std::vector<int32_t> candidate;  // keys whose scores reach the bound

    int64_t filter(const Key<T>* row, int64_t m, Key<T> bound) {
        int32_t* to = candidate.data();
        int64_t j = 0;
        if constexpr (sizeof(T) == 4)
            for (; j + KEYS <= m; j += KEYS) to = write_indices(reach(row + j, bound), j, to);
        for (; j < m; ++j) {
            *to = static_cast<int32_t>(j);
            to += row[j] >= bound;
        }
        return to - candidate.data();
    }
};

#define SIZES(FIELD)                                                                        \
    FIELD(int64_t, groups)                                                                  \
    FIELD(int64_t, n)                                                                       \
    FIELD(int64_t, m)                                                                       \
    FIELD(int64_t, d)                                                                       \
    FIELD(int64_t, dv)                                                                      \
    FIELD(int64_t, most)            /* the largest limit */
struct Sizes {
    THRESHER_FIELDS(SIZES)
};

template <class Arguments>
auto tokens_of(const Arguments& a) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(a.queries)>>;
    const Sizes& s = a.sizes;
    return Tokens<S>{a.queries, a.keys, a.values, a.seen, s.groups, s.n, s.m, s.d, s.dv, a.causal, a.shift, a.scale};
}

// Query i sees keys j <= i + shift where causal.
#define ATTEND_ARGUMENTS(FIELD)                                                             \
    FIELD(Sizes, sizes)                                                                     \
    FIELD(const S*, queries)        /* [groups, n, d] */                                    \
    FIELD(const S*, keys)           /* [groups, m, d] */                                    \
    FIELD(const S*, values)         /* [groups, m, dv] */                                   \
    FIELD(double, scale)            /* of scores */                                         \
    FIELD(const uint8_t*, seen)     /* keys that are not hidden, [groups, m], or null */    \
    FIELD(const int64_t*, limit)    /* keys that each query keeps, [groups, n] */           \
    FIELD(int64_t, causal)                                                                  \
    FIELD(int64_t, shift)                                                                   \
    FIELD(const T*, tail_factor)    /* [groups], or null: rows have no tail */              \
    FIELD(const T*, key_sum)        /* of the keys that the one query of a group sees, [groups, d], or null */ \
    FIELD(const T*, value_sum)      /* likewise of values, [groups, dv] */                  \
    FIELD(T*, out)                  /* [groups, n, dv] */                                   \
    FIELD(T*, weights)              /* with a tail, less that of a dropped key, [groups, n, most] */ \
    FIELD(T*, tail_weight)          /* of a dropped key, less its factor, [groups, n], or null */ \
    FIELD(int32_t*, kept)           /* keys that weights belong to, -1 where there is none */ \
    FIELD(int64_t, threads)
template <class S, class T = Number<S>>
struct AttendArguments {
    THRESHER_FIELDS(ATTEND_ARGUMENTS)
};

#define BACK_ARGUMENTS(FIELD)                                                               \
    FIELD(Sizes, sizes)                                                                     \
    FIELD(const S*, queries)                                                                \
    FIELD(const S*, keys)                                                                   \
    FIELD(const S*, values)                                                                 \
    FIELD(double, scale)                                                                    \
    FIELD(const uint8_t*, seen)                                                             \
    FIELD(int64_t, causal)                                                                  \
    FIELD(int64_t, shift)                                                                   \
    FIELD(const T*, weights)                                                                \
    FIELD(const int32_t*, kept)                                                             \
    FIELD(const T*, tail_factor)                                                            \
    FIELD(const T*, tail_weight)                                                            \
    FIELD(const T*, out)            /* with a tail */                                       \
    FIELD(const T*, grad)           /* of outputs */                                        \
    FIELD(T*, grad_queries)                                                                 \
    FIELD(T*, grad_keys)                                                                    \
    FIELD(T*, grad_values)                                                                  \
    FIELD(T*, grad_tail_factor)     /* [groups], or null */                                 \
    FIELD(int64_t, threads)
template <class S, class T = Number<S>>
struct BackArguments {
    THRESHER_FIELDS(BACK_ARGUMENTS)
};

// to[p, c, e] = element c of key 16 p + e: panels of 16 keys, the last one padded with zeros.
template <class S>
void panels_of(const S* k, int64_t m, int64_t d, int64_t panel, Factor<S>* to) {
    const int64_t inner = factors<S>(d);
    for (int64_t e = 0; e < BLOCK; ++e) {
        const int64_t j = panel * BLOCK + e;
        for (int64_t c = 0; c < inner; ++c)
            to[(panel * inner + c) * BLOCK + e] = j < m ? factor(k + j * d, c, d) : Factor<S>{};
    }
}

// Finish query i of group g once its scores are known.
template <class S, class T = Number<S>>
void finish(const AttendArguments<S>& a, const Tails<S>& tails, int64_t g, int64_t i, int64_t ahead, Key<T>* score,
            Selector<T>& selector) {
    const Sizes& s = a.sizes;
    const int64_t row = g * s.n + i, number = a.limit[row];
    if (a.seen) {
        const uint8_t* shown = a.seen + g * s.m;
        for (int64_t j = 0; j < ahead; ++j) score[j] = shown[j] ? score[j] : NOTHING<T>;
    }
    T* weight = a.weights + row * s.most;
    int32_t* key = a.kept + row * s.most;
    T of_dropped = 0;
    const RowTail<T> tail = tails ? tails.row(row) : RowTail<T>();
    if (number) {
        selector.select(score, ahead, number, key);
        for (int64_t j = 0; j < number; ++j) weight[j] = number_of<T>(score[key[j]]);
        T row_max, row_sum;
        const T sum = tails ? sum_of(weight, number) : T(0);
        soften(weight, number, row_max, row_sum);
        if (tails) of_dropped = weigh_tail(tail, number, sum, row_max, row_sum, weight);
    }
    if (tails) a.tail_weight[row] = of_dropped;
    start_row(tail, s.dv, of_dropped, a.out + row * s.dv);
    add_rows(a.out + row * s.dv, weight, a.values + g * s.m * s.dv, s.dv, number,
             [=](int64_t j) { return int64_t(key[j]); });
    std::fill(weight + number, weight + s.most, T(0));
    std::fill(key + number, key + s.most, -1);
}

// Many queries: pack the keys, then multiply.
template <class S, class T = Number<S>>
void attend_many(const AttendArguments<S> a) {
    const Sizes& s = a.sizes;
    const Tokens<S> tokens = tokens_of(a);
    const Tails<S> tails(tokens, a.tail_factor, a.threads);
    const int64_t threads = a.threads;
    constexpr int64_t ROWS = Wide<T>::ROWS;
    const int64_t panels = (s.m + BLOCK - 1) / BLOCK, width = panels * BLOCK, inner = factors<S>(s.d);
    const int64_t rows = std::clamp<int64_t>(SCORES / (width * int64_t(sizeof(T)) + 1) / ROWS, 1, 48 / ROWS) * ROWS;
    std::vector<Factor<S>> packed(panels * inner * BLOCK);
    for (int64_t g = 0; g < s.groups; ++g) {
        parallel_for(panels, threads,
                     [&](int64_t panel) { panels_of(a.keys + g * s.m * s.d, s.m, s.d, panel, packed.data()); });
        parallel_for((s.n + QUERIES - 1) / QUERIES, threads, [&](int64_t task) {
            std::vector<Key<T>> scores(rows * width);
            std::vector<Factor<S>> queries(rows * inner);
            Selector<T> selector;
            const int64_t end = std::min(s.n, (task + 1) * QUERIES);
            for (int64_t i = task * QUERIES; i < end; i += rows) {
                const int64_t number = std::min(rows, end - i), last = tokens.end(i + number - 1);
                const S* q = a.queries + (g * s.n + i) * s.d;
                for (int64_t r = 0; r < number; ++r)
                    for (int64_t c = 0; c < inner; ++c) queries[r * inner + c] = factor(q + r * s.d, c, s.d);
                Key<T>* to = scores.data();
                const T scale = T(a.scale);
                for (int64_t panel = 0; panel * BLOCK < last; ++panel)
                    multiply(Left<Factor<S>>{queries.data(), inner, 1}, &packed[panel * inner * BLOCK], BLOCK, number,
                             BLOCK, inner, [=](int64_t r, int64_t c, Vector<T> x) {
                                 *reinterpret_cast<typename Keys<T>::Loose*>(to + r * width + panel * BLOCK + c) =
                                     ordered<T>(x * scale);
                             });
                for (int64_t r = 0; r < number; ++r)
                    finish(a, tails, g, i + r, tokens.end(i + r), to + r * width, selector);
            }
        });
    }
}

// Few queries: read the keys where they lie, once for each query.
template <class S, class T = Number<S>>
void attend_few(const AttendArguments<S> a) {
    const Sizes& s = a.sizes;
    const Tokens<S> tokens = tokens_of(a);
    const Tails<S> tails(tokens, a.tail_factor, a.threads, a.key_sum, a.value_sum);
    parallel_for(s.groups * s.n, a.threads, [&](int64_t row) {
        const int64_t g = row / s.n, ahead = tokens.end(row % s.n), whole = padded(ahead);
        const T scale = T(a.scale);
        std::vector<T> product(whole);
        std::vector<Key<T>> scores(whole);
        dots(a.queries + row * s.d, a.keys + g * s.m * s.d, s.d, ahead, [](int64_t j) { return j; }, product.data());
        for (int64_t j = 0; j < whole; j += Wide<T>::LANES)
            *reinterpret_cast<typename Keys<T>::Loose*>(&scores[j]) = ordered<T>(load(&product[j]) * scale);
        Selector<T> selector;
        finish(a, tails, g, row % s.n, ahead, scores.data(), selector);
    });
}

template <class S>
void attend(const AttendArguments<S> a) {
    if (a.sizes.n <= FEW)
        attend_few(a);
    else
        attend_many(a);
}

template <class S, class T = Number<S>>
void back(const BackArguments<S> a) {
    const Sizes& s = a.sizes;
    const int64_t threads = a.threads;
    const T scale = T(a.scale);
    const S* q = a.queries;
    const T* grad = a.grad;
    const int32_t* index = a.kept;
    const Tokens<S> tokens = tokens_of(a);
    const Tails<S> tails(tokens, a.tail_factor, threads);
    TailGradients<S> of_tails(tokens, bool(tails));
    std::vector<T> through(s.n * s.most);
    for (int64_t g = 0; g < s.groups; ++g) {
        parallel_for((s.n + QUERIES - 1) / QUERIES, threads, [&](int64_t task) {
            for (int64_t i = task * QUERIES; i < std::min(s.n, (task + 1) * QUERIES); ++i) {
                const int64_t row = g * s.n + i;
                const T* w = a.weights + row * s.most;
                const int32_t* x = index + row * s.most;
                T* t = &through[i * s.most];
                const int64_t kept = std::find(x, x + s.most, -1) - x;
                const auto at = [=](int64_t j) { return int64_t(x[j]); };
                dots(grad + row * s.dv, a.values + g * s.m * s.dv, s.dv, kept, at, t);
                T mean = 0;
                TailGradient<T> of_tail;
                if (tails) {
                    mean = dot(grad + row * s.dv, a.out + row * s.dv, s.dv);
                    of_tail = TailGradient<T>(tails.row(row), s.dv, a.tail_weight[row], kept, T(0), sum_of(t, kept), mean,
                                              grad + row * s.dv);
                    of_tails.set(row, of_tail);
                } else {
                    for (int64_t j = 0; j < kept; ++j) mean += w[j] * t[j];
                }
                for (int64_t j = 0; j < kept; ++j)
                    t[j] = ((w[j] + of_tail.weight) * (t[j] - mean) - of_tail.through) * scale;
                std::fill_n(a.grad_queries + row * s.d, s.d, T(0));
                add_rows(a.grad_queries + row * s.d, t, a.keys + g * s.m * s.d, s.d, kept, at);
            }
        });
        // Each task owns some channels of all keys, so that sums over queries keep their order.
        const int64_t of_k = (s.d + CHANNELS - 1) / CHANNELS, of_v = (s.dv + CHANNELS - 1) / CHANNELS;
        parallel_for(of_k + of_v, threads, [&](int64_t task) {
            const bool keys = task < of_k;
            const int64_t width = keys ? s.d : s.dv, first = (keys ? task : task - of_k) * CHANNELS;
            const int64_t number = std::min(CHANNELS, width - first);
            T* to = (keys ? a.grad_keys + g * s.m * s.d : a.grad_values + g * s.m * s.dv) + first;
            for (int64_t j = 0; j < s.m; ++j) std::fill_n(to + j * width, number, T(0));
            for (int64_t i = 0; i < s.n; ++i) {
                const T* share = keys ? &through[i * s.most] : a.weights + (g * s.n + i) * s.most;
                const int32_t* x = index + (g * s.n + i) * s.most;
                T row[CHANNELS];
                const int64_t from = (g * s.n + i) * width + first;
                for (int64_t c = 0; c < number; ++c) row[c] = keys ? as_number(q[from + c]) : grad[from + c];
                for (int64_t j = 0; j < s.most && x[j] >= 0; ++j) {
                    T* sum = to + x[j] * width;
                    if (number == CHANNELS)
                        for (int64_t c = 0; c < CHANNELS; ++c) sum[c] += share[j] * row[c];
                    else
                        for (int64_t c = 0; c < number; ++c) sum[c] += share[j] * row[c];
                }
            }
        });
    }
    of_tails.spread(tokens, grad, a.grad_queries, a.grad_keys, a.grad_values, a.grad_tail_factor, threads);
}

}  // namespace

#define EXPORT_FOR(S, NAME)                             \
    THRESHER_EXPORT(attend, AttendArguments, S, NAME)   \
    THRESHER_EXPORT(back, BackArguments, S, NAME)

EXPORT_FOR(float, float32)
EXPORT_FOR(double, float64)
EXPORT_FOR(Bf16, bfloat16)
