// Queries, and their scores with scattered keys.

#pragma once

#include <cstdint>
#include <type_traits>

#include "bf16.h"
#include "buffer.h"
#include "gathered.h"

namespace thresher {

// The queries of one task. Queries in bf16 stay as they are, for products of pairs; products are scaled afterwards.
template <class S>
struct Queries {
    using T = Number<S>;
    static constexpr bool STORED = !std::is_same_v<S, T>;
    const S* given;
    T scale;
    Buffer<T> scaled;

    void take(const S* q, int64_t size, T by) {
        given = q;
        scale = by;
        scaled.resize(size);
        for (int64_t x = 0; x < size; ++x) scaled[x] = as_number(q[x]) * scale;
    }

    // The scores of the query at `from` with rows of keys.
    template <class At>
    void scores(int64_t from, const S* keys, int64_t d, int64_t rows, const At& at, T* to) const {
        if constexpr (STORED) {
            dots(given + from, keys, d, rows, at, to);
            for (int64_t x = 0; x < rows; ++x) to[x] *= scale;
        } else {
            dots(&scaled[from], keys, d, rows, at, to);
        }
    }
};

}  // namespace thresher
