// The gradients of keys, values and thresholds of each group, summed in splits whose number depends on sizes alone, so
// that results do not depend on the number of threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "parallel.h"

namespace thresher {

template <class T>
class Splits {
    static constexpr int64_t LEAST = 16;  // tasks, if the groups have blocks enough

  public:
    const int64_t number;  // of splits of a group

    // `size_k` and `size_v` are the sizes of the gradients of the keys and the values of a group, which has `blocks`
    // blocks of queries.
    Splits(int64_t groups, int64_t blocks, int64_t size_k, int64_t size_v, T* grad_keys, T* grad_values,
           T* grad_threshold)
        : number(count(groups, blocks)), groups(groups), size_k(size_k), size_v(size_v), grad_keys(grad_keys),
          grad_values(grad_values), grad_threshold(grad_threshold), parts(groups * number),
          thresholds(groups * number, 0.0) {}

    int64_t tasks() const { return groups * number; }

    // Begin a task with zeros. The first split of a group adds to the results directly.
    void begin(int64_t task) {
        if (task % number != 0) {
            parts[task].resize(size_k + size_v);
            return;
        }
        std::fill_n(keys(task), size_k, T(0));
        std::fill_n(values(task), size_v, T(0));
    }
    T* keys(int64_t task) {
        return task % number != 0 ? parts[task].data() : grad_keys + task / number * size_k;
    }
    T* values(int64_t task) {
        return task % number != 0 ? parts[task].data() + size_k : grad_values + task / number * size_v;
    }
    double& threshold(int64_t task) { return thresholds[task]; }

    // Add the splits of each group, in their order.
    void add_up(int64_t threads) {
        parallel_for(groups, threads, [&](int64_t g) {
            for (int64_t split = 1; split < number; ++split) {
                const T* part = parts[g * number + split].data();
                for (int64_t x = 0; x < size_k; ++x) grad_keys[g * size_k + x] += part[x];
                for (int64_t x = 0; x < size_v; ++x) grad_values[g * size_v + x] += part[size_k + x];
            }
            double sum = 0;
            for (int64_t split = 0; split < number; ++split) sum += thresholds[g * number + split];
            grad_threshold[g] = T(sum);
        });
    }

  private:
    static int64_t count(int64_t groups, int64_t blocks) {
        const int64_t wanted = (LEAST + groups - 1) / std::max<int64_t>(groups, 1);
        return std::max<int64_t>(std::min(wanted, blocks), 1);
    }

    const int64_t groups, size_k, size_v;
    T *const grad_keys, *const grad_values, *const grad_threshold;
    std::vector<Buffer<T>> parts;
    std::vector<double> thresholds;
};

}  // namespace thresher
