// Independent tasks on several threads: OpenMP, whose pool PyTorch shares, or threads of our own without it.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// Call work(task, state) for each task in [0, tasks), in any order; each thread gets its state from make(). A task may
// write only where no other task does, so that results do not depend on the number of threads.
template <typename Make, typename Work>
void parallel_for(int64_t tasks, int64_t threads, const Make& make, const Work& work) {
    if (threads > tasks) threads = tasks;
    if (threads <= 1) {
        auto state = make();
        for (int64_t task = 0; task < tasks; ++task) work(task, state);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        auto state = make();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) work(task, state);
    }
#else
    std::atomic<int64_t> next{0};
    const auto run = [&] {
        auto state = make();
        for (int64_t task; (task = next++) < tasks;) work(task, state);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(run);
    run();
    for (auto& other : others) other.join();
#endif
}

// Call work(task) for each task in [0, tasks).
template <typename Work>
void parallel_for(int64_t tasks, int64_t threads, const Work& work) {
    parallel_for(tasks, threads, [] { return 0; }, [&](int64_t task, int) { work(task); });
}
