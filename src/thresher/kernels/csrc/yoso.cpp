// YOSO's sums over colliding tokens: codes, hash tables, and the gradients to queries and keys.
//
// Sums over hashes and over tokens run in one order whatever the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "matrix.h"
#include "parallel.h"

using namespace thresher;

namespace {

constexpr int64_t CHANNELS = 32;           // of values that one task carries through all tables
constexpr int64_t TABLES = 256 * 1024;     // bytes of the tables that are filled together, to stay in the L2 cache
constexpr int64_t TOGETHER = 8;            // hashes filled together, at most
constexpr int64_t RUN = 256;               // tokens whose codes are written together
constexpr int64_t BUCKETS = 64;              // tasks that the buckets of a hash are divided into
constexpr int64_t AHEAD = 64;              // queries of a causal bucket that are paired with keys one by one

struct Shape {
    int64_t groups, receivers, senders, channels, hashes, slots;
};

// Which senders a receiver reads: all, those up to shift ahead of it, or, turned, those at most shift behind it.
struct Order {
    int64_t kind;  // 0 all, 1 past, 2 turned
    int64_t shift;
};

template <int64_t WIDTH, class T>
inline void add_row(T* to, const T* from, int64_t width) {
    const int64_t w = WIDTH ? WIDTH : width;
    for (int64_t c = 0; c < w; ++c) to[c] += from[c];
}

template <int64_t WIDTH, class T>
class Tables {
  public:
    Tables(const Shape& shape, const int16_t* receivers, const int16_t* senders, const uint8_t* seen, const T* x,
           T* out, T* met, int64_t width)
        : s(shape), receive(receivers), send(senders), seen(seen), x(x), out(out), met(met),
          w(WIDTH ? WIDTH : width), together(std::clamp<int64_t>(TABLES / (s.slots * w * int64_t(sizeof(T))), 1, TOGETHER)),
          table(together * s.slots * w), count(met ? together * s.slots : 0) {}

    void run(Order order) {
        for (int64_t h = 0; h < s.hashes; h += together) {
            some = std::min(together, s.hashes - h);
            first = h;
            std::fill(table.begin(), table.end(), T(0));
            std::fill(count.begin(), count.end(), 0);
            if (order.kind == 0) {
                for (int64_t j = 0; j < s.senders; ++j) write(j);
                for (int64_t i = 0; i < s.receivers; ++i) read(i);
            } else if (order.kind == 1) {
                int64_t j = 0;
                for (int64_t i = 0; i < s.receivers; ++i) {
                    for (; j < s.senders && j <= i + order.shift; ++j) write(j);
                    read(i);
                }
            } else {
                int64_t j = s.senders;
                for (int64_t i = s.receivers; i-- > 0;) {
                    for (; j > 0 && j - 1 >= i - order.shift; --j) write(j - 1);
                    read(i);
                }
            }
        }
    }

  private:
    const Shape& s;
    const int16_t *receive, *send;
    const uint8_t* seen;
    const T* x;
    T *out, *met;
    const int64_t w, together;
    int64_t some = 0, first = 0;
    std::vector<T> table;
    std::vector<int32_t> count;

    void write(int64_t j) {
        if (seen && !seen[j]) return;
        const int16_t* code = send + first * s.groups * s.senders + j;
        for (int64_t h = 0; h < some; ++h, code += s.groups * s.senders) {
            const int64_t slot = h * s.slots + *code;
            add_row<WIDTH>(&table[slot * w], x + j * s.channels, w);
            if (met) ++count[slot];
        }
    }

    void read(int64_t i) {
        const int16_t* code = receive + first * s.groups * s.receivers + i;
        int64_t total = 0;
        for (int64_t h = 0; h < some; ++h, code += s.groups * s.receivers) {
            const int64_t slot = h * s.slots + *code;
            add_row<WIDTH>(out + i * s.channels, &table[slot * w], w);
            if (met) total += count[slot];
        }
        if (met) met[i] += static_cast<T>(total);
    }
};

// One group of heads, with all that belongs to it in padded rows: [q | g] and [k | v].
template <class T>
class Gradients {
  public:
    Gradients(int64_t d, int64_t dv) : d(padded(d)), dv(padded(dv)) {}

    // Add the gradients of one bucket: queries `is` and keys `js`, both in ascending order.
    void bucket(const int32_t* is, int64_t n, const int32_t* js, int64_t m, const T* qg, const T* kv,
                T* into_q, T* into_k, bool causal, int64_t shift) {
        if (n == 0 || m == 0) return;
        this->is = is, this->js = js, this->into_q = into_q, this->into_k = into_k;
        // A pair costs d + d + dv, a token that passes through the table of outer products 2 d dv.
        const bool by_pairs = n * m * (2 * d + dv) <= (n + m) * 2 * d * dv;
        gather(is, n, qg, query, grad);
        gather(js, m, kv, key, value);
        if (by_pairs) {
            pairs(0, n, 0, m, causal, shift);
        } else if (!causal) {
            outer.assign(dv * d, T(0));
            add_outer(value.data(), key.data(), 0, m);
            through_outer(grad.data(), 0, n, is, into_q);
            outer.assign(dv * d, T(0));
            add_outer(grad.data(), query.data(), 0, n);
            through_outer(value.data(), 0, m, js, into_k);
        } else {
            blocks(n, m, shift);
        }
    }

  private:
    const int64_t d, dv;
    const int32_t *is = nullptr, *js = nullptr;
    T *into_q = nullptr, *into_k = nullptr;
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

    // Pairs of queries [i0, i1) and keys [j0, j1) of the bucket, in pieces of keys that stay in cache.
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
            add_product(Left<T>{p, width, 1}, &key[j0 * d], n, m, is + i0, into_q);
            add_product(Left<T>{p, 1, width}, &query[i0 * d], m, n, js + j0, into_k);
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
        multiply(Left<T>{a + from * dv, 1, dv}, b + from * d, d, dv, d, to - from, [=](int64_t i, int64_t c, Vector<T> x) {
            store(table + i * width + c, load(table + i * width + c) + x);
        });
    }

    void through_outer(const T* a, int64_t from, int64_t to, const int32_t* tokens, T* into) {
        add_product(Left<T>{a + from * dv, dv, 1}, outer.data(), to - from, dv, tokens + from, into);
    }

    // Blocks of queries in the order of time: keys that all of a block see go through the table, others pair by pair.
    void blocks(int64_t n, int64_t m, int64_t shift) {
        const int64_t number = (n + AHEAD - 1) / AHEAD;
        std::vector<int64_t> full(number + 1, m);
        for (int64_t b = 0; b < number; ++b)
            full[b] = std::upper_bound(js, js + m, is[b * AHEAD] + shift) - js;
        outer.assign(dv * d, T(0));
        for (int64_t b = 0; b < number; ++b) {
            const int64_t i0 = b * AHEAD, i1 = std::min(n, i0 + AHEAD);
            add_outer(value.data(), key.data(), b ? full[b - 1] : 0, full[b]);
            through_outer(grad.data(), i0, i1, is, into_q);
            pairs(i0, i1, full[b], full[b + 1], true, shift);
        }
        outer.assign(dv * d, T(0));
        for (int64_t b = number; b-- > 0;) {
            if (b + 1 < number) through_outer(value.data(), full[b], full[b + 1], js, into_k);
            add_outer(grad.data(), query.data(), b * AHEAD, std::min(n, (b + 1) * AHEAD));
        }
        through_outer(value.data(), 0, full[0], js, into_k);
    }
};

// Sort tokens by code: `start` gets the first place of each code, `token` the tokens, in ascending order inside a code.
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

// codes[h, t] gets the signs of y[t, h * bits ... (h + 1) * bits), the first in the lowest bit.
template <class T>
void pack(const T* y, int16_t* codes, int64_t tokens, int64_t hashes, int64_t bits, int64_t threads) {
    const int64_t width = hashes * bits;
    const uint32_t mask = (1u << bits) - 1;
    parallel_for((tokens + RUN - 1) / RUN, threads, [&](int64_t task) {
        std::vector<uint8_t> signs(width / 8 + 8, 0);
        std::vector<int16_t> run(hashes * RUN);
        const int64_t first = task * RUN, number = std::min(RUN, tokens - first);
        for (int64_t t = 0; t < number; ++t) {
            signs_of_row(y + (first + t) * width, width, signs.data());
            for (int64_t h = 0; h < hashes; ++h) {
                uint32_t word;
                std::memcpy(&word, &signs[h * bits / 8], 4);
                run[h * RUN + t] = static_cast<int16_t>((word >> (h * bits % 8)) & mask);
            }
        }
        for (int64_t h = 0; h < hashes; ++h)
            std::memcpy(codes + h * tokens + first, &run[h * RUN], number * sizeof(int16_t));
    });
}

// out[g, i, c] = sum over hashes h and senders j with the code of i, and in order, of x[g, j, c]; met counts them.
template <class T>
void sums(const int16_t* receivers, const int16_t* senders, const uint8_t* seen,
                                   const T* x, T* out, T* met, int64_t groups, int64_t n, int64_t k,
                                   int64_t channels, int64_t hashes, int64_t slots, int64_t kind, int64_t shift,
                                   int64_t threads) {
    const Shape shape{groups, n, k, channels, hashes, slots};
    const int64_t parts = std::max<int64_t>((channels + CHANNELS - 1) / CHANNELS, 1);
    parallel_for(groups * parts, threads, [&](int64_t task) {
        const int64_t g = task / parts, c = task % parts * CHANNELS, width = std::min(CHANNELS, channels - c);
        const uint8_t* shown = seen ? seen + g * k : nullptr;
        T* counts = c == 0 && met ? met + g * n : nullptr;
        T* to = out + g * n * channels + c;
        for (int64_t i = 0; i < n; ++i) std::fill_n(to + i * channels, width, T(0));
        if (counts) std::fill_n(counts, n, T(0));
        const int16_t *of_receivers = receivers + g * n, *of_senders = senders + g * k;
        const T* from = x + g * k * channels + c;
        if (width == CHANNELS)
            Tables<CHANNELS, T>(shape, of_receivers, of_senders, shown, from, to, counts, width).run({kind, shift});
        else
            Tables<0, T>(shape, of_receivers, of_senders, shown, from, to, counts, width).run({kind, shift});
    });
}

// into_q[g, i] = scale * sum over colliding keys j of (grad_i . v_j) k_j; into_k likewise, of (grad_i . v_j) q_i.
template <class T>
void bound(const T* q, const T* k, const T* v, const T* grad,
                                    const int16_t* codes_q, const int16_t* codes_k, const uint8_t* seen, T* into_q,
                                    T* into_k, int64_t groups, int64_t n, int64_t m, int64_t d, int64_t dv,
                                    int64_t hashes, int64_t slots, int64_t causal, int64_t shift, double factor,
                                    int64_t threads) {
    const T scale = static_cast<T>(factor);
    const int64_t width = padded(d), both = width + padded(dv);
    std::vector<T> qg(n * both), kv(m * both), sum_q(n * width), sum_k(m * width);
    std::vector<int32_t> starts_q(hashes * (slots + 1)), starts_k(starts_q), tokens_q(hashes * n), tokens_k(hashes * m);
    for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* shown = seen ? seen + g * m : nullptr;
        parallel_for(hashes, threads, [&](int64_t h) {
            sort_by_code(codes_q + (h * groups + g) * n, nullptr, n, slots, &starts_q[h * (slots + 1)], &tokens_q[h * n]);
            sort_by_code(codes_k + (h * groups + g) * m, shown, m, slots, &starts_k[h * (slots + 1)], &tokens_k[h * m]);
        });
        const auto rows = [&](int64_t number, auto&& work) {
            parallel_for((number + RUN - 1) / RUN, threads, [&](int64_t task) {
                for (int64_t i = task * RUN; i < std::min(number, (task + 1) * RUN); ++i) work(i);
            });
        };
        rows(n, [&](int64_t i) {
            side_by_side(q + (g * n + i) * d, d, grad + (g * n + i) * dv, dv, &qg[i * both]);
            std::fill_n(&sum_q[i * width], width, T(0));
        });
        rows(m, [&](int64_t j) {
            side_by_side(k + (g * m + j) * d, d, v + (g * m + j) * dv, dv, &kv[j * both]);
            std::fill_n(&sum_k[j * width], width, T(0));
        });
        for (int64_t h = 0; h < hashes; ++h) {
            const int32_t *start_q = &starts_q[h * (slots + 1)], *start_k = &starts_k[h * (slots + 1)];
            // A token is in one bucket of each hash, so no two buckets write to the same row.
            const int64_t each = (slots + BUCKETS - 1) / BUCKETS;
            parallel_for((slots + each - 1) / each, threads, [&](int64_t task) {
                Gradients<T> gradients(d, dv);
                for (int64_t c = task * each; c < std::min(slots, (task + 1) * each); ++c)
                    gradients.bucket(&tokens_q[h * n] + start_q[c], start_q[c + 1] - start_q[c],
                                     &tokens_k[h * m] + start_k[c], start_k[c + 1] - start_k[c], qg.data(), kv.data(),
                                     sum_q.data(), sum_k.data(), causal != 0, shift);
            });
        }
        rows(n, [&](int64_t i) {
            for (int64_t c = 0; c < d; ++c) into_q[(g * n + i) * d + c] = scale * sum_q[i * width + c];
        });
        rows(m, [&](int64_t j) {
            for (int64_t c = 0; c < d; ++c) into_k[(g * m + j) * d + c] = scale * sum_k[j * width + c];
        });
    }
}

}  // namespace

#define FOR_TYPE(T, NAME)                                                                                              \
    extern "C" void pack_##NAME(const T* y, int16_t* codes, int64_t tokens, int64_t hashes, int64_t bits,              \
                                int64_t threads) {                                                                     \
        pack(y, codes, tokens, hashes, bits, threads);                                                                 \
    }                                                                                                                  \
    extern "C" void sums_##NAME(const int16_t* receivers, const int16_t* senders, const uint8_t* seen, const T* x,     \
                                T* out, T* met, int64_t groups, int64_t n, int64_t k, int64_t channels,                \
                                int64_t hashes, int64_t slots, int64_t kind, int64_t shift, int64_t threads) {         \
        sums(receivers, senders, seen, x, out, met, groups, n, k, channels, hashes, slots, kind, shift, threads);      \
    }                                                                                                                  \
    extern "C" void bound_##NAME(const T* q, const T* k, const T* v, const T* grad, const int16_t* codes_q,            \
                                 const int16_t* codes_k, const uint8_t* seen, T* into_q, T* into_k, int64_t groups,    \
                                 int64_t n, int64_t m, int64_t d, int64_t dv, int64_t hashes, int64_t slots,           \
                                 int64_t causal, int64_t shift, double factor, int64_t threads) {                      \
        bound(q, k, v, grad, codes_q, codes_k, seen, into_q, into_k, groups, n, m, d, dv, hashes, slots, causal,       \
              shift, factor, threads);                                                                                 \
    }

FOR_TYPE(float, float32)
FOR_TYPE(double, float64)
