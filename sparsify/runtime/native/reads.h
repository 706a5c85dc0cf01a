// Reads of a file by threads of their own, while others compute: preadv into given addresses, past the page cache if the file was
// opened so (O_DIRECT). Reads that are adjacent in the file are one call.
#pragma once

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/uio.h>
#endif

namespace sparsify {

enum ReadError : int { NO_ERROR = 0, END_OF_FILE = -1 };  // otherwise errno

inline double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// A file that several threads read. Tickets are waited for in any order, each once.
class Reader {
public:
    Reader(int file, int threads) : file_(file) {
        // Long runs that are read ahead use a disk's bandwidth, single neurons its number of reads: some threads see to the former.
        for (int i = 0; i < threads; ++i) threads_.emplace_back([this, i] { work(i < AHEAD_THREADS ? 1 : 0); });
    }

    ~Reader() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
            for (auto& queue : queues_) queue.clear();
        }
        ready_.notify_all();
        for (auto& one : threads_) one.join();
    }

    // Begins `count` reads of `bytes` each, needed now or ahead of their use.
    int64_t submit(const int64_t* offsets, const uintptr_t* addresses, int64_t count, int64_t bytes, bool ahead) {
        auto batch = std::make_shared<Batch>();
        batch->parts.resize(count);
        std::vector<Run> runs;
        for (int64_t i = 0; i < count; ++i) {
            batch->parts[i] = {reinterpret_cast<void*>(addresses[i]), static_cast<size_t>(bytes)};
            const bool follows = i > 0 && offsets[i] == offsets[i - 1] + bytes;
            if (follows && runs.back().count < MAX_PARTS && runs.back().count * bytes < MAX_RUN_BYTES) ++runs.back().count;
            else runs.push_back({batch, i, 1, offsets[i]});
        }
        batch->left = static_cast<int64_t>(runs.size());
        int64_t ticket;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            ticket = next_++;
            batches_[ticket] = batch;
            auto& queue = queues_[ahead ? 1 : 0];
            queue.insert(queue.end(), runs.begin(), runs.end());
        }
        if (runs.size() == 1) ready_.notify_one();
        else ready_.notify_all();
        return ticket;
    }

    // Waits for all reads of a ticket: ReadError or errno.
    int wait(int64_t ticket) {
        std::unique_lock<std::mutex> lock(mutex_);
        const auto found = batches_.find(ticket);
        if (found == batches_.end()) return EINVAL;
        const std::shared_ptr<Batch> batch = found->second;
        for (auto one = queues_[1].begin(); one != queues_[1].end();) {  // what was read ahead is needed now
            if (one->batch != batch) { ++one; continue; }
            queues_[0].push_back(*one);
            one = queues_[1].erase(one);
        }
        done_.wait(lock, [&] { return batch->left == 0; });
        batches_.erase(ticket);
        return batch->error;
    }

private:
    static constexpr int AHEAD_THREADS = 2;
    static constexpr int64_t MAX_PARTS = 256, MAX_RUN_BYTES = 1 << 20;
#if !(defined(__unix__) || defined(__APPLE__))
    struct iovec { void* iov_base; size_t iov_len; };
#endif
    struct Batch {
        std::vector<iovec> parts;
        int64_t left = 0;
        int error = NO_ERROR;
    };
    struct Run {
        std::shared_ptr<Batch> batch;
        int64_t first, count, offset;
    };

    // What is in the thread's own queue first.
    void work(int own) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            ready_.wait(lock, [this] { return stopping_ || !queues_[0].empty() || !queues_[1].empty(); });
            if (stopping_) return;
            auto& queue = queues_[queues_[own].empty() ? 1 - own : own];
            const Run run = queue.front();
            queue.pop_front();
            lock.unlock();
            const int error = read(run);
            lock.lock();
            if (error != NO_ERROR) run.batch->error = error;
            if (--run.batch->left == 0) done_.notify_all();
        }
    }

    int read(const Run& run) const {
#if defined(__unix__) || defined(__APPLE__)
        iovec* part = run.batch->parts.data() + run.first;
        int64_t left = run.count, offset = run.offset;
        while (left > 0) {
            const ssize_t got = preadv(file_, part, static_cast<int>(left), offset);
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) return errno;
            if (got == 0) return END_OF_FILE;
            offset += got;
            size_t rest = static_cast<size_t>(got);
            for (; left > 0 && rest >= part->iov_len; ++part, --left) rest -= part->iov_len;
            if (left > 0) {
                part->iov_base = static_cast<char*>(part->iov_base) + rest;
                part->iov_len -= rest;
            }
        }
        return NO_ERROR;
#else
        return ENOSYS;
#endif
    }

    int file_;
    std::mutex mutex_;
    std::condition_variable ready_, done_;
    std::deque<Run> queues_[2];  // needed now, and ahead of use
    std::unordered_map<int64_t, std::shared_ptr<Batch>> batches_;
    std::vector<std::thread> threads_;
    int64_t next_ = 1;
    bool stopping_ = false;
};

}  // namespace sparsify
