// The rank of each number in ascending order: of equal numbers the earlier comes first, NaN comes last.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "buffer.h"

namespace thresher {

// Sorts by digits of 11 bits, the lowest first; few numbers, for which counting digits does not pay, by comparisons. A
// thread reuses its buffers for the next row.
template <class T>
class Ranks {
    using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    struct Entry {
        Key key;
        int32_t index;
    };
    static constexpr int BITS = 8 * sizeof(T), DIGIT = 11, DIGITS = (BITS + DIGIT - 1) / DIGIT, VALUES = 1 << DIGIT;
    static constexpr int64_t SHORT = 38 * DIGITS;

  public:
    void take(const T* x, int64_t n, int64_t* rank) {
        entries.resize(n);
        if (n < SHORT) {
            for (int64_t i = 0; i < n; ++i) entries[i] = {key_of(x[i]), int32_t(i)};
            std::sort(entries.begin(), entries.end(), [](const Entry& one, const Entry& other) {
                return one.key != other.key ? one.key < other.key : one.index < other.index;
            });
            for (int64_t i = 0; i < n; ++i) rank[entries[i].index] = i;
            return;
        }
        sorted.resize(n);
        count.assign(DIGITS * VALUES, 0);
        for (int64_t i = 0; i < n; ++i) {
            const Key key = key_of(x[i]);
            entries[i] = {key, int32_t(i)};
            for (int digit = 0; digit < DIGITS; ++digit) ++count[digit * VALUES + value(key, digit)];
        }
        for (int digit = 0; digit < DIGITS; ++digit) {
            int32_t *of = &count[digit * VALUES], begin = 0;
            for (int i = 0; i < VALUES; ++i) begin += std::exchange(of[i], begin);
            if (digit + 1 < DIGITS) {
                for (const Entry& entry : entries) sorted[of[value(entry.key, digit)]++] = entry;
                entries.swap(sorted);
            } else {
                for (const Entry& entry : entries) rank[entry.index] = of[value(entry.key, digit)]++;
            }
        }
    }

  private:
    Buffer<Entry> entries, sorted;
    Buffer<int32_t> count;  // of each value of each digit; then the place of the next entry with that value

    static int value(Key key, int digit) { return int(key >> (digit * DIGIT)) & (VALUES - 1); }

    // Integers that sort like the floating-point numbers.
    static Key key_of(T x) {
        constexpr Key SIGN = Key(1) << (BITS - 1);
        if (x != x) return ~Key(0);
        x += T(0);  // -0 equals 0
        Key bits;
        std::memcpy(&bits, &x, sizeof bits);
        return bits & SIGN ? ~bits : bits | SIGN;
    }
};

}  // namespace thresher
