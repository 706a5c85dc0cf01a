// What Python calls: one feed-forward block for a few tokens, and one decoding step of a whole model.

#define SPARSIFY_NUMBER -1  // of none of the formats
#include "formats.h"

namespace sparsify {
namespace {

Formats table;

// [tokens, hidden] in fp32.
const float* widen(const FfnCall& call, const Matrix& from, std::vector<float>& to) {
    to.resize(call.tokens * call.hidden);
    with_dtype(call.dtype, [&](auto format) {
        using X = decltype(format);
        for (int b = 0; b < call.tokens; ++b)
            for (int64_t i = 0; i < call.hidden; ++i) to[b * call.hidden + i] = X::at(row<X>(from, b), i);
    });
    return to.data();
}

template <class T, int B>
void run(FfnCall& call) {
    static thread_local FfnScratch kept;
    static thread_local FfnInputs x;
    static thread_local Input predictor_x, copy_x;
    static thread_local std::vector<float> values, up_values;
    FfnScratch& scratch = kept;  // inside the region the thread_local name would mean each thread's own object
    reserve<T, B>(call, scratch);
    const auto before_masks = [&](auto format) {
        fill_rows<decltype(format), B>(nullptr, widen(call, call.predictor_x, values), call.tokens, call.hidden, predictor_x);
    };
    if (call.predictor_a.data) before_masks(PredictorFormat<T>());
    else if (call.router.data) before_masks(F32());
    const float* seen = widen(call, call.x, values);
    if (call.gate_copy.data) fill_rows<Int4Blocks, B>(nullptr, seen, call.tokens, call.hidden, copy_x);
    const float* seen_by_up = call.up_x.data ? widen(call, call.up_x, up_values) : seen;
    bool active[MAX_TOKENS] = {};
    std::fill(active, active + call.tokens, true);
    FfnTokens in{};
    x.fill<T, B>(call, seen, seen_by_up, call.tokens, in);
    in.predictor_x = &predictor_x;
    in.copy_x = &copy_x;
    in.active = active;
    in_parallel(call.threads, [&](int thread, int threads) { phases<T, B>(call, in, scratch, thread, threads); });
}

// Other numbers of tokens are padded with inactive ones: a kernel for each would take twice as long to compile.
template <class F>
bool with_batch(int64_t tokens, const F& f) {
    if (tokens < 1 || tokens > MAX_TOKENS) return false;
    if (tokens == 1) f(std::integral_constant<int, 1>());
    else if (tokens == 2) f(std::integral_constant<int, 2>());
    else if (tokens <= 4) f(std::integral_constant<int, 4>());
    else f(std::integral_constant<int, 8>());
    return true;
}

}  // namespace
}  // namespace sparsify

extern "C" {

int sparsify_ffn(sparsify::FfnCall* call) {
    using namespace sparsify;
    if (call->dtype < FP32 || call->dtype > FP16) return 2;
    if (call->weight_format < STORED || call->weight_format > PACKED_INT4) return 3;
    const bool fits = with_batch(call->tokens, [&](auto batch) {
        step::with_format(call->weight_format, call->dtype, [&](auto format) { run<decltype(format), decltype(batch)::value>(*call); });
    });
    return fits ? 0 : 1;
}

int sparsify_step(sparsify::StepCall* call) {
    using namespace sparsify;
    if (call->dtype < FP32 || call->dtype > FP16) return 2;
    return with_batch(call->attention.tokens, [&](auto batch) { step::run<decltype(batch)::value>(*call); }) ? 0 : 1;
}

void* sparsify_reader_open(int file, int threads) { return new sparsify::Reader(file, threads); }
void sparsify_reader_close(void* reader) { delete static_cast<sparsify::Reader*>(reader); }
int64_t sparsify_reader_submit(void* reader, const int64_t* offsets, const uintptr_t* addresses, int64_t count, int64_t bytes, int ahead) {
    return static_cast<sparsify::Reader*>(reader)->submit(offsets, addresses, count, bytes, ahead != 0);
}
int sparsify_reader_wait(void* reader, int64_t ticket) { return static_cast<sparsify::Reader*>(reader)->wait(ticket); }

void* sparsify_stream_open(void* reader, uint8_t* ring, int64_t chunks, int64_t chunk_bytes, int64_t chunk_rows, int64_t row_bytes,
                           int64_t alignment) {
    return new sparsify::RowStream(static_cast<sparsify::Reader*>(reader), ring, chunks, chunk_bytes, chunk_rows, row_bytes, alignment);
}
void sparsify_stream_discard(void* stream) { static_cast<sparsify::RowStream*>(stream)->discard(); }
void sparsify_stream_close(void* stream) { delete static_cast<sparsify::RowStream*>(stream); }
// Bytes that were streamed, and seconds that steps waited for them.
int64_t sparsify_stream_bytes(void* stream, double* waited_seconds) {
    *waited_seconds = static_cast<sparsify::RowStream*>(stream)->waited_seconds_;
    return static_cast<sparsify::RowStream*>(stream)->bytes_;
}

int64_t sparsify_call_bytes() { return sizeof(sparsify::FfnCall); }
int64_t sparsify_step_bytes() { return sizeof(sparsify::StepCall) + sizeof(sparsify::StepLayer); }

int sparsify_is_parallel() {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

void sparsify_start() {
    sparsify::watch_forks();
    sparsify::formats = &sparsify::table;
}

// What the library of a format joins.
void* sparsify_formats() { return &sparsify::table; }
int64_t sparsify_layout() { return sparsify::Formats::layout(); }

// Reads memory as the kernels do, so that a benchmark knows this machine's bandwidth.
double sparsify_read(const float* data, int64_t count, int threads) {
    double total = 0.0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (int64_t block = 0; block < count / 1024; ++block) {
        sparsify::Lanes sums[4] = {sparsify::zeros(), sparsify::zeros(), sparsify::zeros(), sparsify::zeros()};
        for (int i = 0; i < 1024; i += 64) {
            sparsify::prefetch(data + std::min((block + 4) * 1024 + i, count - 64), 64 * sizeof(float));
            for (int k = 0; k < 4; ++k)
                sums[k] = sparsify::add(sums[k], sparsify::load_f32(data + block * 1024 + i + k * 16));
        }
        total += sparsify::sum(sparsify::add(sparsify::add(sums[0], sums[1]), sparsify::add(sums[2], sums[3])));
    }
    return total;
}
}
