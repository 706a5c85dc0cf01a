// Gated feed-forward blocks for one to eight tokens at a time, reading only the rows of active neurons.
//
// gate [neurons, hidden], up [neurons, hidden], down_t [neurons, hidden]: neuron n is row n of all three. The work has
// phases, each over the list of neurons that the previous one kept:
//   predict (optional) -> gate rows -> up rows where the gate factor is not zero -> down rows where the product is kept.
// Every row's dot product is summed in one fixed order, and every output column over neurons in ascending order, so that
// the result is the same bits for any number of threads.
#pragma once

#include "rows.h"

namespace sparsify {

enum GateKind : int32_t { RELU = 0, RELU_SQUARED = 1, SHIFTED_RELU = 2, SILU = 3 };
enum UpKind : int32_t { IDENTITY = 0, UP_RELU = 1 };

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
    int64_t offered, gate_rows, up_rows, down_rows;  // results, added up: neurons, and rows read of each matrix
};

struct FfnScratch {
    std::vector<float> rank_values, gate, product, sums;
};

// What a block computes from, and where its output goes.
struct FfnTokens {
    const Input* x;
    const Input* predictor_x;  // not rounded; null without a predictor
    const bool* active;        // [MAX_TOKENS]: tokens that the block computes
    float* residual;           // [tokens, hidden]: the output times `shares` is added to it; null to write FfnCall::out
    const float* shares;       // [MAX_TOKENS]
};

// Every thread builds the lists itself: that is faster than waiting for one thread to do it.
struct Lists {
    std::vector<int32_t> predicted, up, down;
};

inline float gate_factor(float g, const FfnCall& call) {
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

template <class T, int B>
void down(const FfnCall& call, const FfnTokens& in, FfnScratch& s, const std::vector<int32_t>& listed, int thread, int threads) {
    // Each thread gets whole vectors or pairs of them, so that no two threads write to the same cache line.
    constexpr int STEP = T::VECTORS * LANES;
    const int64_t width = T::width(call.hidden), steps = (width + STEP - 1) / STEP;
    const int64_t begin = std::min(width, steps * thread / threads * STEP);
    const int64_t end = std::min(width, steps * (thread + 1) / threads * STEP);
    if (begin == end) return;
    float *sums = s.sums.data(), *product = s.product.data();
    add_listed<T, B>(call.down_t, listed, product, sums, width, begin, end);
    if (in.residual) {
        for (int b = 0; b < call.tokens; ++b)
            for (int64_t j = begin; in.active[b] && j < std::min(end, call.hidden); ++j)
                in.residual[b * call.hidden + j] += in.shares[b] * sums[b * width + j];
        return;
    }
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
void predict(const FfnCall& call, const FfnTokens& in, FfnScratch& s, Input& ranks) {
    float *values = s.rank_values.data(), *product = s.product.data();
    all_dots<T, B>(call.predictor_a, nullptr, call.rank, *in.predictor_x, [&](int64_t r, const float* dots) {
        for (int b = 0; b < B; ++b) values[b * call.rank + r] = dots[b] <= 0.0f ? 0.0f : dots[b];
    });
    barrier();
    std::copy(values, values + B * call.rank, ranks.prepare<T, B>(call.rank));
    all_dots<T, B>(call.predictor_b, nullptr, call.neurons, ranks, [&](int64_t n, const float* scores) {
        // A NaN score compares false, so its neuron is computed.
        for (int b = 0; b < B; ++b)
            product[n * B + b] = !in.active[b] || scores[b] <= call.predictor_threshold ? 0.0f : 1.0f;
    });
    barrier();
}

// The work of one thread. The caller waits for all threads before the output is used, and before the next call.
template <class T, int B>
void phases(FfnCall& call, const FfnTokens& in, FfnScratch& s, int thread, int threads) {
    static thread_local Lists lists;
    static thread_local Input ranks;
    float *gate = s.gate.data(), *product = s.product.data();
    const bool predicted = call.predictor_a.data != nullptr;
    if (predicted) {
        with_dtype(call.dtype, [&](auto format) { predict<decltype(format), B>(call, in, s, ranks); });
        compact(nullptr, call.neurons, lists.predicted, [&](int64_t n) { return any_token<B>(product + n * B); });
    }
    const std::vector<int32_t>* candidates = predicted ? &lists.predicted : nullptr;
    const int64_t num_candidates = predicted ? static_cast<int64_t>(lists.predicted.size()) : call.neurons;
    all_dots<T, B>(call.gate, predicted ? lists.predicted.data() : nullptr, num_candidates, *in.x,
                   [&](int64_t n, const float* dots) {
                       const float threshold = call.gate_thresholds ? call.gate_thresholds[n] : -1.0f;
                       for (int b = 0; b < B; ++b) {
                           const bool on = in.active[b] && (!predicted || product[n * B + b] != 0.0f);
                           const float factor = on ? gate_factor(dots[b], call) : 0.0f;
                           gate[n * B + b] = std::fabs(factor) <= threshold ? 0.0f : factor;
                       }
                   });
    barrier();
    compact(candidates, call.neurons, lists.up, [&](int64_t n) { return call.dense || any_token<B>(gate + n * B); });
    all_dots<T, B>(call.up, lists.up.data(), static_cast<int64_t>(lists.up.size()), *in.x,
                   [&](int64_t n, const float* dots) {
                       const float threshold = call.thresholds ? call.thresholds[n] : -1.0f;
                       for (int b = 0; b < B; ++b) {
                           const float up = call.up_kind == UP_RELU && dots[b] <= 0.0f ? 0.0f : dots[b];
                           const float value = gate[n * B + b] == 0.0f && !call.dense ? 0.0f : gate[n * B + b] * up;
                           product[n * B + b] = std::fabs(value) <= threshold ? 0.0f : value;
                       }
                   });
    barrier();
    compact(&lists.up, call.neurons, lists.down,
            [&](int64_t n) { return call.dense || any_token<B>(product + n * B); });
    if (thread == 0) {
        call.offered += call.neurons;
        call.gate_rows += num_candidates;
        call.up_rows += static_cast<int64_t>(lists.up.size());
        call.down_rows += static_cast<int64_t>(lists.down.size());
    }
    down<T, B>(call, in, s, lists.down, thread, threads);
}

// Makes room for a block; what is there for a larger one stays.
template <class T, int B>
void reserve(const FfnCall& call, FfnScratch& s) {
    const auto room = [](std::vector<float>& values, int64_t count) {
        if (static_cast<int64_t>(values.size()) < count) values.resize(count);
    };
    room(s.sums, B * T::width(call.hidden));
    room(s.gate, B * call.neurons);
    room(s.product, B * call.neurons);
    room(s.rank_values, B * call.rank);
}

}  // namespace sparsify
