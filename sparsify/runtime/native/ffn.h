// Gated feed-forward blocks for one to eight tokens at a time, reading only the rows of active neurons.
//
// gate [neurons, hidden], up [neurons, hidden], down_t [neurons, hidden]: neuron n is row n of all three. The work has
// phases, each over the list of neurons that the previous one kept:
//   predict (optional) -> gate rows -> up rows where the gate factor is not zero -> down rows where the product is kept.
// With a mask on the up factor, up comes first, and gate rows are read where it is not zero.
// Neurons are predicted by a predictor of low rank, chosen in groups of neighbours by a router, or ranked by int4 copies of gate and up.
// gate and up may be held by columns instead, [hidden, neurons]: then inputs that are zero are skipped, and no neurons.
// Every row's dot product is summed in one fixed order, and every output column over neurons in ascending order, so that
// the result is the same bits for any number of threads.
#pragma once

#include "low_rank.h"
#include "neuron_store.h"

#include <type_traits>

namespace sparsify {

enum GateKind : int32_t { RELU = 0, RELU_SQUARED = 1, SHIFTED_RELU = 2, SILU = 3, GELU_TANH = 4 };
enum UpKind : int32_t { IDENTITY = 0, UP_RELU = 1 };

// Mirrors sparsify/runtime/native_ffn.py.
struct FfnCall {
    int64_t tokens, hidden, neurons, rank;
    int64_t groups, kept_groups;      // neurons in equal groups, 0 without a router; kept_groups: 0 to keep those with scores above 0
    Matrix x, up_x, gate, up, down_t;  // up_x [tokens, hidden] where up reads another input than gate; otherwise null
    Matrix predictor_x, predictor_a, predictor_b;  // [tokens, hidden], [rank, hidden], [neurons, rank]; null without one. See PredictorFormat
    Matrix gate_copy, up_copy;        // int4 [neurons, hidden]; null where no copies rank neurons
    Matrix router;                    // [groups, hidden], of the dtype of x; reads predictor_x
    const float* router_bias;         // [groups], added to scores
    const float *gate_constant, *up_constant, *down_constant;  // [neurons], [neurons], [hidden], added to the outputs; or null
    const SiteMask *gate_mask, *up_mask, *product_mask;  // of the factors and of their product, [neurons]; null without one
    const SiteMask *gate_in_mask, *up_in_mask;           // of the inputs of gate and up, in a step; null without one
    LowRank gate_low_rank, up_low_rank;                  // in a step
    NeuronStore* store;               // where not all neurons are in memory; otherwise null
    NeuronStore* input_store;         // where not all columns of gate and up are: then `store` has rows of down alone; otherwise null
    void* out;                        // [tokens, hidden], contiguous, of the dtype of x
    int32_t dtype, gate_kind, up_kind, dense, threads, weight_format, gate_by_columns, up_by_columns, up_first;
    float gate_threshold, predictor_threshold;
    float copy_threshold;  // a neuron is computed where its product by the copies is larger in size
    int64_t offered, gate_rows, up_rows, down_rows;  // results, added up: neurons, and rows read of each matrix
    int64_t gate_columns, up_columns;                // and columns read, where a matrix is held by them
};

// The format of a predictor's matrices next to weights of a format: int8 blocks next to blocks, otherwise the same.
template <class T, bool PACKED = IsPacked<T>::value>
struct PredictorOf {
    using Format = std::conditional_t<T::BITS != 0, Int8Blocks, T>;
};
template <class T>
struct PredictorOf<T, true> : PredictorOf<typename T::Dense> {};
template <class T>
using PredictorFormat = typename PredictorOf<T>::Format;

struct FfnScratch {
    std::vector<float> rank_values, ranked, factor, product, sums, gate_dropped, up_dropped;
};

// What a block computes from, and where its output goes.
struct FfnTokens {
    const Input *gate_x, *up_x;                   // for rows; null for a matrix that is held by columns
    const Factors *gate_factors, *up_factors;     // for columns; otherwise null
    const float* x;            // [tokens, hidden]: the input before its masks, where projections have low-rank factors
    const Input* predictor_x;  // for rows of PredictorFormat; null without a predictor
    const Input* copy_x;       // for int4 rows; null without copies
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
        const SiteMask *gate_mask = call.gate_in_mask, *up_mask = call.up_in_mask;
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
    std::vector<int32_t> predicted, columns, second, down;
    std::vector<float> sums, vector;
    Input ranks, dropped;
};

// The projection and the factor of one side of a block.
struct Half {
    bool is_gate;
    const Matrix& weight;
    const Input* x;
    const Factors* factors;
    const float* constant;
    const SiteMask* mask;
    const LowRank& low_rank;
    const float* dropped;  // [B, rank]
    int64_t &rows, &columns;

    // Whether its factors follow from its products alone.
    bool is_bare() const { return !constant && !mask && !low_rank.rank; }
};

inline float gate_factor(float g, const FfnCall& call) {
    switch (call.gate_kind) {
        case SILU: return g / (1.0f + std::exp(-g));
        case GELU_TANH: return g / (1.0f + std::exp(-1.5957691216f * (g + 0.044715f * g * g * g)));  // 1 + tanh(z) is 2 sigmoid(2z)
        case RELU_SQUARED: return g <= call.gate_threshold ? 0.0f : g * g;
        case SHIFTED_RELU: return g <= call.gate_threshold ? 0.0f : g - call.gate_threshold;
        default: return g <= call.gate_threshold ? 0.0f : g;  // NaN compares false and passes
    }
}

inline float up_factor(float u, const FfnCall& call) { return call.up_kind == UP_RELU && u <= 0.0f ? 0.0f : u; }

// Its element n, set to zero by a mask whose elements do not depend on each other.
inline float masked(const SiteMask* mask, int64_t n, float value) {
    return mask && mask->rule == THRESHOLD && std::fabs(value) <= mask->thresholds[n] ? 0.0f : value;
}

// The factors of neuron n for B tokens, from its dot products.
template <int B>
[[gnu::noinline]] void factors_of(const FfnCall& call, const Half& half, int64_t n, const float* dots, float* out) {
    for (int b = 0; b < B; ++b) out[b] = dots[b] + (half.constant ? half.constant[n] : 0.0f);
    if (half.low_rank.rank) add_low_rank<B>(half.low_rank, half.dropped, n, call.dtype, out);
    for (int b = 0; b < B; ++b) {
        const float factor = half.is_gate ? gate_factor(out[b], call) : up_factor(out[b], call);
        out[b] = masked(half.mask, n, factor);
    }
}

// Calls change(vector, token) for the listed elements of one active token's `values` [neurons, B] after the other, zeros in place of
// the others. The threads take tokens in turn; the caller waits for them.
template <int B, class Change>
void for_tokens(const FfnTokens& in, const std::vector<int32_t>* list, int64_t neurons, std::vector<float>& vector, float* values,
                int thread, int threads, const Change& change) {
    for (int b = thread; b < B; b += threads) {
        if (!in.active[b]) continue;
        vector.assign(neurons, 0.0f);
        for_each(list, neurons, [&](int64_t n) { vector[n] = values[n * B + b]; });
        change(vector.data(), b);
        for_each(list, neurons, [&](int64_t n) { values[n * B + b] = vector[n]; });
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
    float* own = ranks.prepare<T, B>(call.rank);
    for (int b = 0; b < B; ++b) std::copy_n(values + b * call.rank, call.rank, own + b * ranks.width);
    ranks.finish<T, B>();
    all_dots<T, B>(call.predictor_b, nullptr, call.neurons, ranks, [&](int64_t n, const float* scores) {
        // A NaN score compares false, so its neuron is computed.
        for (int b = 0; b < B; ++b)
            product[n * B + b] = !in.active[b] || scores[b] <= call.predictor_threshold ? 0.0f : 1.0f;
    });
    barrier();
}

// Writes 1 to `product` where a token's router keeps the group of a neuron, otherwise 0. All threads share the work.
template <class T, int B>
void choose_groups(const FfnCall& call, const FfnTokens& in, FfnScratch& s, int thread, int threads) {
    float *values = s.rank_values.data(), *product = s.product.data();
    const int64_t groups = call.groups, size = call.neurons / groups;
    all_dots<T, B>(call.router, nullptr, groups, *in.predictor_x, [&](int64_t g, const float* dots) {
        // A NaN score compares false, so its group is computed.
        for (int b = 0; b < B; ++b) {
            const float score = dots[b] + call.router_bias[g];
            values[b * groups + g] = call.kept_groups ? score : score <= 0.0f ? 0.0f : 1.0f;
        }
    });
    barrier();
    for (int b = thread; b < B && call.kept_groups; b += threads) {
        static thread_local Scores scores;
        scores.of.assign(values + b * groups, values + (b + 1) * groups);
        SiteMask largest{};
        largest.kept = call.kept_groups;
        std::fill(values + b * groups, values + (b + 1) * groups, 1.0f);
        keep_largest(largest, groups, values + b * groups, scores);
    }
    if (call.kept_groups) barrier();
    for (int64_t g = thread; g < groups; g += threads)
        for (int64_t n = g * size; n < (g + 1) * size; ++n)
            for (int b = 0; b < B; ++b) product[n * B + b] = in.active[b] ? values[b * groups + g] : 0.0f;
    barrier();
}

// Writes 1 to `ranked` where the int4 copies of a neuron's rows say that it counts for a token, otherwise 0.
template <int B>
void rank(const FfnCall& call, const FfnTokens& in, FfnScratch& s) {
    float* ranked = s.ranked.data();
    all_dots<Int4Blocks, B>(call.gate_copy, nullptr, call.neurons, *in.copy_x, [&](int64_t n, const float* dots) {
        for (int b = 0; b < B; ++b) ranked[n * B + b] = gate_factor(dots[b], call);
    });
    barrier();
    all_dots<Int4Blocks, B>(call.up_copy, nullptr, call.neurons, *in.copy_x, [&](int64_t n, const float* dots) {
        for (int b = 0; b < B; ++b) {
            const float size = std::fabs(ranked[n * B + b] * up_factor(dots[b], call));
            ranked[n * B + b] = !in.active[b] || size <= call.copy_threshold ? 0.0f : 1.0f;
        }
    });
    barrier();
}

// The work of one thread. The caller waits for all threads before the output is used, and before the next call.
template <class T, int B>
void phases(FfnCall& call, const FfnTokens& in, FfnScratch& s, int thread, int threads) {
    static thread_local Lists lists;
    float *factor = s.factor.data(), *product = s.product.data();
    if (call.store && thread == 0) call.store->x = in.x;
    const bool ranked = call.gate_copy.data != nullptr, routed = call.router.data != nullptr;
    const bool predicted = ranked || routed || call.predictor_a.data != nullptr;
    if (ranked) rank<B>(call, in, s);
    else if (routed) with_dtype(call.dtype, [&](auto format) { choose_groups<decltype(format), B>(call, in, s, thread, threads); });
    else if (predicted) predict<PredictorFormat<T>, B>(call, in, s, lists.ranks);
    const float* chosen = ranked ? s.ranked.data() : product;
    if (predicted)
        compact(nullptr, call.neurons, lists.predicted, [&](int64_t n) { return call.dense || any_token<B>(chosen + n * B); });
    const std::vector<int32_t>* candidates = predicted ? &lists.predicted : nullptr;
    const Half gate{true, call.gate, in.gate_x, in.gate_factors, call.gate_constant, call.gate_mask, call.gate_low_rank,
                    s.gate_dropped.data(), call.gate_rows, call.gate_columns};
    const Half up{false, call.up, in.up_x, in.up_factors, call.up_constant, call.up_mask, call.up_low_rank,
                  s.up_dropped.data(), call.up_rows, call.up_columns};
    const Half &first = call.up_first ? up : gate, &second = call.up_first ? gate : up;
    const auto start = [&](const LowRank& factors, const SiteMask* mask, std::vector<float>& to) {
        if (factors.rank) multiply_dropped<B>(factors, mask, in.x, call.tokens, call.hidden, call.dtype, lists.dropped, to.data());
    };
    start(call.gate_low_rank, call.gate_in_mask, s.gate_dropped);
    start(call.up_low_rank, call.up_in_mask, s.up_dropped);
    if (call.gate_low_rank.rank || call.up_low_rank.rank) barrier();

    // A mask that compares the second factors must see all of them before they are multiplied.
    const bool apart = compares(second.mask);
    const auto times = [&](int64_t n, int b, float other) {
        return factor[n * B + b] == 0.0f && !call.dense ? 0.0f : factor[n * B + b] * other;
    };
    const Half* half = &first;
    const auto take = [&](int64_t n, const float* dots) {
        float own[B];
        factors_of<B>(call, *half, n, dots, own);
        for (int b = 0; b < B; ++b) {
            const bool on = in.active[b] && (!predicted || chosen[n * B + b] != 0.0f);
            if (half == &first) factor[n * B + b] = on ? own[b] : 0.0f;
            else if (apart) product[n * B + b] = on ? own[b] : 0.0f;
            else product[n * B + b] = on ? masked(call.product_mask, n, times(n, b, own[b])) : 0.0f;
        }
    };
    // The usual case without the others' branches, which cost as much as a sixth of a short row's product: a ReLU of gates, without masks
    // of the factors and what is added to outputs, and all that is computed counts.
    bool counts = !predicted || (B == 1 && !call.dense);
    for (int b = 0; b < B; ++b) counts &= in.active[b];
    const bool usual_gate = counts && first.is_gate && call.gate_kind == RELU && first.is_bare();
    const bool usual_up = counts && !second.is_gate && second.is_bare();
    const auto take_gate = [factor, limit = call.gate_threshold](int64_t n, const float* dots) {
        for (int b = 0; b < B; ++b) factor[n * B + b] = dots[b] <= limit ? 0.0f : dots[b];
    };
    const bool rectified = call.up_kind == UP_RELU, dense = call.dense != 0;
    const float* limits = call.product_mask && call.product_mask->rule == THRESHOLD ? call.product_mask->thresholds : nullptr;
    const auto take_up = [factor, product, rectified, dense, limits](int64_t n, const float* dots) {
        for (int b = 0; b < B; ++b) {
            const float gate_value = factor[n * B + b], up_value = rectified && dots[b] <= 0.0f ? 0.0f : dots[b];
            const float value = gate_value == 0.0f && !dense ? 0.0f : gate_value * up_value;
            product[n * B + b] = limits && std::fabs(value) <= limits[n] ? 0.0f : value;
        }
    };
    const auto compute = [&](const Half& which, const std::vector<int32_t>* list, bool columns_listed, const auto& take) {
        half = &which;
        if (which.factors) {
            if (!columns_listed) which.factors->list<B>(in.active, call.dense != 0, lists.columns);
            if (!columns_listed && call.input_store) {
                barrier();  // reading columns may change the weights of the mask that every thread has applied
                fetch(*call.input_store, &lists.columns, call.hidden, thread);
            }
            const Span neurons = part_of<T>(T::width(call.neurons), thread, threads);
            column_sums<T, B>(which.weight, call.neurons, *which.factors, lists.columns, neurons, lists.sums, take);
            if (thread == 0) which.columns += static_cast<int64_t>(lists.columns.size());
            return;
        }
        const int64_t count = list ? static_cast<int64_t>(list->size()) : call.neurons;
        if (call.store && call.store->holds == SECOND_ROWS && half == &first) stored_dots<T, B>(*call.store, which.weight.row_stride, *which.x, thread, take);
        else all_dots<T, B>(which.weight, list ? list->data() : nullptr, count, *which.x, take);
        if (thread == 0) which.rows += count;
    };
    if (call.store && call.store->holds == ALL_ROWS) fetch(*call.store, candidates, call.neurons, thread);
    if (usual_gate) compute(first, candidates, false, take_gate);
    else compute(first, candidates, false, take);
    barrier();  // also where a thread's parts of both are the same neurons: another may still add rows of the previous expert
    if (compares(first.mask)) {
        for_tokens<B>(in, candidates, call.neurons, lists.vector, factor, thread, threads,
                      [&](float* values, int) { mask_vector(*first.mask, call.neurons, values); });
        barrier();
    }
    const std::vector<int32_t>* computed = candidates;
    if (!second.factors && !apart) {
        compact(candidates, call.neurons, lists.second, [&](int64_t n) { return call.dense || any_token<B>(factor + n * B); });
        computed = &lists.second;
    }
    if (call.store && call.store->holds == SECOND_ROWS) fetch(*call.store, computed, call.neurons, thread);
    const bool listed = second.factors && second.factors == first.factors;
    if (usual_up) compute(second, computed, listed, take_up);
    else compute(second, computed, listed, take);
    barrier();
    if (apart || compares(call.product_mask)) {
        for_tokens<B>(in, computed, call.neurons, lists.vector, product, thread, threads, [&](float* values, int b) {
            if (apart) {
                mask_vector(*second.mask, call.neurons, values);
                for_each(computed, call.neurons, [&](int64_t n) { values[n] = times(n, b, values[n]); });
            }
            if (call.product_mask) mask_vector(*call.product_mask, call.neurons, values);
        });
        barrier();
    }
    compact(computed, call.neurons, lists.down, [&](int64_t n) { return call.dense || any_token<B>(product + n * B); });
    if (thread == 0) {
        call.offered += call.neurons;
        call.down_rows += static_cast<int64_t>(lists.down.size());
    }
    if (call.store && call.store->holds == DOWN_ROWS) fetch(*call.store, &lists.down, call.neurons, thread);
    down<T, B>(call, in, s, lists.down, thread, threads);
}

// Makes room for a block; what is there for a larger one stays.
template <class T, int B>
void reserve(const FfnCall& call, FfnScratch& s) {
    const auto room = [](std::vector<float>& values, int64_t count) {
        if (static_cast<int64_t>(values.size()) < count) values.resize(count);
    };
    room(s.sums, B * T::width(call.hidden));
    room(s.factor, B * call.neurons);
    room(s.product, B * call.neurons);
    room(s.rank_values, B * std::max(call.rank, call.groups));
    room(s.gate_dropped, B * call.gate_low_rank.rank);
    room(s.up_dropped, B * call.up_low_rank.rank);
    room(s.ranked, call.gate_copy.data ? B * call.neurons : 0);
}

}  // namespace sparsify
