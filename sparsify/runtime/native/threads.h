// Threads that work on one call together.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace sparsify {

inline bool forked = false;  // the threads of OpenMP do not survive a fork, and waiting for them would never end

inline void watch_forks() {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
}

// Waits for all threads of the enclosing parallel region; outside of one it does nothing.
inline void barrier() {
#pragma omp barrier
}

inline int64_t num_threads() {  // of the enclosing parallel region
#if defined(_OPENMP)
    return omp_get_num_threads();
#else
    return 1;
#endif
}

// Runs f(thread, threads) on so many threads, which all see the same barriers.
template <class F>
void in_parallel(int wanted, const F& f) {
#if defined(_OPENMP)
    const int threads = forked ? 1 : std::max(1, wanted);
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        f(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    f(0, 1);
}

}  // namespace sparsify
