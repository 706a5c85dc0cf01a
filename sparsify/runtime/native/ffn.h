// Gated feed-forward blocks for one to eight tokens at a time, reading only the rows of active neurons.
//
// gate [neurons, hidden], up [neurons, hidden], down_t [neurons, hidden]: neuron n is row n of all three. The work has
// phases, each over the list of neurons that the previous one kept:
//   predict (optional) -> gate rows -> up rows where the gate factor is not zero -> down rows where the product is kept.
// gate and up may be held by columns instead, [hidden, neurons]: then inputs that are zero are skipped, and no neurons.
// Every row's dot product is summed in one fixed order, and every output column over neurons in ascending order, so that
// the result is the same bits for any number of threads.
#pragma once

#include "columns.h"

namespace sparsify {

enum GateKind : int32_t { RELU = 0, RELU_SQUARED = 1, SHIFTED_RELU = 2, SILU = 3 };
enum UpKind : int32_t { IDENTITY = 0, UP_RELU = 1 };

// Mirrors sparsify/runtime/native_ffn.py.
struct FfnCall {
    int64_t tokens, hidden, neurons, rank;
    Matrix x, up_x, gate, up, down_t;  // up_x [tokens, hidden] where up reads another input than gate; otherwise null
    Matrix predictor_x, predictor_a, predictor_b;  // [tokens, hidden], [rank, hidden], [neurons, rank]; null without one
    const float* thresholds;          // [neurons] or null: a product is kept where it is larger in size
    const float* gate_thresholds;     // [neurons] or null: a gate factor is kept where it is larger in size
    const float *gate_constant, *up_constant, *down_constant;  // [neurons], [neurons], [hidden], added to the outputs; or null
    const InputMask *gate_mask, *up_mask;  // of the inputs of gate and up, in a step; null without one
    void* out;                        // [tokens, hidden], contiguous, of the dtype of x
    int32_t dtype, gate_kind, up_kind, dense, threads, weight_format, gate_by_columns, up_by_columns;
    float gate_threshold, predictor_threshold;
    int64_t offered, gate_rows, up_rows, down_rows;  // results, added up: neurons, and rows read of each matrix
    int64_t gate_columns, up_columns;                // and columns read, where a matrix is held by them
};

struct FfnScratch {
    std::vector<float> rank_values, gate, product, sums;
};

// What a block computes from, and where its output goes.
struct FfnTokens {
    const Input *gate_x, *up_x;                   // for rows; null for a matrix that is held by columns
    const Factors *gate_factors, *up_factors;  // for columns; otherwise null
    const Input* predictor_x;  // not rounded; null without a predictor
    const bool* active;        // [MAX_TOKENS]: tokens that the block computes
    float* residual;           // [tokens, hidden]: the output times `shares` is added to it; null to write FfnCall::out
    const float* shares;       // [MAX_TOKENS]
};

// The inputs of gate and up, in the forms in which these read them.
struct FfnInputs {
    Input gate_x, up_x;
    Factors gate_factors, up_factors;

    template <class T, int B>
    void fill(const FfnCall& call, const float* for_gate, const float* for_up, int64_t tokens, FfnTokens& to) {
        const InputMask *gate_mask = call.gate_mask, *up_mask = call.up_mask;
        const bool alike = for_gate == for_up && gate_mask == up_mask && call.gate_by_columns == call.up_by_columns;
        if (call.gate_by_columns) gate_factors.fill<B>(gate_mask, for_gate, tokens, call.hidden);
        else fill_rows<T, B>(gate_mask, for_gate, tokens, call.hidden, gate_x);
        if (!alike && call.up_by_columns) up_factors.fill<B>(up_mask, for_up, tokens, call.hidden);
        else if (!alike) fill_rows<T, B>(up_mask, for_up, tokens, call.hidden, up_x);
        to.gate_x = call.gate_by_columns ? nullptr : &gate_x;
        to.gate_factors = call.gate_by_columns ? &gate_factors : nullptr;
        to.up_x = call.up_by_columns ? nullptr : alike ? &gate_x : &up_x;
        to.up_factors = !call.up_by_columns ? nullptr : alike ? &gate_factors : &up_factors;
    }
};

// Every thread builds the lists itself: that is faster than waiting for one thread to do it.
struct Lists {
    std::vector<int32_t> predicted, columns, up, down;
    std::vector<float> sums;
};

inline float gate_factor(float g, const FfnCall& call) {
    switch (call.gate_kind) {
        case SILU: return g / (1.0f + std::exp(-g));
        case RELU_SQUARED: return g <= call.gate_threshold ? 0.0f : g * g;
        case SHIFTED_RELU: return g <= call.gate_threshold ? 0.0f : g - call.gate_threshold;
        default: return g <= call.gate_threshold ? 0.0f : g;  // NaN compares false and passes
    }
}

template <class T, int B>
void down(const FfnCall& call, const FfnTokens& in, FfnScratch& s, const std::vector<int32_t>& listed, int thread, int threads) {
    const int64_t width = T::width(call.hidden);
    const auto [begin, end] = part_of<T>(width, thread, threads);
    if (begin == end) return;
    float *sums = s.sums.data(), *product = s.product.data();
    add_listed<T, B>(call.down_t, listed, product, sums, width, begin, end);
    for (int b = 0; b < B && call.down_constant; ++b)
        for (int64_t j = begin; j < std::min(end, call.hidden); ++j) sums[b * width + j] += call.down_constant[j];
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
    const auto take_gate = [&](int64_t n, const float* dots) {
        const float threshold = call.gate_thresholds ? call.gate_thresholds[n] : -1.0f;
        const float constant = call.gate_constant ? call.gate_constant[n] : 0.0f;
        for (int b = 0; b < B; ++b) {
            const bool on = in.active[b] && (!predicted || product[n * B + b] != 0.0f);
            const float factor = on ? gate_factor(dots[b] + constant, call) : 0.0f;
            gate[n * B + b] = std::fabs(factor) <= threshold ? 0.0f : factor;
        }
    };
    const auto take_up = [&](int64_t n, const float* dots) {
        const float threshold = call.thresholds ? call.thresholds[n] : -1.0f;
        const float constant = call.up_constant ? call.up_constant[n] : 0.0f;
        for (int b = 0; b < B; ++b) {
            const float own = dots[b] + constant, up = call.up_kind == UP_RELU && own <= 0.0f ? 0.0f : own;
            const float value = gate[n * B + b] == 0.0f && !call.dense ? 0.0f : gate[n * B + b] * up;
            product[n * B + b] = std::fabs(value) <= threshold ? 0.0f : value;
        }
    };
    const Span neurons = part_of<T>(T::width(call.neurons), thread, threads);
    const auto by_columns = [&](const Matrix& m, const Factors& x, bool is_listed, int64_t& read, const auto& take) {
        if (!is_listed) x.list<B>(in.active, call.dense != 0, lists.columns);
        if (thread == 0) read += static_cast<int64_t>(lists.columns.size());
        column_sums<T, B>(m, call.neurons, x, lists.columns, neurons, lists.sums, take);
    };
    if (in.gate_factors) by_columns(call.gate, *in.gate_factors, false, call.gate_columns, take_gate);
    else all_dots<T, B>(call.gate, predicted ? lists.predicted.data() : nullptr, num_candidates, *in.gate_x, take_gate);
    if (thread == 0 && !in.gate_factors) call.gate_rows += num_candidates;
    barrier();  // also where a thread's parts of both are the same neurons: another may still add rows of the previous expert
    if (in.up_factors) {
        by_columns(call.up, *in.up_factors, in.up_factors == in.gate_factors, call.up_columns, take_up);
    } else {
        compact(candidates, call.neurons, lists.up, [&](int64_t n) { return call.dense || any_token<B>(gate + n * B); });
        all_dots<T, B>(call.up, lists.up.data(), static_cast<int64_t>(lists.up.size()), *in.up_x, take_up);
        if (thread == 0) call.up_rows += static_cast<int64_t>(lists.up.size());
    }
    barrier();
    compact(in.up_factors ? nullptr : &lists.up, call.neurons, lists.down,
            [&](int64_t n) { return call.dense || any_token<B>(product + n * B); });
    if (thread == 0) {
        call.offered += call.neurons;
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
