// Gated feed-forward blocks for one to eight tokens at a time, reading only the rows of active neurons.
//
// gate [neurons, hidden], up [neurons, hidden], down_t [neurons, hidden]: neuron n is row n of all three. The work has
// phases, each over the list of neurons that the previous one kept:
//   predict (optional) -> gate rows -> up rows where the gate factor is not zero -> down rows where the product is kept.
// Every row's dot product is summed in one fixed order, and every output column over neurons in ascending order, so that
// the result is the same bits for any number of threads.

#include "blocks.h"

#include <algorithm>
#include <cmath>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace sparsify {

enum Dtype : int32_t { FP32 = 0, BF16 = 1, FP16 = 2 };
enum WeightFormat : int32_t { STORED = 0, INT8 = 1, INT4 = 2 };  // STORED: of the dtype of x
enum GateKind : int32_t { RELU = 0, RELU_SQUARED = 1, SHIFTED_RELU = 2, SILU = 3 };
enum UpKind : int32_t { IDENTITY = 0, UP_RELU = 1 };

struct Matrix {
    const void* data;
    int64_t row_stride;  // in elements, or in bytes of blocks
};

// Mirrors sparsify/runtime/native_ffn.py.
struct FfnCall {
    int64_t tokens, hidden, neurons, rank;
    Matrix x, gate, up, down_t;
    Matrix predictor_x, predictor_a, predictor_b;  // [tokens, hidden], [rank, hidden], [neurons, rank]; null without one
    const float* thresholds;          // [neurons] or null: a product is kept where it is larger in size
    const float* gate_thresholds;     // [neurons] or null: a gate factor is kept where it is larger in size
    void* out;                        // [tokens, hidden], contiguous, of the dtype of x
    int32_t dtype, gate_kind, up_kind, dense, threads, weight_format;
    float gate_threshold, predictor_threshold;
    int64_t gate_rows, up_rows, down_rows;  // results: number of rows read
};

namespace {

constexpr int MAX_TOKENS = 8;
constexpr int ROWS = 4;            // rows of one pass: so many concurrent streams saturate the memory bandwidth
constexpr int64_t BLOCK_ROWS = 64;  // rows that a thread takes at once

bool forked = false;  // the threads of OpenMP do not survive a fork, and waiting for them would never end

struct Scratch {
    std::vector<float> x, predictor_x, rank_values, gate, product, sums;
};

// Every thread builds the lists itself: that is faster than waiting for one thread to do it.
struct Lists {
    std::vector<int32_t> predicted, up, down;
};

template <class T>
const typename T::Stored* row(const Matrix& m, int64_t n) {
    return static_cast<const typename T::Stored*>(m.data) + n * m.row_stride;
}

// R rows times B tokens: out[r][b] = dot(rows[r], x[b]). The next rows are prefetched while these are read, since the hardware
// prefetcher stops at the end of a row.
template <class T, int R, int B>
void dot(const typename T::Stored* const* rows, const typename T::Stored* const* next, const float* x, int64_t width,
         float (*out)[MAX_TOKENS]) {
    constexpr int SUMS = B <= 2 ? 2 : 1;  // independent sums of each dot product: enough to hide the latency of additions, few enough for the registers
    constexpr int VECTORS = SUMS > T::VECTORS ? SUMS : T::VECTORS;
    Lanes total[R][B][SUMS];  // partial sums: k-th vector of a step goes to sum k % SUMS, in the same order for any thread count
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b)
            for (int k = 0; k < SUMS; ++k) total[r][b][k] = zeros();
    int64_t i = 0;
    for (; i + VECTORS * LANES <= width; i += VECTORS * LANES) {
        for (int r = 0; r < R; ++r) T::ask(next[r], i, VECTORS * LANES, width);
#pragma GCC unroll 2
        for (int k = 0; k < VECTORS; ++k) {
            Lanes weights[R];  // loaded and widened once, used for all B tokens
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) weights[r] = T::lanes(rows[r], i, k, width);
#pragma GCC unroll 8
            for (int b = 0; b < B; ++b) {
                const Lanes token = load_f32(x + b * width + i + k * LANES);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) total[r][b][k % SUMS] = multiply_add(weights[r], token, total[r][b][k % SUMS]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) {
            float result = sum(SUMS == 2 ? add(total[r][b][0], total[r][b][SUMS - 1]) : total[r][b][0]);
            for (int64_t j = i; j < width; ++j) result += T::at(rows[r], j) * x[b * width + j];
            out[r][b] = result;
        }
}

// Dot products of `count` listed rows (or of rows first, first + 1, ... without a list); calls take(n, values over tokens).
template <class T, int R, int B, class Take>
void dot_rows(const Matrix& m, const int32_t* list, int64_t first, int64_t count, const float* x, int64_t width,
              const Take& take) {
    float out[R][MAX_TOKENS];
    const typename T::Stored *rows[R], *next[R];
    const auto nth = [&](int64_t i) { return list ? static_cast<int64_t>(list[i]) : first + i; };
    int64_t i = 0;
    for (; i + R <= count; i += R) {
        for (int r = 0; r < R; ++r) {
            rows[r] = row<T>(m, nth(i + r));
            next[r] = row<T>(m, nth(std::min(i + R + r, count - 1)));
        }
        dot<T, R, B>(rows, next, x, width, out);
        for (int r = 0; r < R; ++r) take(nth(i + r), out[r]);
    }
    for (; i < count; ++i) {
        rows[0] = row<T>(m, nth(i));
        dot<T, 1, B>(rows, rows, x, width, out);
        take(nth(i), out[0]);
    }
}

// All of `count` rows, distributed over the threads of the enclosing parallel region.
template <class T, int B, class Take>
void all_dots(const Matrix& m, const int32_t* list, int64_t count, const float* x, int64_t width, const Take& take) {
    constexpr int R = B <= 4 ? ROWS : 2;
    const int64_t blocks = (count + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = block * BLOCK_ROWS, size = std::min(BLOCK_ROWS, count - begin);
        dot_rows<T, R, B>(m, list ? list + begin : nullptr, begin, size, x, width, take);
    }
}

float gate_factor(float g, const FfnCall& call) {
    switch (call.gate_kind) {
        case SILU: return g / (1.0f + std::exp(-g));
        case RELU_SQUARED: return g <= call.gate_threshold ? 0.0f : g * g;
        case SHIFTED_RELU: return g <= call.gate_threshold ? 0.0f : g - call.gate_threshold;
        default: return g <= call.gate_threshold ? 0.0f : g;  // NaN compares false and passes
    }
}

// Neurons of `list`, or all without one, that at least one token needs, ascending, into `kept`.
template <class Wanted>
void compact(const std::vector<int32_t>* list, int64_t neurons, std::vector<int32_t>& kept, const Wanted& wanted) {
    const int64_t count = list ? static_cast<int64_t>(list->size()) : neurons;
    kept.resize(count);
    int64_t num_kept = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t n = list ? (*list)[i] : static_cast<int32_t>(i);
        kept[num_kept] = n;  // overwritten by the next unless it is needed: no branch to mispredict
        num_kept += wanted(n) ? 1 : 0;
    }
    kept.resize(num_kept);
}

// Each sum adds its R terms in ascending order of neurons.
// sums[b][columns] += product[b][n] * down_t[n][columns], over R listed neurons, for one thread's columns.
template <class T, int R, int B>
void add_rows(const FfnCall& call, const int32_t* list, int64_t left, const float* product, float* sums, int64_t width,
              int64_t begin, int64_t end) {
    constexpr int STEP = T::VECTORS * LANES;
    const typename T::Stored *rows[R], *next[R];
    float factors[R][B];
    for (int r = 0; r < R; ++r) {
        next[r] = row<T>(call.down_t, list[std::min<int64_t>(R + r, left - 1)]);
        rows[r] = row<T>(call.down_t, list[r]);
        for (int b = 0; b < B; ++b) factors[r][b] = product[static_cast<int64_t>(list[r]) * B + b];
    }
    int64_t i = begin;
    for (; i + STEP <= end; i += STEP) {
        Lanes weights[T::VECTORS][R];
        for (int r = 0; r < R; ++r) {
            for (int k = 0; k < T::VECTORS; ++k) weights[k][r] = T::lanes(rows[r], i, k, width);
            T::ask(next[r], i, STEP, width);
        }
        for (int b = 0; b < B; ++b)
            for (int k = 0; k < T::VECTORS; ++k) {
                float* place = sums + b * width + i + k * LANES;
                Lanes total = load_f32(place);
                for (int r = 0; r < R; ++r) total = multiply_add(weights[k][r], broadcast(factors[r][b]), total);
                store(place, total);
            }
    }
    for (; i < end; ++i)
        for (int b = 0; b < B; ++b)
            for (int r = 0; r < R; ++r)
                sums[b * width + i] = std::fma(T::at(rows[r], i), factors[r][b], sums[b * width + i]);
}

// Calls f with the format of hidden states and predictors.
template <class F>
void with_dtype(int32_t dtype, const F& f) {
    if (dtype == FP32) f(F32());
    else if (dtype == BF16) f(Bf16());
    else f(F16());
}

template <class T, int B>
void down(const FfnCall& call, Scratch& s, const std::vector<int32_t>& listed, int thread, int threads) {
    // Each thread gets whole vectors or pairs of them, so that no two threads write to the same cache line.
    constexpr int STEP = T::VECTORS * LANES;
    const int64_t width = T::width(call.hidden), steps = (width + STEP - 1) / STEP;
    const int64_t begin = std::min(width, steps * thread / threads * STEP);
    const int64_t end = std::min(width, steps * (thread + 1) / threads * STEP);
    if (begin == end) return;
    float *sums = s.sums.data(), *product = s.product.data();
    for (int b = 0; b < B; ++b) std::fill(sums + b * width + begin, sums + b * width + end, 0.0f);
    const int64_t count = static_cast<int64_t>(listed.size());
    int64_t i = 0;
    for (; i + ROWS <= count; i += ROWS) add_rows<T, ROWS, B>(call, listed.data() + i, count - i, product, sums, width, begin, end);
    for (; i < count; ++i) add_rows<T, 1, B>(call, listed.data() + i, count - i, product, sums, width, begin, end);
    with_dtype(call.dtype, [&](auto format) {
        using X = decltype(format);
        auto* out = static_cast<typename X::Stored*>(call.out);
        for (int b = 0; b < call.tokens; ++b)
            for (int64_t j = begin; j < std::min(end, call.hidden); ++j) out[b * call.hidden + j] = X::from(sums[b * width + j]);
    });
}

template <int B>
bool any_token(const float* values) {
    for (int b = 0; b < B; ++b)
        if (values[b] != 0.0f) return true;
    return false;
}

// Writes 1 to `product` where a neuron is predicted for a token, otherwise 0.
template <class T, int B>
void predict(const FfnCall& call, Scratch& s) {
    float *values = s.rank_values.data(), *product = s.product.data();
    all_dots<T, B>(call.predictor_a, nullptr, call.rank, s.predictor_x.data(), call.hidden, [&](int64_t r, const float* dots) {
        for (int b = 0; b < B; ++b) values[b * call.rank + r] = dots[b] <= 0.0f ? 0.0f : dots[b];
    });
    all_dots<T, B>(call.predictor_b, nullptr, call.neurons, values, call.rank, [&](int64_t n, const float* scores) {
        // A NaN score compares false, so its neuron is computed.
        for (int b = 0; b < B; ++b)
            product[n * B + b] = b >= call.tokens || scores[b] <= call.predictor_threshold ? 0.0f : 1.0f;
    });
}

// The work of one thread. Each all_dots ends with a barrier.
template <class T, int B>
void phases(FfnCall& call, Scratch& s, int thread, int threads) {
    static thread_local Lists lists;
    const float* x = s.x.data();
    const int64_t width = T::width(call.hidden);
    float *gate = s.gate.data(), *product = s.product.data();
    const bool predicted = call.predictor_a.data != nullptr;
    if (predicted) {
        with_dtype(call.dtype, [&](auto format) { predict<decltype(format), B>(call, s); });
        compact(nullptr, call.neurons, lists.predicted, [&](int64_t n) { return any_token<B>(product + n * B); });
    }
    const std::vector<int32_t>* candidates = predicted ? &lists.predicted : nullptr;
    const int64_t num_candidates = predicted ? static_cast<int64_t>(lists.predicted.size()) : call.neurons;
    all_dots<T, B>(call.gate, predicted ? lists.predicted.data() : nullptr, num_candidates, x, width,
                   [&](int64_t n, const float* dots) {
                       const float threshold = call.gate_thresholds ? call.gate_thresholds[n] : -1.0f;
                       for (int b = 0; b < B; ++b) {
                           const bool on = b < call.tokens && (!predicted || product[n * B + b] != 0.0f);
                           const float factor = on ? gate_factor(dots[b], call) : 0.0f;
                           gate[n * B + b] = std::fabs(factor) <= threshold ? 0.0f : factor;
                       }
                   });
    compact(candidates, call.neurons, lists.up, [&](int64_t n) { return call.dense || any_token<B>(gate + n * B); });
    all_dots<T, B>(call.up, lists.up.data(), static_cast<int64_t>(lists.up.size()), x, width,
                   [&](int64_t n, const float* dots) {
                       const float threshold = call.thresholds ? call.thresholds[n] : -1.0f;
                       for (int b = 0; b < B; ++b) {
                           const float up = call.up_kind == UP_RELU && dots[b] <= 0.0f ? 0.0f : dots[b];
                           const float value = gate[n * B + b] == 0.0f && !call.dense ? 0.0f : gate[n * B + b] * up;
                           product[n * B + b] = std::fabs(value) <= threshold ? 0.0f : value;
                       }
                   });
    compact(&lists.up, call.neurons, lists.down,
            [&](int64_t n) { return call.dense || any_token<B>(product + n * B); });
    if (thread == 0) {
        call.gate_rows = num_candidates;
        call.up_rows = static_cast<int64_t>(lists.up.size());
        call.down_rows = static_cast<int64_t>(lists.down.size());
    }
    down<T, B>(call, s, lists.down, thread, threads);
}

// [B, width] in fp32, padded with zeros.
template <int B>
void widen(const FfnCall& call, const Matrix& from, int64_t width, std::vector<float>& to) {
    to.assign(B * width, 0.0f);
    with_dtype(call.dtype, [&](auto format) {
        using X = decltype(format);
        for (int b = 0; b < call.tokens; ++b)
            for (int64_t i = 0; i < call.hidden; ++i) to[b * width + i] = X::at(row<X>(from, b), i);
    });
}

template <class T, int B>
void run(FfnCall& call) {
    static thread_local Scratch s;
    const int64_t width = T::width(call.hidden);
    s.sums.resize(B * width);
    s.gate.resize(B * call.neurons);
    s.product.resize(B * call.neurons);
    s.rank_values.resize(B * call.rank);
    widen<B>(call, call.x, width, s.x);
    if (call.predictor_a.data) widen<B>(call, call.predictor_x, call.hidden, s.predictor_x);
    Scratch& shared = s;  // inside the region the thread_local name would mean each thread's own object
#if defined(_OPENMP)
    const int threads = forked ? 1 : std::max(1, call.threads);
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        phases<T, B>(call, shared, omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    phases<T, B>(call, shared, 0, 1);
}

template <class T>
int choose_batch(FfnCall& call) {
    // Other numbers are padded with inactive tokens: a kernel for each would take twice as long to compile.
    if (call.tokens < 1 || call.tokens > MAX_TOKENS) return 1;
    if (call.tokens == 1) run<T, 1>(call);
    else if (call.tokens == 2) run<T, 2>(call);
    else if (call.tokens <= 4) run<T, 4>(call);
    else run<T, 8>(call);
    return 0;
}

}  // namespace
}  // namespace sparsify

extern "C" {

int sparsify_ffn(sparsify::FfnCall* call) {
    using namespace sparsify;
    if (call->dtype < FP32 || call->dtype > FP16) return 2;
    switch (call->weight_format) {
        case INT8: return choose_batch<Int8Blocks>(*call);
        case INT4: return choose_batch<Int4Blocks>(*call);
        case STORED: break;
        default: return 3;
    }
    if (call->dtype == FP32) return choose_batch<F32>(*call);
    return call->dtype == BF16 ? choose_batch<Bf16>(*call) : choose_batch<F16>(*call);
}

int64_t sparsify_call_bytes() { return sizeof(sparsify::FfnCall); }

int sparsify_is_parallel() {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

void sparsify_start() {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { sparsify::forked = true; });
#endif
}

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
