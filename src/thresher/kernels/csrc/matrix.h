// Products of small matrices in cache. Elements E are numbers, or pairs of bf16.
//
// Rows of the right matrix and of results are padded to a multiple of BLOCK elements. Sums run over the inner dimension
// in ascending order for any shape, so that results do not depend on how the work is divided.

#pragma once

#include <cstdint>

#include "bf16.h"
#include "vector.h"

namespace thresher {

// Elements of the left matrix lie at a + row * by_row + inner * by_inner.
template <class E>
struct Left {
    const E* a;
    int64_t by_row, by_inner;
};

// Not inlined: among the variables of a caller, compilers run out of registers and put sums on the stack.
template <int M, class E, class T = Number<E>>
__attribute__((noinline)) void tile(Left<E> left, const E* b, int64_t by_inner, int64_t inner,
                                    Vector<T> (&result)[M][Wide<T>::VECTORS]) {
    constexpr int VECTORS = Wide<T>::VECTORS, LANES = Wide<T>::LANES;
    Vector<T> sum[M][VECTORS] = {};
    for (int64_t k = 0; k < inner; ++k) {
        decltype(load(b)) row[VECTORS];
        for (int j = 0; j < VECTORS; ++j) row[j] = load(b + k * by_inner + j * LANES);
        const E* from = left.a + k * left.by_inner;
#pragma GCC unroll 16
        for (int i = 0; i < M; i += 3) {
            const E* at = from + i * left.by_row;
            asm("" : "+r"(at));  // one pointer for three rows: with one for each there are too few registers
#pragma GCC unroll 3
            for (int z = 0; z < 3; ++z) {
                if (i + z >= M) continue;
                const E x = at[z * left.by_row];
                for (int j = 0; j < VECTORS; ++j) sum[i + z][j] = with_product(sum[i + z][j], x, row[j]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < VECTORS; ++j) result[i][j] = sum[i][j];
}

// Call put(row, column, vector) for each vector of the product of `left` [rows, inner] and b [inner, columns].
template <int M, class E, class Put>
inline void rows_of(Left<E> left, const E* b, int64_t by_inner, int64_t row, int64_t columns, int64_t inner,
                    Put&& put) {
    using T = Number<E>;
    const Left<E> from{left.a + row * left.by_row, left.by_row, left.by_inner};
    constexpr int VECTORS = Wide<T>::VECTORS, LANES = Wide<T>::LANES;
    for (int64_t column = 0; column < columns; column += BLOCK) {
        Vector<T> sum[M][VECTORS];
        tile<M>(from, b + column, by_inner, inner, sum);
        for (int i = 0; i < M; ++i)
            for (int j = 0; j < VECTORS; ++j) put(row + i, column + j * LANES, sum[i][j]);
    }
}

template <int M, class E, class Put>
inline void last_rows(int64_t left_over, Left<E> left, const E* b, int64_t by_inner, int64_t row, int64_t columns,
                      int64_t inner, Put&& put) {
    if constexpr (M > 0) {
        if (left_over == M)
            rows_of<M>(left, b, by_inner, row, columns, inner, put);
        else
            last_rows<M - 1>(left_over, left, b, by_inner, row, columns, inner, put);
    }
}

template <class E, class Put>
inline void multiply(Left<E> left, const E* b, int64_t by_inner, int64_t rows, int64_t columns, int64_t inner,
                     Put&& put) {
    constexpr int ROWS = Wide<Number<E>>::ROWS;
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS) rows_of<ROWS>(left, b, by_inner, row, columns, inner, put);
    last_rows<ROWS - 1>(rows - row, left, b, by_inner, row, columns, inner, put);
}

}  // namespace thresher
