// LATTE: scores estimated from integer codes, a threshold below the best of each row, attention over what is left.
//
// A task takes some queries. It first lists the keys that each of them needs, then goes through the keys block by block,
// so that keys and values stay in cache while all its queries look at them. Backward estimates anew instead of keeping
// lists: memory is linear in the number of tokens. Work is divided by sizes only, never by the number of threads.

#include <memory>

#include "exponential.h"
#include "latte_select.h"
#include "matrix.h"
#include "parallel.h"
#include "shares.h"

using namespace thresher;

namespace {

constexpr int64_t QUERIES = 128;         // of a task
constexpr int64_t CACHE = 128 * 1024;    // bytes of keys and values that a task looks at again and again
constexpr int64_t SPLITS = 16;           // tasks that backward makes at least, if there are queries enough
constexpr double MAX_EXCESS = 30;        // nats by which a dropped key may outweigh the best kept one

// Keys that the queries of a task need, ascending; those that are dropped, but near the threshold, as ~key.
template <class T>
struct Lists {
    std::vector<int32_t> key;   // with room to grow behind those of the last query
    std::vector<T> slope;       // of the gate, if asked for
    std::vector<int64_t> start, kept;
    std::vector<T> unit;

    void clear() {
        unit.clear();
        kept.clear();
        start.assign(1, 0);
    }
};

template <class T, class E>
inline void list_row(const Call<T>& s, int64_t g, const std::vector<uint32_t>& seen, const Row<T, E>& row, E top,
                     int64_t stop, T width, Lists<T>& lists) {
    const T theta = s.theta[g];
    const bool banded = width > 0 && !row.broken && std::isfinite(theta);
    const E cut = row.broken ? top : row.cut(top, theta), low = banded ? row.cut(top, theta + width) : cut;
    const int64_t begin = lists.start.back();
    const size_t room = begin + stop + KEYS;
    if (lists.key.size() < room) lists.key.resize(2 * room);
    int32_t* to = lists.key.data() + begin;
    for (int64_t j = 0; j < stop; j += KEYS) {
        const uint32_t within = stop - j < KEYS ? (1u << (stop - j)) - 1 : ~0u;
        const int64_t left = s.always - j;
        const uint32_t always = left <= 0 ? 0 : left < KEYS ? (1u << left) - 1 : ~0u;
        to = write_places(seen[j / KEYS] & within & (always | (row.broken ? 0 : reach(row.estimate + j, low))), j, to);
    }
    const int64_t at = to - lists.key.data();
    int64_t kept = at - begin;
    if (width > 0 && lists.slope.size() < lists.key.size()) lists.slope.resize(lists.key.size());
    if (width > 0 && !banded) std::fill(lists.slope.begin() + begin, lists.slope.begin() + at, T(0));
    if (banded) {
        const T a_step = row.step_of_difference(), narrower = 1 / width;
        int32_t* key = lists.key.data();
        T* slope = lists.slope.data();
        kept = 0;
        for (int64_t x = begin; x < at; ++x) {
            const int32_t j = key[x];
            const E e = row.estimate[j];
            const bool keep = e >= cut || j < s.always;
            const T u = (theta - T(top - e) * a_step) * narrower, steep = T(0.75) * (1 - u * u) * narrower;
            slope[x] = j >= s.always && steep > 0 ? steep : T(0);
            key[x] = keep ? j : ~j;
            kept += keep;
        }
    }
    lists.start.push_back(at);
    lists.kept.push_back(kept);
    lists.unit.push_back(row.unit);
}

template <bool NARROW, class E, class T>
void list_rows(const Call<T>& s, int64_t g, const Packed<T, NARROW>& keys, const Sums<T>& sums, int64_t first,
               int64_t last, T width, Lists<T>& lists) {
    lists.clear();
    judge_rows<NARROW, E>(s, g, keys, sums, first, last, [&](int64_t i, const Row<T, E>& row, E top, int64_t stop) {
        const bool shown = !s.shown_q || s.shown_q[g * s.n + i];
        list_row(s, g, keys.seen, row, top, shown ? stop : 0, width, lists);
    });
}

// The totals of four vectors.
template <class T>
inline void totals(const Vector<T> (&sum)[4], T* to) {
    for (int z = 0; z < 4; ++z) to[z] = total<T>(sum[z]);
}
#if defined(__AVX__) && !defined(__AVX512F__)
template <>
inline void totals<float>(const Vector<float> (&sum)[4], float* to) {
    const __m256 two = _mm256_hadd_ps((__m256)sum[0], (__m256)sum[1]), more = _mm256_hadd_ps((__m256)sum[2], (__m256)sum[3]);
    const __m256 all = _mm256_hadd_ps(two, more);
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
#endif

// Dot products of x with rows of y.
template <class T, class At>
inline void dots(const T* x, const T* y, int64_t d, int64_t number, const At& at, T* to) {
    constexpr int64_t LANES = Wide<T>::LANES;
    int64_t i = 0;
    for (; i + 4 <= number; i += 4) {
        const T *a = y + at(i) * d, *b = y + at(i + 1) * d, *e = y + at(i + 2) * d, *f = y + at(i + 3) * d;
        Vector<T> sum[4] = {};
        int64_t c = 0;
        for (; c + LANES <= d; c += LANES) {
            const Vector<T> z = load(x + c);
            sum[0] += z * load(a + c);
            sum[1] += z * load(b + c);
            sum[2] += z * load(e + c);
            sum[3] += z * load(f + c);
        }
        totals<T>(sum, to + i);
        for (; c < d; ++c) {
            to[i] += x[c] * a[c];
            to[i + 1] += x[c] * b[c];
            to[i + 2] += x[c] * e[c];
            to[i + 3] += x[c] * f[c];
        }
    }
    for (; i < number; ++i) {
        const T* a = y + at(i) * d;
        Vector<T> sum{};
        int64_t c = 0;
        for (; c + LANES <= d; c += LANES) sum += load(x + c) * load(a + c);
        T rest = 0;
        for (; c < d; ++c) rest += x[c] * a[c];
        to[i] = total<T>(sum) + rest;
    }
}

// to = factor * to + the sum of rows of y times their share.
template <class T, class At>
inline void add_rows(T* to, T factor, const T* share, const T* y, int64_t d, int64_t number, const At& at) {
    constexpr int64_t LANES = Wide<T>::LANES, MANY = 8;
    int64_t c = 0;
    for (; c + MANY * LANES <= d; c += MANY * LANES) {
        Vector<T> sum[MANY];
        for (int64_t z = 0; z < MANY; ++z) sum[z] = factor * load(to + c + z * LANES);
        for (int64_t i = 0; i < number; ++i) {
            const T* row = y + at(i) * d + c;
            for (int64_t z = 0; z < MANY; ++z) sum[z] += share[i] * load(row + z * LANES);
        }
        for (int64_t z = 0; z < MANY; ++z) store(to + c + z * LANES, sum[z]);
    }
    for (; c + LANES <= d; c += LANES) {
        Vector<T> sum = factor * load(to + c);
        for (int64_t i = 0; i < number; ++i) sum += share[i] * load(y + at(i) * d + c);
        store(to + c, sum);
    }
    for (; c < d; ++c) {
        T sum = factor * to[c];
        for (int64_t i = 0; i < number; ++i) sum += share[i] * y[at(i) * d + c];
        to[c] = sum;
    }
}

template <class T>
int64_t block_of_keys(const Call<T>& s, int64_t copies) {
    const int64_t bytes = (s.d + s.dv) * copies * int64_t(sizeof(T));
    return std::max<int64_t>(CACHE / bytes / KEYS, 1) * KEYS;
}

// Call look(i, begin, end) with the keys of each list that lie in a block, and then done(block), block after block.
template <class T, class Look, class Done>
void by_blocks(const Call<T>& s, const Lists<T>& lists, int64_t block, Look&& look, Done&& done) {
    const int64_t rows = lists.start.size() - 1;
    std::vector<int64_t> at(lists.start.begin(), lists.start.end() - 1);
    for (int64_t stop = block; stop - block < s.m; stop += block) {
        for (int64_t i = 0; i < rows; ++i) {
            const auto before = [](int32_t key, int64_t bound) { return (key < 0 ? ~key : key) < bound; };
            const auto from = lists.key.begin();
            const int64_t end = std::lower_bound(from + at[i], from + lists.start[i + 1], stop, before) - from;
            if (end > at[i]) look(i, at[i], end);
            at[i] = end;
        }
        done(stop - block);
    }
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

template <bool NARROW, class E, class T>
void attend(const Call<T>& s, const T* q, const T* k, const T* v, T* out, int32_t* kept, T* top, T* mass,
            int64_t threads) {
    const auto prepared = prepare<T, NARROW>(s, threads);
    const int64_t tasks = (s.n + QUERIES - 1) / QUERIES, block = block_of_keys(s, 1);
    parallel_for(s.groups * tasks, threads, [&](int64_t task) {
        constexpr int64_t LANES = Wide<T>::LANES;
        const int64_t g = task / tasks, part = task % tasks, first = part * QUERIES;
        const int64_t last = std::min(s.n, first + QUERIES);
        Lists<T> lists;
        list_rows<NARROW, E>(s, g, prepared[g]->keys, prepared[g]->sums[part], first, last, T(0), lists);
        const T *keys = k + g * s.m * s.d, *values = v + g * s.m * s.dv;
        for (int64_t i = first; i < last; ++i) {
            const int64_t row = g * s.n + i;
            kept[row] = int32_t(lists.kept[i - first]);
            top[row] = -std::numeric_limits<T>::infinity();
            mass[row] = 0;
            std::fill_n(out + row * s.dv, s.dv, T(0));
        }
        std::vector<T> w(block + LANES);
        by_blocks(s, lists, block, [&](int64_t i, int64_t begin, int64_t end) {
            const int64_t row = g * s.n + first + i, number = end - begin;
            const auto at = [&](int64_t x) { return int64_t(lists.key[begin + x]); };
            dots(q + row * s.d, keys, s.d, number, at, w.data());
            for (int64_t x = number; x % LANES; ++x) w[x] = -std::numeric_limits<T>::infinity();
            Vector<T> most = Vector<T>{} + top[row], sum{};
            for (int64_t x = 0; x < number; x += LANES) most = load(&w[x]) > most ? load(&w[x]) : most;
            const T best = largest<T>(most);
            for (int64_t x = 0; x < number; x += LANES) {
                const Vector<T> e = exponential(load(&w[x]) - best);
                store(&w[x], e);
                sum += e;
            }
            const T factor = mass[row] == 0 ? T(0) : std::exp(top[row] - best);
            top[row] = best;
            mass[row] = mass[row] * factor + total<T>(sum);
            add_rows(out + row * s.dv, factor, w.data(), values, s.dv, number, at);
        }, [](int64_t) {});
        for (int64_t row = g * s.n + first; row < g * s.n + last; ++row)
            for (int64_t c = 0; kept[row] && c < s.dv; ++c) out[row * s.dv + c] /= mass[row];
    });
}

// What the gradients of the outputs, and of how much is kept, are to queries, keys, values and thresholds.
template <bool NARROW, class E, class T>
void back(const Call<T>& s, const T* grad, const T* grad_kept, const T* q, const T* k, const T* v, const T* out,
          const T* top, const T* mass, T width, bool into_scores, T* into_q, T* into_k, T* into_v, T* into_theta,
          int64_t threads) {
    const auto prepared = prepare<T, NARROW>(s, threads);
    const int64_t blocks = (s.n + QUERIES - 1) / QUERIES, block = block_of_keys(s, 2);
    const int64_t splits = std::max<int64_t>(std::min((SPLITS + s.groups - 1) / std::max<int64_t>(s.groups, 1), blocks), 1);
    const int64_t size_k = s.m * s.d, size_v = s.m * s.dv;
    std::vector<T> parts_k(s.groups * splits * size_k, T(0)), parts_v(s.groups * splits * size_v, T(0));
    std::vector<double> parts_theta(s.groups * splits, 0.0);
    parallel_for(s.groups * splits, threads, [&](int64_t task) {
        constexpr int64_t LANES = Wide<T>::LANES;
        const int64_t g = task / splits;
        const T *keys = k + g * size_k, *values = v + g * size_v;
        T *to_k = &parts_k[task * size_k], *to_v = &parts_v[task * size_v];
        Lists<T> lists;
        std::vector<T> w(block + LANES), through(block + LANES);
        Shares<T> shares;
        // Blocks are dealt out in turn: in causal attention the last ones are the longest.
        for (int64_t part = task % splits; part < blocks; part += splits) {
            const int64_t first = part * QUERIES, last = std::min(s.n, first + QUERIES);
            list_rows<NARROW, E>(s, g, prepared[g]->keys, prepared[g]->sums[part], first, last, width, lists);
            std::fill_n(into_q + (g * s.n + first) * s.d, (last - first) * s.d, T(0));
            std::vector<T> constant(last - first);
            for (int64_t i = first; i < last; ++i) {
                const int64_t row = g * s.n + i;
                dots(grad + row * s.dv, out + row * s.dv, s.dv, 1, [](int64_t) { return 0; }, &constant[i - first]);
            }
            for (int64_t x = 0; width > 0 && x < lists.start.back(); ++x)
                parts_theta[task] += double(grad_kept[g]) * lists.slope[x];
            by_blocks(s, lists, block, [&](int64_t i, int64_t begin, int64_t end) {
                const int64_t row = g * s.n + first + i, number = end - begin;
                const int32_t* key = &lists.key[begin];
                const auto at = [&](int64_t x) { return int64_t(key[x] < 0 ? ~key[x] : key[x]); };
                if (mass[row] == 0) return;
                dots(q + row * s.d, keys, s.d, number, at, w.data());
                dots(grad + row * s.dv, values, s.dv, number, at, through.data());
                const T one = 1 / mass[row], worth = into_scores ? 1 / std::max(lists.unit[i], T(1)) : T(0);
                const Vector<T> excess = Vector<T>{} + T(MAX_EXCESS);
                for (int64_t x = number; x % LANES; ++x) w[x] = top[row];
                for (int64_t x = 0; x < number; x += LANES) {
                    Vector<T> over = load(&w[x]) - top[row];
                    over = over > excess ? excess : over;
                    store(&w[x], exponential(over) * one);
                }
                T* to_q = into_q + row * s.d;
                double task_theta = 0;
                for (int64_t x = 0; x < number; ++x) {
                    const T benefit = w[x] * (through[x] - constant[i]);
                    const T gate = width > 0 ? lists.slope[begin + x] * benefit : T(0);
                    task_theta += gate;
                    through[x] = (key[x] < 0 ? T(0) : benefit) + worth * gate;
                    shares.add(at(x), row, through[x], key[x] < 0 ? T(0) : w[x]);
                }
                parts_theta[task] += task_theta;
                add_rows(to_q, T(1), through.data(), keys, s.d, number, at);
            }, [&](int64_t start) {
                shares.deal(start, block, [&](int64_t j, int64_t number, const int32_t* rows, const T* key, const T* val) {
                    const auto at = [&](int64_t x) { return int64_t(rows[x]); };
                    add_rows(to_k + j * s.d, T(1), key, q, s.d, number, at);
                    add_rows(to_v + j * s.dv, T(1), val, grad, s.dv, number, at);
                });
            });
        }
    });
    parallel_for(s.groups, threads, [&](int64_t g) {
        const auto add_up = [&](const std::vector<T>& parts, int64_t size, T* to) {
            std::copy_n(parts.data() + g * splits * size, size, to + g * size);
            for (int64_t split = 1; split < splits; ++split)
                for (int64_t x = 0; x < size; ++x) to[g * size + x] += parts[(g * splits + split) * size + x];
        };
        add_up(parts_k, size_k, into_k);
        add_up(parts_v, size_v, into_v);
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
#define FOR_TYPE(T, NAME)                                                                                              \
    extern "C" void attend_##NAME(CALL(T), const T* q, const T* k, const T* v, T* out, int32_t* kept, T* top, T* mass, \
                                  int64_t threads) {                                                                   \
        const Call<T> s GIVEN;                                                                                         \
        with_types(s, [&](auto small, auto e) {                                                                        \
            attend<decltype(small)::value, decltype(e)>(s, q, k, v, out, kept, top, mass, threads);                    \
        });                                                                                                            \
    }                                                                                                                  \
    extern "C" void back_##NAME(CALL(T), const T* grad, const T* grad_kept, const T* q, const T* k, const T* v,        \
                                const T* out, const T* top, const T* mass, double width, int64_t into_scores,          \
                                T* into_q, T* into_k, T* into_v, T* into_theta, int64_t threads) {                     \
        const Call<T> s GIVEN;                                                                                         \
        with_types(s, [&](auto small, auto e) {                                                                        \
            back<decltype(small)::value, decltype(e)>(s, grad, grad_kept, q, k, v, out, top, mass, T(width),           \
                                                      into_scores, into_q, into_k, into_v, into_theta, threads);       \
        });                                                                                                            \
    }

FOR_TYPE(float, float32)
FOR_TYPE(double, float64)
