// Rows that lie apart, gathered into panels: BLOCK columns of a matrix, one row of them after another, so that products
// read memory in order.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "bf16.h"
#include "buffer.h"
#include "matrix.h"
#include "vector.h"

namespace thresher {

template <class T>
inline void make_room(Buffer<T>& x, int64_t size) {
    if (int64_t(x.size()) < size) x.resize(size);
}

constexpr int64_t AHEAD = 8;  // rows that memory is asked for before their turn: they lie apart, and none foresees them

// Always inlined, because GCC takes a function that only prefetches for one without effect, and drops the call.
template <class S>
__attribute__((always_inline)) inline void fetch(const S* row, int64_t width) {
    constexpr int64_t LINE = 64;
    for (int64_t byte = 0; byte < width * int64_t(sizeof(S)); byte += LINE)
        __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
}

// Row i of the matrix is row at(i) of x, as numbers; columns behind `width` are zero.
template <class T, class S, class At>
inline void gather(const S* x, int64_t width, int64_t rows, const At& at, Buffer<T>& to) {
    const int64_t columns = padded(width);
    make_room(to, columns * rows);
    for (int64_t i = 0; i < rows; ++i) {
        const S* from = x + at(i) * width;
        fetch(x + at(std::min(i + AHEAD, rows - 1)) * width, width);
        for (int64_t c = 0; c < columns; c += BLOCK) {
            T* out = &to[c * rows + i * BLOCK];
            if (c + BLOCK <= width) {
                for (int64_t z = 0; z < BLOCK; z += Wide<T>::LANES) store(out + z, load_numbers(from + c + z));
                continue;
            }
            for (int64_t z = 0; z < BLOCK; ++z) out[z] = c + z < width ? as_number(from[c + z]) : T(0);
        }
    }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define THRESHER_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif

// A square of as many rows as a vector has lanes.
template <class T>
using Square = Vector<T>[Wide<T>::LANES];

// Swap two blocks of FAR rows and FAR lanes beside the diagonal, in each square of 2 FAR.
template <int FAR, class T, int... LANE>
inline void swap_blocks(Square<T>& x, std::integer_sequence<int, LANE...>) {
    constexpr int LANES = sizeof...(LANE);
    for (int i = 0; i < LANES; ++i) {
        if (i & FAR) continue;
        const Vector<T> one = x[i], two = x[i + FAR];
#if defined(THRESHER_SHUFFLE)
        x[i] = THRESHER_SHUFFLE(one, two, (LANE & FAR ? LANES + (LANE ^ FAR) : LANE)...);
        x[i + FAR] = THRESHER_SHUFFLE(one, two, (LANE & FAR ? LANES + LANE : LANE ^ FAR)...);
#else
        x[i] = Vector<T>{(LANE & FAR ? two[LANE ^ FAR] : one[LANE])...};
        x[i + FAR] = Vector<T>{(LANE & FAR ? two[LANE] : one[LANE ^ FAR])...};
#endif
    }
}

template <class T, int FAR = Wide<T>::LANES / 2>
inline void transpose(Square<T>& x) {
    if constexpr (FAR > 0) {
        swap_blocks<FAR, T>(x, std::make_integer_sequence<int, Wide<T>::LANES>{});
        transpose<T, FAR / 2>(x);
    }
}

// Column i of the matrix is row at(i) of x; columns behind them are zero.
template <class T, class S, class At>
inline void gather_turned(const S* x, int64_t width, int64_t rows, const At& at, Buffer<T>& to) {
    constexpr int64_t LANES = Wide<T>::LANES;
    make_room(to, padded(rows) * width);
    for (int64_t i = 0; i < padded(rows); i += LANES) {
        T* panel = &to[i / BLOCK * BLOCK * width + i % BLOCK];
        const int64_t some = std::clamp<int64_t>(rows - i, 0, LANES);
        const S* from[LANES];
        for (int64_t z = 0; z < some; ++z) from[z] = x + at(i + z) * width;
        for (int64_t z = i + LANES; z < std::min(i + 2 * LANES, rows); ++z) fetch(x + at(z) * width, width);
        int64_t c = 0;
        if (some == LANES)
            for (; c + LANES <= width; c += LANES) {
                Square<T> square;
                for (int64_t z = 0; z < LANES; ++z) square[z] = load_numbers(from[z] + c);
                transpose<T>(square);
                for (int64_t z = 0; z < LANES; ++z) store(panel + (c + z) * BLOCK, square[z]);
            }
        for (; c < width; ++c)
            for (int64_t z = 0; z < LANES; ++z) panel[c * BLOCK + z] = z < some ? as_number(from[z][c]) : T(0);
    }
}

// The product of `left` [rows, inner] and a matrix in panels [inner, columns]; see `multiply`.
template <class T, class Put>
inline void multiply_panels(Left<T> left, const Buffer<T>& panels, int64_t rows, int64_t columns, int64_t inner,
                            Put&& put) {
    for (int64_t c = 0; c < columns; c += BLOCK)
        multiply(left, panels.data() + c * inner, BLOCK, rows, BLOCK, inner,
                 [&](int64_t i, int64_t z, Vector<T> x) { put(i, c + z, x); });
}

// Add a vector to columns c, c + 1, ... of a row of `width` numbers.
template <class T>
inline void add_vector(T* row, int64_t c, int64_t width, Vector<T> x) {
    constexpr int64_t LANES = Wide<T>::LANES;
    if (c + LANES <= width) {
        store(row + c, load(row + c) + x);
        return;
    }
    for (int64_t z = 0; z < LANES && c + z < width; ++z) row[c + z] += x[z];
}

}  // namespace thresher
