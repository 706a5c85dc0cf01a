// Products with inputs of which many are zero: W x is the sum of x_i times column i of W, over the inputs i that are not zero.
//
// A projection whose input is masked is held transposed, [inputs, outputs], so that a column of W is one contiguous row. Every
// thread adds its own part of the outputs of all listed rows, as long as it can be: memory is read fastest in long runs. A sum
// adds its terms in ascending order of inputs, so that the result is the same bits for any number of threads.
#pragma once

#include "masks.h"
#include "rows.h"

namespace sparsify {

// The vectors `from` [tokens, count] as the rows of a projection read them.
template <class T, int B>
void fill_rows(const SiteMask* mask, const float* from, int64_t tokens, int64_t count, Input& to) {
    float* values = to.prepare<T, B>(count);
    apply_mask(mask, from, tokens, count, values, to.width);
    to.finish<T, B>();
}

// Calls f for all indices of `list`, or for all without one.
template <class F>
void for_each(const std::vector<int32_t>* list, int64_t indices, const F& f) {
    const int64_t count = list ? static_cast<int64_t>(list->size()) : indices;
    for (int64_t i = 0; i < count; ++i) f(list ? static_cast<int64_t>((*list)[i]) : i);
}

// Indices of `list`, or all without one, that are wanted, ascending, into `kept`.
template <class Wanted>
void compact(const std::vector<int32_t>* list, int64_t indices, std::vector<int32_t>& kept, const Wanted& wanted) {
    const int64_t count = list ? static_cast<int64_t>(list->size()) : indices;
    kept.resize(count);
    int64_t num_kept = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t n = list ? (*list)[i] : static_cast<int32_t>(i);
        kept[num_kept] = n;  // overwritten by the next unless it is needed: no branch to mispredict
        num_kept += wanted(n) ? 1 : 0;
    }
    kept.resize(num_kept);
}

template <int B>
bool any_token(const float* values) {
    for (int b = 0; b < B; ++b)
        if (values[b] != 0.0f) return true;  // a NaN is not zero
    return false;
}

// B tokens as sums of columns read them.
struct Factors {
    std::vector<float> values;  // [inputs, B]
    std::vector<float> masked;  // scratch: [tokens, inputs]
    int64_t count = 0;

    template <int B>
    void fill(const SiteMask* mask, const float* from, int64_t tokens, int64_t inputs) {
        count = inputs;
        masked.resize(tokens * inputs);
        apply_mask(mask, from, tokens, inputs, masked.data(), inputs);
        values.assign(B * inputs, 0.0f);
        for (int64_t b = 0; b < tokens; ++b)
            for (int64_t i = 0; i < inputs; ++i) values[i * B + b] = masked[b * inputs + i];
    }

    // The inputs that are not zero for any token that is active (for all tokens without `active`), or all inputs.
    template <int B>
    void list(const bool* active, bool all, std::vector<int32_t>& listed) const {
        if (!active) return compact(nullptr, count, listed, [&](int64_t i) { return all || any_token<B>(values.data() + i * B); });
        compact(nullptr, count, listed, [&](int64_t i) {
            bool wanted = all;
            for (int b = 0; b < B; ++b) wanted |= active[b] && values[i * B + b] != 0.0f;
            return wanted;
        });
    }
};

struct Span {
    int64_t begin, end;
    bool empty() const { return begin >= end; }
};

// A thread's part of `width` outputs: whole vectors, or pairs of them, so that no two threads write to the same cache line.
template <class T>
Span part_of(int64_t width, int64_t thread, int64_t threads) {
    constexpr int STEP = T::VECTORS * LANES;
    const int64_t steps = (width + STEP - 1) / STEP;
    return {std::min(width, steps * thread / threads * STEP), std::min(width, steps * (thread + 1) / threads * STEP)};
}

// Calls take(n, sums over tokens) for the outputs n of a thread's span. `sums` is the thread's own.
template <class T, int B, class Take>
void column_sums(const Matrix& m, int64_t outputs, const Factors& x, const std::vector<int32_t>& listed, Span span,
                 std::vector<float>& sums, const Take& take) {
    const int64_t width = T::width(outputs);
    if (span.empty()) return;
    if (static_cast<int64_t>(sums.size()) < B * width) sums.resize(B * width);
    add_listed<T, B>(m, listed, x.values.data(), sums.data(), width, span.begin, span.end);
    for (int64_t n = span.begin; n < std::min(span.end, outputs); ++n) {
        float own[B];
        for (int b = 0; b < B; ++b) own[b] = sums[b * width + n];
        take(n, own);
    }
}

// The vectors `from` [tokens, count] times a basis [count, count], rounded to the model's dtype, into `to` of the same shape: a
// thread's part of the columns. The caller waits for all threads.
template <int B>
void rotate(const Matrix& basis, int32_t dtype, const float* from, int64_t tokens, int64_t count, Factors& x,
            std::vector<int32_t>& listed, std::vector<float>& sums, float* to, int thread, int threads) {
    x.fill<B>(nullptr, from, tokens, count);
    x.list<B>(nullptr, false, listed);
    with_dtype(dtype, [&](auto format) {
        using X = decltype(format);
        column_sums<X, B>(basis, count, x, listed, part_of<X>(count, thread, threads), sums, [=](int64_t n, const float* values) {
            for (int64_t b = 0; b < tokens; ++b) to[b * count + n] = rounded<X>(values[b]);
        });
    });
}

}  // namespace sparsify
