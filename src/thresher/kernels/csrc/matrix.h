// Small products of matrices that lie in cache, in vectors of the width that the processor has.
//
// Rows of what is multiplied from the right, and of results, are padded to a multiple of BLOCK floats. Sums run over
// the inner dimension in ascending order, whatever the shape, so that results do not depend on how work is divided.

#pragma once

#include <cstdint>
#include <cstring>

namespace thresher {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int BLOCK = 16;  // columns of a tile

template <class T>
struct Wide {
    static constexpr int LANES = BYTES / sizeof(T);
    static constexpr int VECTORS = BLOCK / LANES;                  // of a row of a tile
    static constexpr int ROWS = VECTORS < 12 ? 12 / VECTORS : 1;   // of a tile: about twelve sums are in flight
    typedef T Vector __attribute__((vector_size(BYTES)));
    typedef T Loose __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vector = typename Wide<T>::Vector;

template <class T>
inline Vector<T> load(const T* p) {
    return *reinterpret_cast<const typename Wide<T>::Loose*>(p);
}
template <class T>
inline void store(T* p, Vector<T> x) {
    *reinterpret_cast<typename Wide<T>::Loose*>(p) = x;
}
inline int64_t padded(int64_t width) { return (width + BLOCK - 1) / BLOCK * BLOCK; }

// Elements of the left matrix lie at a + row * by_row + inner * by_inner.
template <class T>
struct Left {
    const T* a;
    int64_t by_row, by_inner;
};

template <int M, class T>
inline void tile(Left<T> left, const T* b, int64_t by_inner, int64_t inner,
                 Vector<T> (&sum)[M][Wide<T>::VECTORS]) {
    constexpr int VECTORS = Wide<T>::VECTORS, LANES = Wide<T>::LANES;
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < VECTORS; ++j) sum[i][j] = Vector<T>{};
    for (int64_t k = 0; k < inner; ++k) {
        Vector<T> row[VECTORS];
        for (int j = 0; j < VECTORS; ++j) row[j] = load(b + k * by_inner + j * LANES);
        for (int i = 0; i < M; ++i) {
            const T x = left.a[i * left.by_row + k * left.by_inner];
            for (int j = 0; j < VECTORS; ++j) sum[i][j] += x * row[j];
        }
    }
}

// Give `put(row, column, vector)` each vector of the product of `left` [rows, inner] and b [inner, columns].
template <int M, class T, class Put>
inline void rows_of(Left<T> left, const T* b, int64_t by_inner, int64_t row, int64_t columns, int64_t inner,
                    Put&& put) {
    const Left<T> from{left.a + row * left.by_row, left.by_row, left.by_inner};
    constexpr int VECTORS = Wide<T>::VECTORS, LANES = Wide<T>::LANES;
    for (int64_t column = 0; column < columns; column += BLOCK) {
        Vector<T> sum[M][VECTORS];
        tile<M>(from, b + column, by_inner, inner, sum);
        for (int i = 0; i < M; ++i)
            for (int j = 0; j < VECTORS; ++j) put(row + i, column + j * LANES, sum[i][j]);
    }
}

template <int M, class T, class Put>
inline void last_rows(int64_t left_over, Left<T> left, const T* b, int64_t by_inner, int64_t row, int64_t columns,
                      int64_t inner, Put&& put) {
    if constexpr (M > 0) {
        if (left_over == M)
            rows_of<M>(left, b, by_inner, row, columns, inner, put);
        else
            last_rows<M - 1>(left_over, left, b, by_inner, row, columns, inner, put);
    }
}

template <class T, class Put>
inline void multiply(Left<T> left, const T* b, int64_t by_inner, int64_t rows, int64_t columns, int64_t inner,
                     Put&& put) {
    constexpr int ROWS = Wide<T>::ROWS;
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS) rows_of<ROWS>(left, b, by_inner, row, columns, inner, put);
    last_rows<ROWS - 1>(rows - row, left, b, by_inner, row, columns, inner, put);
}

}  // namespace thresher
