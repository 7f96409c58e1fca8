// Vectors of the processor's width.

#pragma once

#include <cstdint>

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
    static constexpr int ROWS = VECTORS < 12 ? 12 / VECTORS : 1;   // of a tile: about twelve sums at a time
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

}  // namespace thresher
