// Blocks whose neurons are in a file, of which memory holds some.
//
// Rows of the projection that is read in full (the first one) are held from the first neuron on; the others pass through a ring of
// chunks in every step, which are read ahead of their use, also those of the next block. Rows of the others lie in slots: before they
// are read, `fetch` makes those of the listed neurons resident. Where neurons are chosen before any projection, rows of all three
// lie in slots; where masks choose inputs, their columns of gate and up in slots of one store, and rows of down in those of another.
#pragma once

#include "reads.h"
#include "rows.h"

namespace sparsify {

class RowStream;

// What lies in slots: rows of all but the first projection, those of all three, rows of down alone, or columns of gate and up.
enum Slots : int32_t { SECOND_ROWS = 0, ALL_ROWS = 1, DOWN_ROWS = 2, COLUMNS = 3 };

// Mirrors CStore in sparsify/runtime/neuron_cache.py.
struct NeuronStore {
    int64_t block;
    RowStream* stream;   // of the rows of the first projection that are not held; null where they lie in slots
    const void* held;    // the first of them
    int64_t num_held, num_rows;
    int64_t offset;      // of the first projection's rows in the file
    NeuronStore* next;   // the block that certainly comes next; null if that is not known
    int32_t* slots;      // [neurons], or [inputs]
    int32_t (*fetch)(int64_t block, const int32_t* neurons, int64_t count);  // 1, or it failed
    int32_t* failed;     // of all blocks: after a failure a step computes nonsense, but touches no memory that is not there
    const float* x;      // [tokens, hidden]: what a step's block reads while it fetches; null outside steps
    int32_t holds;       // Slots
};

constexpr int32_t FETCH_FAILED = -2;

// Rows of the first projections of all blocks, in the order in which steps read them.
class RowStream {
public:
    RowStream(Reader* reader, uint8_t* ring, int64_t chunks, int64_t chunk_bytes, int64_t chunk_rows, int64_t row_bytes,
              int64_t alignment)
        : reader_(reader), ring_(ring), chunks_(chunks), chunk_bytes_(chunk_bytes), chunk_rows_(chunk_rows), row_bytes_(row_bytes),
          alignment_(alignment) {}

    // Begins the reads of a block, unless they have begun.
    void begin(const NeuronStore& store) {
        if (pending_.empty() || pending_.front().store != &store || pending_.front().first != store.num_held) {
            discard();
            following_ = &store;
            next_row_ = store.num_held;
        }
        fill();
    }

    // Waits for the next chunk, whose rows are then at `rows()`.
    void take(const NeuronStore& store) {
        const auto start = std::chrono::steady_clock::now();
        Chunk& chunk = pending_.front();
        const int error = reader_->wait(chunk.ticket);
        chunk.ticket = 0;
        waited_seconds_ += seconds_since(start);
        bytes_ += chunk.bytes;
        if (error != NO_ERROR) *store.failed = error;
        rows_ = chunk.at;
    }
    const uint8_t* rows() const { return rows_; }

    void release() {
        pending_.pop_front();
        fill();
    }

    // Forgets what was read ahead.
    void discard() {
        for (auto& one : pending_)
            if (one.ticket) reader_->wait(one.ticket);
        pending_.clear();
        following_ = nullptr;
    }

    int64_t chunk_rows() const { return chunk_rows_; }
    double waited_seconds_ = 0.0;  // results, added up
    int64_t bytes_ = 0;

private:
    struct Chunk {
        const NeuronStore* store;
        int64_t first, ticket, bytes;
        const uint8_t* at;
    };

    void fill() {
        const NeuronStore* complete = nullptr;  // the first of blocks of which nothing is left to read
        while (following_ && static_cast<int64_t>(pending_.size()) < chunks_) {
            if (next_row_ >= following_->num_rows) {
                const NeuronStore* next = following_->next;
                if (!next || !next->stream || next == complete) return;
                if (!complete) complete = following_;
                following_ = next;
                next_row_ = next->num_held;
                continue;
            }
            complete = nullptr;
            const int64_t rows = std::min(chunk_rows_, following_->num_rows - next_row_);
            const int64_t first = following_->offset + next_row_ * row_bytes_, begin = first / alignment_ * alignment_;
            const int64_t end = (first + rows * row_bytes_ + alignment_ - 1) / alignment_ * alignment_;
            uint8_t* to = ring_ + place_ * chunk_bytes_;
            const auto address = reinterpret_cast<uintptr_t>(to);
            const int64_t ticket = reader_->submit(&begin, &address, 1, end - begin, true);
            pending_.push_back({following_, next_row_, ticket, end - begin, to + (first - begin)});
            place_ = (place_ + 1) % chunks_;
            next_row_ += rows;
        }
    }

    Reader* reader_;
    uint8_t* ring_;
    const int64_t chunks_, chunk_bytes_, chunk_rows_, row_bytes_, alignment_;
    std::deque<Chunk> pending_;
    const NeuronStore* following_ = nullptr;
    int64_t next_row_ = 0, place_ = 0;
    const uint8_t* rows_ = nullptr;
};

// Makes the listed neurons' rows resident, or those of all without a list, for all threads. The first thread is the caller's own,
// which may run Python.
inline void fetch(NeuronStore& store, const std::vector<int32_t>* list, int64_t neurons, int thread) {
    if (thread == 0) {
        static thread_local std::vector<int32_t> all;
        if (!list) {
            all.resize(neurons);
            for (int64_t n = 0; n < neurons; ++n) all[n] = static_cast<int32_t>(n);
            list = &all;
        }
        if (*store.failed == 0 && store.fetch(store.block, list->data(), static_cast<int64_t>(list->size())) != 1)
            *store.failed = FETCH_FAILED;
        if (*store.failed != 0)
            for (const int32_t n : *list) store.slots[n] = 0;
    }
    barrier();
}

// Dot products of all rows of the first projection, with the same sums as `all_dots` of a matrix in memory.
template <class T, int B, class Take>
void stored_dots(const NeuronStore& store, int64_t row_stride, const Input& x, int thread, const Take& take) {
    RowStream* stream = store.num_held < store.num_rows ? store.stream : nullptr;
    if (stream && thread == 0) stream->begin(store);
    all_dots<T, B>({store.held, row_stride, nullptr}, nullptr, store.num_held, x, take);
    if (!stream) return;
    for (int64_t first = store.num_held; first < store.num_rows; first += stream->chunk_rows()) {
        if (thread == 0) stream->take(store);
        barrier();
        const Matrix chunk{stream->rows(), row_stride, nullptr};
        const int64_t rows = std::min(stream->chunk_rows(), store.num_rows - first);
        all_dots<T, B>(chunk, nullptr, rows, x, [&](int64_t n, const float* dots) { take(first + n, dots); });
        barrier();
        if (thread == 0) stream->release();
    }
}

}  // namespace sparsify
