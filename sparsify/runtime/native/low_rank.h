// What a projection adds to its outputs in place of the elements that its mask dropped: left right (dropped elements).
#pragma once

#include "columns.h"

namespace sparsify {

// Mirrors sparsify/runtime/native_ffn.py.
struct LowRank {
    Matrix left, right;  // [outputs, rank], [rank, inputs], of the model's dtype
    int64_t rank;        // 0 without one
};

// right (dropped elements), of B tokens, into `values` [B, rank]. All threads share the work; the caller waits for them.
template <int B>
void multiply_dropped(const LowRank& factors, const SiteMask* mask, const float* from, int64_t tokens, int64_t inputs, int32_t dtype,
                      Input& dropped, float* values) {
    with_dtype(dtype, [&](auto format) {
        using X = decltype(format);
        float* x = dropped.prepare<X, B>(inputs);
        apply_mask(mask, from, tokens, inputs, x, dropped.width);
        for (int64_t b = 0; b < tokens; ++b)
            for (int64_t i = 0; i < inputs; ++i) x[b * dropped.width + i] = from[b * inputs + i] - x[b * dropped.width + i];
        const int64_t rank = factors.rank;
        all_dots<X, B>(factors.right, nullptr, rank, dropped, [=](int64_t r, const float* dots) {
            for (int b = 0; b < B; ++b) values[b * rank + r] = dots[b];
        });
    });
}

// outputs[b] += row n of left, times what `multiply_dropped` made of token b.
template <int B>
[[gnu::noinline]] void add_low_rank(const LowRank& factors, const float* values, int64_t n, int32_t dtype, float* outputs) {
    with_dtype(dtype, [&](auto format) {
        using X = decltype(format);
        const typename X::Stored* rows[1] = {row<X>(factors.left, n)};
        float own[1][MAX_TOKENS];
        dot<X, 1, B>(rows, rows, values, factors.rank, own);
        for (int b = 0; b < B; ++b) outputs[b] += own[0][b];
    });
}

}  // namespace sparsify
