// YOSO's sums over colliding tokens: codes, hash tables, and the gradients of queries and keys.
//
// Sums over hashes and over tokens keep one order, whatever the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "arguments.h"
#include "matrix.h"
#include "parallel.h"

using namespace thresher;

namespace {

constexpr int64_t CHANNELS = 32;           // of the values that one task sums in all tables
constexpr int64_t TABLES = 256 * 1024;     // bytes of tables at a time, to stay in the L2 cache
constexpr int64_t TOGETHER = 8;            // hashes at a time, at most
constexpr int64_t RUN = 256;               // tokens whose codes one task writes
constexpr int64_t BUCKETS = 64;            // tasks that share the buckets of a hash
constexpr int64_t AHEAD = 64;              // queries of a causal bucket that meet the keys among them pair by pair

#define PACK_ARGUMENTS(FIELD)                                                                   \
    FIELD(const T*, projections)    /* [tokens, hashes * bits] */                               \
    FIELD(int16_t*, codes)          /* [hashes, tokens] */                                      \
    FIELD(int64_t, tokens)                                                                      \
    FIELD(int64_t, hashes)                                                                      \
    FIELD(int64_t, bits)                                                                        \
    FIELD(int64_t, threads)
template <class T>
struct PackArguments {
    THRESHER_FIELDS(PACK_ARGUMENTS)
};

// Which senders j a receiver i reads: all, j <= i + shift, or j >= i - shift.
enum Order : int64_t { ALL, PAST, LATER };

#define SUMS_ARGUMENTS(FIELD)                                                                   \
    FIELD(const int16_t*, receiver_codes)   /* [hashes, groups, receivers] */                   \
    FIELD(const int16_t*, sender_codes)     /* [hashes, groups, senders] */                     \
    FIELD(const uint8_t*, seen)             /* senders that write, [groups, senders], or null */ \
    FIELD(const T*, sent)                   /* [groups, senders, channels] */                   \
    FIELD(T*, sums)                         /* [groups, receivers, channels] */                 \
    FIELD(T*, counts)                       /* of rows in each sum, [groups, receivers] */      \
    FIELD(int64_t, groups)                                                                      \
    FIELD(int64_t, receivers)                                                                   \
    FIELD(int64_t, senders)                                                                     \
    FIELD(int64_t, channels)                                                                    \
    FIELD(int64_t, hashes)                                                                      \
    FIELD(int64_t, slots)                   /* different codes */                               \
    FIELD(int64_t, order)                   /* an Order */                                      \
    FIELD(int64_t, shift)                                                                       \
    FIELD(int64_t, threads)
template <class T>
struct SumsArguments {
    THRESHER_FIELDS(SUMS_ARGUMENTS)
};

// Query i sees keys j <= i + shift where causal.
#define BOUND_ARGUMENTS(FIELD)                                                                  \
    FIELD(const T*, queries)                /* [groups, n, d] */                                \
    FIELD(const T*, keys)                   /* [groups, m, d] */                                \
    FIELD(const T*, values)                 /* [groups, m, dv] */                               \
    FIELD(const T*, grad)                   /* of the sums of values, [groups, n, dv] */        \
    FIELD(const int16_t*, q_codes)          /* [hashes, groups, n] */                           \
    FIELD(const int16_t*, k_codes)          /* [hashes, groups, m] */                           \
    FIELD(const uint8_t*, seen)             /* keys that count, [groups, m], or null */         \
    FIELD(T*, grad_queries)                                                                     \
    FIELD(T*, grad_keys)                                                                        \
    FIELD(int64_t, groups)                                                                      \
    FIELD(int64_t, n)                                                                           \
    FIELD(int64_t, m)                                                                           \
    FIELD(int64_t, d)                                                                           \
    FIELD(int64_t, dv)                                                                          \
    FIELD(int64_t, hashes)                                                                      \
    FIELD(int64_t, slots)                                                                       \
    FIELD(int64_t, causal)                                                                      \
    FIELD(int64_t, shift)                                                                       \
    FIELD(double, scale)                    /* of results */                                    \
    FIELD(int64_t, threads)
template <class T>
struct BoundArguments {
    THRESHER_FIELDS(BOUND_ARGUMENTS)
};

template <int64_t WIDTH, class T>
inline void add_row(T* to, const T* from, int64_t width) {
    const int64_t w = WIDTH ? WIDTH : width;
    for (int64_t c = 0; c < w; ++c) to[c] += from[c];
}

template <int64_t WIDTH, class T>
class Tables {
  public:
    // Channels [channel, channel + width) of group g; the task of the first channels also counts rows.
    Tables(const SumsArguments<T>& a, int64_t g, int64_t channel, int64_t width)
        : a(a), receive(a.receiver_codes + g * a.receivers), send(a.sender_codes + g * a.senders),
          seen(a.seen ? a.seen + g * a.senders : nullptr), sent(a.sent + g * a.senders * a.channels + channel),
          sums(a.sums + g * a.receivers * a.channels + channel), counts(channel ? nullptr : a.counts + g * a.receivers),
          w(WIDTH ? WIDTH : width),
          together(std::clamp<int64_t>(TABLES / (a.slots * w * int64_t(sizeof(T))), 1, TOGETHER)),
          table(together * a.slots * w), count(counts ? together * a.slots : 0) {}

    void run() {
        for (int64_t h = 0; h < a.hashes; h += together) {
            some = std::min(together, a.hashes - h);
            first = h;
            std::fill(table.begin(), table.end(), T(0));
            std::fill(count.begin(), count.end(), 0);
            if (a.order == ALL) {
                for (int64_t j = 0; j < a.senders; ++j) write(j);
                for (int64_t i = 0; i < a.receivers; ++i) read(i);
            } else if (a.order == PAST) {
                int64_t j = 0;
                for (int64_t i = 0; i < a.receivers; ++i) {
                    for (; j < a.senders && j <= i + a.shift; ++j) write(j);
                    read(i);
                }
            } else {
                int64_t j = a.senders;
                for (int64_t i = a.receivers; i-- > 0;) {
                    for (; j > 0 && j - 1 >= i - a.shift; --j) write(j - 1);
                    read(i);
                }
            }
        }
    }

  private:
    const SumsArguments<T>& a;
    const int16_t *receive, *send;
    const uint8_t* seen;
    const T* sent;
    T *sums, *counts;
    const int64_t w, together;
    int64_t some = 0, first = 0;
    std::vector<T> table;
    std::vector<int32_t> count;

    void write(int64_t j) {
        if (seen && !seen[j]) return;
        const int16_t* code = send + first * a.groups * a.senders + j;
        for (int64_t h = 0; h < some; ++h, code += a.groups * a.senders) {
            const int64_t slot = h * a.slots + *code;
            add_row<WIDTH>(&table[slot * w], sent + j * a.channels, w);
            if (counts) ++count[slot];
        }
    }

    void read(int64_t i) {
        const int16_t* code = receive + first * a.groups * a.receivers + i;
        int64_t total = 0;
        for (int64_t h = 0; h < some; ++h, code += a.groups * a.receivers) {
            const int64_t slot = h * a.slots + *code;
            add_row<WIDTH>(sums + i * a.channels, &table[slot * w], w);
            if (counts) total += count[slot];
        }
        if (counts) counts[i] += static_cast<T>(total);
    }
};

// The gradients of the queries and keys of a group; padded rows are [query | gradient] and [key | value].
template <class T>
class Gradients {
  public:
    Gradients(int64_t d, int64_t dv) : d(padded(d)), dv(padded(dv)) {}

    // Add the gradients of one bucket: queries `is` and keys `js`, both in ascending order.
    void bucket(const int32_t* is, int64_t n, const int32_t* js, int64_t m, const T* qg, const T* kv,
                T* grad_q, T* grad_k, bool causal, int64_t shift) {
        if (n == 0 || m == 0) return;
        this->is = is, this->js = js, this->grad_q = grad_q, this->grad_k = grad_k;
        // Multiplications: 2 d + dv for a pair, 2 d dv for a token that goes through the table of outer products.
        const bool by_pairs = n * m * (2 * d + dv) <= (n + m) * 2 * d * dv;
        gather(is, n, qg, query, grad);
        gather(js, m, kv, key, value);
        if (by_pairs) {
            pairs(0, n, 0, m, causal, shift);
        } else if (!causal) {
            outer.assign(dv * d, T(0));
            add_outer(value.data(), key.data(), 0, m);
            through_outer(grad.data(), 0, n, is, grad_q);
            outer.assign(dv * d, T(0));
            add_outer(grad.data(), query.data(), 0, n);
            through_outer(value.data(), 0, m, js, grad_k);
        } else {
            blocks(n, m, shift);
        }
    }

  private:
    const int64_t d, dv;
    const int32_t *is = nullptr, *js = nullptr;
    T *grad_q = nullptr, *grad_k = nullptr;
    std::vector<T> query, grad, key, value, turned, product, outer;

    void gather(const int32_t* tokens, int64_t number, const T* rows, std::vector<T>& a, std::vector<T>& b) {
        if (static_cast<int64_t>(a.size()) < number * d) a.resize(number * d);
        if (static_cast<int64_t>(b.size()) < number * dv) b.resize(number * dv);
        for (int64_t i = 0; i < number; ++i) {
            const T* row = rows + tokens[i] * (d + dv);
            for (int64_t c = 0; c < d; c += Wide<T>::LANES) store(&a[i * d + c], load(row + c));
            for (int64_t c = 0; c < dv; c += Wide<T>::LANES) store(&b[i * dv + c], load(row + d + c));
        }
    }

    // The pairs of queries [i0, i1) and keys [j0, j1) of the bucket, a cache-sized part of the keys at a time.
    void pairs(int64_t i0, int64_t i1, int64_t j0, int64_t j1, bool causal, int64_t shift) {
        const int64_t n = i1 - i0;
        for (; j0 < j1 && n; j0 += 128) {
            const int64_t m = std::min<int64_t>(j1 - j0, 128), width = padded(m);
            turned.resize(dv * width);
            product.resize(n * width);
            for (int64_t c = 0; c < dv; c += 8) {
                for (int64_t j = 0; j < m; ++j) {
                    const T* from = &value[(j0 + j) * dv + c];
                    T* to = &turned[c * width + j];
                    for (int64_t e = 0; e < 8; ++e) to[e * width] = from[e];
                }
            }
            for (int64_t c = 0; c < dv; ++c) std::fill(&turned[c * width + m], &turned[c * width] + width, T(0));
            T* p = product.data();
            multiply(Left<T>{&grad[i0 * dv], dv, 1}, turned.data(), width, n, width, dv,
                     [=](int64_t i, int64_t j, Vector<T> x) { store(p + i * width + j, x); });
            if (causal)
                for (int64_t i = 0; i < n; ++i)
                    for (int64_t j = m; j-- > 0 && js[j0 + j] > is[i0 + i] + shift;) p[i * width + j] = T(0);
            add_product(Left<T>{p, width, 1}, &key[j0 * d], n, m, is + i0, grad_q);
            add_product(Left<T>{p, 1, width}, &query[i0 * d], m, n, js + j0, grad_k);
        }
    }

    void add_product(Left<T> left, const T* b, int64_t rows, int64_t inner, const int32_t* tokens, T* into) {
        multiply(left, b, d, rows, d, inner, [=](int64_t i, int64_t c, Vector<T> x) {
            T* to = into + tokens[i] * d + c;
            store(to, load(to) + x);
        });
    }

    void add_outer(const T* a, const T* b, int64_t from, int64_t to) {
        T* table = outer.data();
        const int64_t width = d;
        multiply(Left<T>{a + from * dv, 1, dv}, b + from * d, d, dv, d, to - from,
                 [=](int64_t i, int64_t c, Vector<T> x) {
                     store(table + i * width + c, load(table + i * width + c) + x);
                 });
    }

    void through_outer(const T* a, int64_t from, int64_t to, const int32_t* tokens, T* into) {
        add_product(Left<T>{a + from * dv, dv, 1}, outer.data(), to - from, dv, tokens + from, into);
    }

    // Blocks of queries in order: keys that a whole block sees go through the table, the others pair by pair.
    void blocks(int64_t n, int64_t m, int64_t shift) {
        const int64_t number = (n + AHEAD - 1) / AHEAD;
        std::vector<int64_t> full(number + 1, m);
        for (int64_t b = 0; b < number; ++b)
            full[b] = std::upper_bound(js, js + m, is[b * AHEAD] + shift) - js;
        outer.assign(dv * d, T(0));
        for (int64_t b = 0; b < number; ++b) {
            const int64_t i0 = b * AHEAD, i1 = std::min(n, i0 + AHEAD);
            add_outer(value.data(), key.data(), b ? full[b - 1] : 0, full[b]);
            through_outer(grad.data(), i0, i1, is, grad_q);
            pairs(i0, i1, full[b], full[b + 1], true, shift);
        }
        outer.assign(dv * d, T(0));
        for (int64_t b = number; b-- > 0;) {
            if (b + 1 < number) through_outer(value.data(), full[b], full[b + 1], js, grad_k);
            add_outer(grad.data(), query.data(), b * AHEAD, std::min(n, (b + 1) * AHEAD));
        }
        through_outer(value.data(), 0, full[0], js, grad_k);
    }
};

// Sort tokens by code: `start` gets the first place of each code, `token` the tokens, ascending within a code.
void sort_by_code(const int16_t* code, const uint8_t* seen, int64_t n, int64_t slots, int32_t* start, int32_t* token) {
    std::fill_n(start, slots + 1, 0);
    for (int64_t i = 0; i < n; ++i)
        if (!seen || seen[i]) ++start[code[i] + 1];
    for (int64_t c = 0; c < slots; ++c) start[c + 1] += start[c];
    std::vector<int32_t> next(start, start + slots);
    for (int64_t i = 0; i < n; ++i)
        if (!seen || seen[i]) token[next[code[i]]++] = static_cast<int32_t>(i);
}

template <class T>
void side_by_side(const T* a, int64_t wa, const T* b, int64_t wb, T* to) {
    const int64_t first = padded(wa);
    std::fill_n(to, first + padded(wb), T(0));
    std::memcpy(to, a, wa * sizeof(T));
    std::memcpy(to + first, b, wb * sizeof(T));
}

template <class T>
inline uint8_t signs_of_eight(const T* y) {
#if defined(__AVX__)
    if constexpr (sizeof(T) == 4) {
        const __m256 positive = _mm256_cmp_ps(_mm256_loadu_ps(y), _mm256_setzero_ps(), _CMP_GT_OQ);
        return static_cast<uint8_t>(_mm256_movemask_ps(positive));
    }
#endif
    unsigned byte = 0;
    for (int e = 0; e < 8; ++e) byte |= static_cast<unsigned>(y[e] > 0) << e;
    return static_cast<uint8_t>(byte);
}

template <class T>
inline void signs_of_row(const T* y, int64_t number, uint8_t* to) {
    int64_t i = 0;
    for (; i + 8 <= number; i += 8) {
        to[i / 8] = signs_of_eight(y + i);
    }
    if (i < number) {
        unsigned byte = 0;
        for (int e = 0; i + e < number; ++e) byte |= static_cast<unsigned>(y[i + e] > 0) << e;
        to[i / 8] = static_cast<uint8_t>(byte);
    }
}

// Write the signs of projections[t, h * bits ... (h + 1) * bits) to codes[h, t], the first in the lowest bit.
template <class T>
void pack(const PackArguments<T> a) {
    const int64_t tokens = a.tokens, hashes = a.hashes, bits = a.bits, width = hashes * bits;
    const uint32_t mask = (1u << bits) - 1;
    parallel_for((tokens + RUN - 1) / RUN, a.threads, [&](int64_t task) {
        std::vector<uint8_t> signs(width / 8 + 8, 0);
        std::vector<int16_t> run(hashes * RUN);
        const int64_t first = task * RUN, number = std::min(RUN, tokens - first);
        for (int64_t t = 0; t < number; ++t) {
            signs_of_row(a.projections + (first + t) * width, width, signs.data());
            for (int64_t h = 0; h < hashes; ++h) {
                uint32_t word;
                std::memcpy(&word, &signs[h * bits / 8], 4);
                run[h * RUN + t] = static_cast<int16_t>((word >> (h * bits % 8)) & mask);
            }
        }
        for (int64_t h = 0; h < hashes; ++h)
            std::memcpy(a.codes + h * tokens + first, &run[h * RUN], number * sizeof(int16_t));
    });
}

// sums[g, i, c] = sum of sent[g, j, c] over hashes and the senders j that i reads, whose code it shares; counts counts
// them.
template <class T>
void sums(const SumsArguments<T> a) {
    const int64_t parts = std::max<int64_t>((a.channels + CHANNELS - 1) / CHANNELS, 1);
    parallel_for(a.groups * parts, a.threads, [&](int64_t task) {
        const int64_t g = task / parts, c = task % parts * CHANNELS, width = std::min(CHANNELS, a.channels - c);
        T* to = a.sums + g * a.receivers * a.channels + c;
        for (int64_t i = 0; i < a.receivers; ++i) std::fill_n(to + i * a.channels, width, T(0));
        if (c == 0) std::fill_n(a.counts + g * a.receivers, a.receivers, T(0));
        if (width == CHANNELS)
            Tables<CHANNELS, T>(a, g, c, width).run();
        else
            Tables<0, T>(a, g, c, width).run();
    });
}

// grad_queries[g, i] = scale * sum over colliding keys j of (grad_i . v_j) k_j, and grad_keys[g, j] = scale * sum over
// colliding queries i of (grad_i . v_j) q_i.
template <class T>
void bound(const BoundArguments<T> a) {
    const int64_t groups = a.groups, n = a.n, m = a.m, d = a.d, dv = a.dv, hashes = a.hashes, slots = a.slots;
    const int64_t threads = a.threads;
    const T scale = static_cast<T>(a.scale);
    const int64_t width = padded(d), both = width + padded(dv);
    std::vector<T> qg(n * both), kv(m * both), sum_q(n * width), sum_k(m * width);
    std::vector<int32_t> starts_q(hashes * (slots + 1)), starts_k(starts_q), tokens_q(hashes * n), tokens_k(hashes * m);
    for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* shown = a.seen ? a.seen + g * m : nullptr;
        parallel_for(hashes, threads, [&](int64_t h) {
            const int16_t *q_codes = a.q_codes + (h * groups + g) * n, *k_codes = a.k_codes + (h * groups + g) * m;
            sort_by_code(q_codes, nullptr, n, slots, &starts_q[h * (slots + 1)], tokens_q.data() + h * n);
            sort_by_code(k_codes, shown, m, slots, &starts_k[h * (slots + 1)], tokens_k.data() + h * m);
        });
        const auto rows = [&](int64_t number, auto&& work) {
            parallel_for((number + RUN - 1) / RUN, threads, [&](int64_t task) {
                for (int64_t i = task * RUN; i < std::min(number, (task + 1) * RUN); ++i) work(i);
            });
        };
        rows(n, [&](int64_t i) {
            side_by_side(a.queries + (g * n + i) * d, d, a.grad + (g * n + i) * dv, dv, &qg[i * both]);
            std::fill_n(&sum_q[i * width], width, T(0));
        });
        rows(m, [&](int64_t j) {
            side_by_side(a.keys + (g * m + j) * d, d, a.values + (g * m + j) * dv, dv, &kv[j * both]);
            std::fill_n(&sum_k[j * width], width, T(0));
        });
        for (int64_t h = 0; h < hashes; ++h) {
            const int32_t *start_q = &starts_q[h * (slots + 1)], *start_k = &starts_k[h * (slots + 1)];
            // A token lies in one bucket of each hash, so no two buckets write to the same row.
            const int64_t each = (slots + BUCKETS - 1) / BUCKETS;
            parallel_for((slots + each - 1) / each, threads, [&](int64_t task) {
                Gradients<T> gradients(d, dv);
                const int32_t *of_q = tokens_q.data() + h * n, *of_k = tokens_k.data() + h * m;
                for (int64_t c = task * each; c < std::min(slots, (task + 1) * each); ++c)
                    gradients.bucket(of_q + start_q[c], start_q[c + 1] - start_q[c], of_k + start_k[c],
                                     start_k[c + 1] - start_k[c], qg.data(), kv.data(), sum_q.data(), sum_k.data(),
                                     a.causal != 0, a.shift);
            });
        }
        rows(n, [&](int64_t i) {
            for (int64_t c = 0; c < d; ++c) a.grad_queries[(g * n + i) * d + c] = scale * sum_q[i * width + c];
        });
        rows(m, [&](int64_t j) {
            for (int64_t c = 0; c < d; ++c) a.grad_keys[(g * m + j) * d + c] = scale * sum_k[j * width + c];
        });
    }
}

}  // namespace

#define EXPORT_FOR(T, NAME)                             \
    THRESHER_EXPORT(pack, PackArguments, T, NAME)       \
    THRESHER_EXPORT(sums, SumsArguments, T, NAME)       \
    THRESHER_EXPORT(bound, BoundArguments, T, NAME)

EXPORT_FOR(float, float32)
EXPORT_FOR(double, float64)
