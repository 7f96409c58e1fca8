// Vectors that begin on a cache line: a wide load across two lines costs two.

#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace thresher {

template <class T>
struct OnLine {
    using value_type = T;
    static constexpr std::align_val_t LINE{64};

    OnLine() = default;
    template <class U>
    OnLine(const OnLine<U>&) {}
    T* allocate(size_t number) { return static_cast<T*>(::operator new(number * sizeof(T), LINE)); }
    void deallocate(T* x, size_t) { ::operator delete(x, LINE); }
    template <class U>
    bool operator==(const OnLine<U>&) const { return true; }
    template <class U>
    bool operator!=(const OnLine<U>&) const { return false; }
};

template <class T>
using Buffer = std::vector<T, OnLine<T>>;

}  // namespace thresher
