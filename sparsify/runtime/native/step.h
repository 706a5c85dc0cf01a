// One decoding step of a whole model: one new token of each of one to eight sequences, from its embedding to its logits.
//
// All threads run the whole step together and wait for each other only where one needs what another computed: six times a layer,
// or eight with a predictor or with int4 copies that rank neurons, and once more for each block whose output is normed. Norms and
// roundings are repeated by every thread, which is faster than waiting for one. Sums and the residual stream are fp32; what a
// linear projection reads is rounded to the model's dtype, as its own code rounds it.
#pragma once

#include "attention.h"
#include "ffn.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>

namespace sparsify {

// A linear projection: [outputs, inputs] of this format, or [inputs, outputs] if it is held by columns.
struct Linear {
    Matrix weight;
    int64_t outputs;
    const SiteMask* mask;   // of its input; null without one
    const float* constant;  // [outputs], added to them; null without one
    LowRank low_rank;
    int32_t format, by_columns;
    int64_t columns_read;  // result, added up over steps: columns, if it is held by them
};

// Where the time goes, as the first thread sees it.
enum Part { PROJECTIONS = 0, ATTENTION = 1, FFN = 2, HEAD = 3, REST = 4, PARTS = 5 };

struct StepLayer {
    // Factors of norms, [hidden]: of what the block reads, null if that is the residual stream; and of what it adds to that, null
    // if it adds its output as it is.
    const float *attention_norm, *ffn_norm, *attention_output_norm, *ffn_output_norm;
    Linear q, k, v, o;
    void *keys, *values;
    const void* router;  // [experts, hidden], of the model's dtype; null in a dense model
    const float *q_norm, *k_norm;  // of each head [head_dim], or of all together; null without norms of queries and keys
    FfnCall* experts;    // one, or one for each expert
    int64_t windowed;    // whether it is StepCall::windowed that it attends by
    int64_t tokens;      // result, added up over steps
};

// Mirrors sparsify/runtime/native_step.py.
struct StepCall {
    Attention attention, windowed;  // of layers that attend to everything, and of those with a sliding window if a model has both
    int64_t hidden, layers, num_experts, experts_per_token;
    const int64_t* ids;     // [tokens]
    const void* embedding;  // [vocabulary, hidden]
    const float* final_norm;
    Linear head;
    StepLayer* layer;
    void* logits;  // [tokens, vocabulary], of the model's dtype
    float norm_epsilon, embedding_scale;
    int32_t rounds_before_factors;  // whether norms round to the model's dtype before they multiply by their factors, too
    int32_t norms_all_heads;        // whether norms of queries and keys are of all heads together
    int32_t dtype, threads, predictor_reads_residual;
    double seconds[PARTS];  // results, added up over steps
};

namespace step {

struct Shared {
    std::vector<float> residual;    // [tokens, hidden]
    std::vector<float> attention_output, ffn_output;  // the same, where they are normed
    std::vector<float> rotated[3];  // [tokens, inputs], of each projection that reads the same vectors; in a block of gate and up
    std::vector<float> dropped[3];  // [B, rank], of each of these projections
    AttentionScratch attention;
    FfnScratch ffn;
};

// What every thread makes for itself.
struct Own {
    Input x, predictor_x, copy_x, dropped;
    Factors factors;
    FfnInputs ffn;
    std::vector<int32_t> listed;
    std::vector<float> normed, combined, probabilities, sums;
};

class Clock {
public:
    Clock(double* seconds, bool on) : seconds_(on ? seconds : nullptr), last_(now()) {}
    void book(Part part) {
        if (!seconds_) return;
        const auto time = now();
        seconds_[part] += std::chrono::duration<double>(time - last_).count();
        last_ = time;
    }

private:
    using Time = std::chrono::steady_clock::time_point;
    static Time now() { return std::chrono::steady_clock::now(); }
    double* seconds_;
    Time last_;
};

// RMS norm of each token (arXiv 1910.07467), rounded where the model's own code rounds; without factors the vectors themselves.
template <class X>
void norm(const StepCall& call, const float* residual, const float* factors, int64_t tokens, int64_t hidden, std::vector<float>& out) {
    out.resize(tokens * hidden);
    if (!factors) {
        for (int64_t j = 0; j < tokens * hidden; ++j) out[j] = rounded<X>(residual[j]);
        return;
    }
    for (int64_t b = 0; b < tokens; ++b) {
        const float* x = residual + b * hidden;
        Lanes squares[4] = {zeros(), zeros(), zeros(), zeros()};
        int64_t i = 0;
        for (; i + 4 * LANES <= hidden; i += 4 * LANES)
            for (int k = 0; k < 4; ++k) {
                const Lanes value = load_f32(x + i + k * LANES);
                squares[k] = multiply_add(value, value, squares[k]);
            }
        float total = sum(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
        for (; i < hidden; ++i) total += x[i] * x[i];
        const float scale = 1.0f / std::sqrt(total / static_cast<float>(hidden) + call.norm_epsilon);
        float* to = out.data() + b * hidden;
        for (int64_t j = 0; j < hidden; ++j) to[j] = x[j] * scale;
        if (call.rounds_before_factors)
            for (int64_t j = 0; j < hidden; ++j) to[j] = rounded<X>(to[j]);
        for (int64_t j = 0; j < hidden; ++j) to[j] = rounded<X>(to[j] * factors[j]);
    }
}

// Sets this thread's part of the vectors to 0.
inline void clear(std::vector<float>& values, int thread, int threads) {
    const int64_t size = static_cast<int64_t>(values.size());
    std::fill(values.begin() + size * thread / threads, values.begin() + size * (thread + 1) / threads, 0.0f);
}

// Adds the norm of a block's output to the residual stream: this thread's part of it, which others read after a barrier.
inline void add_normed(const StepCall& call, const std::vector<float>& output, const float* factors, Shared& s, Own& own, int thread,
                       int threads) {
    const int64_t tokens = call.attention.tokens, size = tokens * call.hidden;
    with_dtype(call.dtype, [&](auto dtype) {
        norm<decltype(dtype)>(call, output.data(), factors, tokens, call.hidden, own.normed);
    });
    for (int64_t i = size * thread / threads; i < size * (thread + 1) / threads; ++i) s.residual[i] += own.normed[i];
    barrier();
}

// The norm of each head of queries or keys [heads, head_dim], in place; every thread takes some of the heads.
template <class X>
void norm_heads(const StepCall& call, float* values, const float* factors, int64_t heads, int64_t head_dim, Own& own, int thread,
                int threads) {
    const int64_t begin = heads * thread / threads, end = heads * (thread + 1) / threads;
    float* mine = values + begin * head_dim;
    for (int64_t i = 0; i < (end - begin) * head_dim; ++i) mine[i] = rounded<X>(mine[i]);
    norm<X>(call, mine, factors, end - begin, head_dim, own.sums);
    std::copy(own.sums.begin(), own.sums.begin() + (end - begin) * head_dim, mine);
}

// One projection of several that read the same vectors: to[b * stride + n] = (or +=) output n of token b.
struct Product {
    Linear* linear;
    float* to;
    int64_t stride;
    bool adding;
};

// The vectors that a projection reads: those given, or, once all threads have passed a barrier, their rotation, of which this
// computes a thread's part.
template <int B>
const float* turned(const SiteMask* mask, const float* from, int64_t tokens, int64_t inputs, int32_t dtype, std::vector<float>& to,
                    Own& own, int thread, int threads) {
    if (!mask || !mask->basis.data) return from;
    rotate<B>(mask->basis, dtype, from, tokens, inputs, own.factors, own.listed, own.sums, to.data(), thread, threads);
    return to.data();
}

// All of them, waiting for the other threads only for rotations and low-rank factors. Outputs of matrices that are held by columns are
// one range, of which each thread takes one part: its runs through memory are longer than with a part of each matrix.
template <class T, int B, size_t N>
void project(const std::array<Product, N>& products, const float* given, int64_t tokens, int64_t inputs, int32_t dtype, Shared& s,
             Own& own, int thread, int threads) {
    int64_t width = 0, before = 0;
    const float* from[N];
    bool waits = false;
    for (size_t k = 0; k < N; ++k) {
        const Linear& linear = *products[k].linear;
        const bool again = k > 0 && linear.mask == products[k - 1].linear->mask;
        from[k] = again ? from[k - 1] : turned<B>(linear.mask, given, tokens, inputs, dtype, s.rotated[k], own, thread, threads);
        if (linear.low_rank.rank) multiply_dropped<B>(linear.low_rank, linear.mask, given, tokens, inputs, dtype, own.dropped, s.dropped[k].data());
        waits |= from[k] != given || linear.low_rank.rank != 0;
        width += linear.by_columns ? T::width(linear.outputs) : 0;
    }
    if (waits) barrier();
    const Span span = part_of<T>(width, thread, threads);
    const Linear *listed = nullptr, *filled = nullptr;
    for (size_t k = 0; k < N; ++k) {
        const Product& one = products[k];
        Linear& linear = *one.linear;
        const float* dropped = s.dropped[k].data();
        const auto put = [=, &linear](int64_t n, const float* values) {
            float sums[B];
            std::copy(values, values + B, sums);
            if (linear.low_rank.rank) add_low_rank<B>(linear.low_rank, dropped, n, dtype, sums);
            for (int64_t b = 0; b < tokens; ++b) {
                float& place = one.to[b * one.stride + n];
                const float value = linear.constant ? sums[b] + linear.constant[n] : sums[b];
                place = one.adding ? place + value : value;
            }
        };
        if (!linear.by_columns) {
            if (!filled || filled->mask != linear.mask) fill_rows<T, B>(linear.mask, from[k], tokens, inputs, own.x);
            filled = &linear;
            all_dots<T, B>(linear.weight, nullptr, linear.outputs, own.x, put);
            continue;
        }
        const Span part{std::max<int64_t>(0, span.begin - before), std::min(T::width(linear.outputs), span.end - before)};
        before += T::width(linear.outputs);
        if (part.empty()) continue;
        if (!listed || listed->mask != linear.mask) {
            own.factors.fill<B>(linear.mask, from[k], tokens, inputs);
            own.factors.list<B>(nullptr, false, own.listed);
        }
        listed = &linear;
        column_sums<T, B>(linear.weight, linear.outputs, own.factors, own.listed, part, own.sums, put);
        if (part.begin == 0) linear.columns_read += static_cast<int64_t>(own.listed.size());
    }
}

// The logits of normed vectors, without waiting for the other threads.
template <class T, int B>
void head(const StepCall& call, Own& own) {
    const int64_t vocabulary = call.head.outputs, tokens = call.attention.tokens;
    fill_rows<T, B>(nullptr, own.normed.data(), tokens, call.hidden, own.x);
    all_dots<T, B>(call.head.weight, nullptr, vocabulary, own.x, [&](int64_t n, const float* dots) {
        with_dtype(call.dtype, [&](auto dtype) {
            using X = decltype(dtype);
            auto* logits = static_cast<typename X::Stored*>(call.logits);
            for (int64_t b = 0; b < tokens; ++b) logits[b * vocabulary + n] = X::from(dots[b]);
        });
    });
}

// Router weight of every expert for every token, 0 for those that it is not routed to: [tokens, experts].
template <class X>
void route(const StepCall& call, const StepLayer& layer, const std::vector<float>& x, std::vector<float>& shares) {
    const int64_t experts = call.num_experts, hidden = call.hidden, tokens = call.attention.tokens;
    const Matrix router{layer.router, hidden};
    shares.assign(tokens * experts, 0.0f);
    std::vector<float> probability(experts);
    for (int64_t b = 0; b < tokens; ++b) {
        float largest = -std::numeric_limits<float>::infinity(), total = 0.0f, chosen = 0.0f;
        for (int64_t e = 0; e < experts; ++e) {
            float out[1][MAX_TOKENS];
            const typename X::Stored* rows[1] = {row<X>(router, e)};
            dot<X, 1, 1>(rows, rows, x.data() + b * hidden, hidden, out);
            probability[e] = rounded<X>(out[0][0]);
            largest = std::max(largest, probability[e]);
        }
        for (float& one : probability) total += one = std::exp(one - largest);
        for (int64_t slot = 0; slot < call.experts_per_token; ++slot) {
            int64_t best = -1;
            for (int64_t e = 0; e < experts; ++e)
                if (shares[b * experts + e] == 0.0f && (best < 0 || !(probability[e] <= probability[best]))) best = e;
            // A token must count as routed even where its weight is 0: the smallest number is as good.
            shares[b * experts + best] = std::max(probability[best] / total, std::numeric_limits<float>::min());
            chosen += shares[b * experts + best];
        }
        for (int64_t e = 0; e < experts; ++e) shares[b * experts + e] /= chosen;
    }
}

template <class F>
void with_format(int32_t format, int32_t dtype, const F& f) {
    if (format == INT8) f(Int8Blocks());
    else if (format == INT4) f(Int4Blocks());
    else if (format == PACKED_BF16) f(PackedBf16());
    else if (format == PACKED_INT8) f(PackedInt8());
    else if (format == PACKED_INT4) f(PackedInt4());
    else with_dtype(dtype, f);
}

template <int B>
void attention_block(const StepCall& call, StepLayer& layer, Shared& s, Own& own, Clock& clock, int thread, int threads) {
    const Attention& a = layer.windowed ? call.windowed : call.attention;
    const int64_t width = a.heads * a.head_dim, kv_width = a.kv_heads * a.head_dim;
    with_dtype(call.dtype, [&](auto dtype) {
        norm<decltype(dtype)>(call, s.residual.data(), layer.attention_norm, a.tokens, call.hidden, own.normed);
    });
    if (layer.ffn_output_norm) clear(s.ffn_output, thread, threads);  // nobody reads or writes it in this block
    clock.book(REST);
    with_format(layer.q.format, call.dtype, [&](auto format) {
        using T = decltype(format);
        const std::array<Product, 3> products{{{&layer.q, s.attention.q.data(), width, false},
                                               {&layer.k, s.attention.k.data(), kv_width, false},
                                               {&layer.v, s.attention.v.data(), kv_width, false}}};
        project<T, B>(products, own.normed.data(), a.tokens, call.hidden, call.dtype, s, own, thread, threads);
    });
    barrier();
    if (layer.q_norm) {
        with_dtype(call.dtype, [&](auto dtype) {
            using X = decltype(dtype);
            const int64_t heads = call.norms_all_heads ? 1 : a.heads, kv_heads = call.norms_all_heads ? 1 : a.kv_heads;
            norm_heads<X>(call, s.attention.q.data(), layer.q_norm, a.tokens * heads, width / heads, own, thread, threads);
            norm_heads<X>(call, s.attention.k.data(), layer.k_norm, a.tokens * kv_heads, kv_width / kv_heads, own, thread, threads);
        });
        barrier();
    }
    clock.book(PROJECTIONS);
    with_dtype(a.dtype, [&](auto dtype) { attention<decltype(dtype)>(a, s.attention, layer.keys, layer.values); });
    own.combined.resize(a.tokens * width);
    combine(a, s.attention, own.combined.data(), width);
    with_dtype(call.dtype, [&](auto dtype) {
        for (float& one : own.combined) one = rounded<decltype(dtype)>(one);
    });
    clock.book(ATTENTION);
    with_format(layer.o.format, call.dtype, [&](auto format) {
        using T = decltype(format);
        const bool adding = !layer.attention_output_norm;
        float* to = adding ? s.residual.data() : s.attention_output.data();
        const std::array<Product, 1> product{{{&layer.o, to, call.hidden, adding}}};
        project<T, B>(product, own.combined.data(), a.tokens, width, call.dtype, s, own, thread, threads);
    });
    barrier();
    clock.book(PROJECTIONS);
    if (layer.attention_output_norm) add_normed(call, s.attention_output, layer.attention_output_norm, s, own, thread, threads);
}

template <int B>
void ffn_block(const StepCall& call, StepLayer& layer, Shared& s, Own& own, Clock& clock, int thread, int threads) {
    const int64_t tokens = call.attention.tokens;
    const bool predicts = layer.experts->predictor_a.data || layer.experts->router.data, ranks = layer.experts->gate_copy.data;
    with_dtype(call.dtype, [&](auto dtype) {
        using X = decltype(dtype);
        norm<X>(call, s.residual.data(), layer.ffn_norm, tokens, call.hidden, own.normed);
        if (layer.router) route<X>(call, layer, own.normed, own.probabilities);
        if (ranks) fill_rows<Int4Blocks, B>(nullptr, own.normed.data(), tokens, call.hidden, own.copy_x);
    });
    const FfnCall& any_expert = *layer.experts;  // the basis of a layer's inputs is that of all experts
    const float* x = own.normed.data();
    const auto turn = [&](const SiteMask* mask, int to) {
        return turned<B>(mask, x, tokens, call.hidden, call.dtype, s.rotated[to], own, thread, threads);
    };
    const float* for_gate = turn(any_expert.gate_in_mask, 0);
    const bool alike = any_expert.gate_in_mask == any_expert.up_in_mask;
    const float* for_up = alike ? for_gate : turn(any_expert.up_in_mask, 1);
    if (for_gate != x || for_up != x) barrier();
    const int64_t experts = layer.router ? call.num_experts : 1;
    with_format(layer.experts->weight_format, call.dtype, [&](auto format) {
        using T = decltype(format);
        if (predicts) {
            const float* seen = call.predictor_reads_residual ? s.residual.data() : own.normed.data();
            const auto fill = [&](auto own_format) {
                fill_rows<decltype(own_format), B>(nullptr, seen, tokens, call.hidden, own.predictor_x);
            };
            if (layer.experts->router.data) with_dtype(call.dtype, fill);
            else fill(PredictorFormat<T>());
        }
        FfnTokens in{};
        in.x = x;
        const FfnCall* filled = nullptr;  // experts whose masks are the same read the same input
        clock.book(REST);
        for (int64_t e = 0; e < experts; ++e) {
            bool active[MAX_TOKENS] = {};
            float shares[MAX_TOKENS] = {};
            bool any = false;
            for (int64_t b = 0; b < tokens; ++b) {
                shares[b] = layer.router ? own.probabilities[b * experts + e] : 1.0f;
                any |= active[b] = shares[b] != 0.0f;
            }
            if (!any) continue;
            FfnCall& expert = layer.experts[e];
            if (!filled || filled->gate_in_mask != expert.gate_in_mask || filled->up_in_mask != expert.up_in_mask)
                own.ffn.fill<T, B>(expert, for_gate, for_up, tokens, in);
            filled = &expert;
            in.predictor_x = predicts ? &own.predictor_x : nullptr;
            in.copy_x = ranks ? &own.copy_x : nullptr;
            in.active = active;
            in.residual = layer.ffn_output_norm ? s.ffn_output.data() : s.residual.data();
            in.shares = shares;
            phases<T, B>(expert, in, s.ffn, thread, threads);
        }
    });
    barrier();
    clock.book(FFN);
    if (layer.ffn_output_norm) add_normed(call, s.ffn_output, layer.ffn_output_norm, s, own, thread, threads);
}

template <int B>
void run(StepCall& call) {
    static thread_local Shared kept;
    Shared& s = kept;  // inside the region the thread_local name would mean each thread's own object
    const Attention& a = call.attention;
    s.residual.resize(a.tokens * call.hidden);
    s.attention_output.resize(s.residual.size());
    s.ffn_output.resize(s.residual.size());
    Attention longest = a;
    longest.cached = std::max(a.cached, call.windowed.cached);
    s.attention.reserve(longest);
    for (auto& one : s.rotated) one.resize(a.tokens * std::max(call.hidden, a.heads * a.head_dim));
    for (int64_t l = 0; l < call.layers; ++l) {
        StepLayer& layer = call.layer[l];
        layer.tokens += a.tokens;
        const Linear* linears[4] = {&layer.q, &layer.k, &layer.v, &layer.o};
        for (int k = 0; k < 4; ++k) {
            std::vector<float>& dropped = s.dropped[k % 3];  // the output projection is alone
            dropped.resize(std::max<int64_t>(dropped.size(), B * linears[k]->low_rank.rank));
        }
        for (int64_t e = 0; e < std::max<int64_t>(1, call.num_experts); ++e) {
            FfnCall& expert = layer.experts[e];
            expert.tokens = a.tokens;
            with_format(expert.weight_format, call.dtype, [&](auto format) { reserve<decltype(format), B>(expert, s.ffn); });
        }
    }
    with_dtype(call.dtype, [&](auto dtype) {
        using X = decltype(dtype);
        for (int64_t b = 0; b < a.tokens; ++b) {
            const auto* embedding = row<X>({call.embedding, call.hidden}, call.ids[b]);
            for (int64_t i = 0; i < call.hidden; ++i)
                s.residual[b * call.hidden + i] = rounded<X>(X::at(embedding, i) * call.embedding_scale);
        }
    });
    in_parallel(call.threads, [&](int thread, int threads) {
        static thread_local Own own;
        Clock clock(call.seconds, thread == 0);
        for (int64_t l = 0; l < call.layers; ++l) {
            attention_block<B>(call, call.layer[l], s, own, clock, thread, threads);
            ffn_block<B>(call, call.layer[l], s, own, clock, thread, threads);
        }
        with_dtype(call.dtype, [&](auto dtype) {
            using X = decltype(dtype);
            norm<X>(call, s.residual.data(), call.final_norm, a.tokens, call.hidden, own.normed);
        });
        with_format(call.head.format, call.dtype, [&](auto format) { head<decltype(format), B>(call, own); });
        barrier();
        clock.book(HEAD);
    });
}

}  // namespace step
}  // namespace sparsify
