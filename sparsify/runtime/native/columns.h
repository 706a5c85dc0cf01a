// Products with inputs of which many are zero: W x is the sum of x_i times column i of W, over the inputs i that are not zero.
//
// A projection whose input is masked is held transposed, [inputs, outputs], so that a column of W is one contiguous row. Every
// thread adds its own part of the outputs of all listed rows, as long as it can be: memory is read fastest in long runs. A sum
// adds its terms in ascending order of inputs, so that the result is the same bits for any number of threads.
#pragma once

#include "rows.h"

#include <functional>
#include <limits>

namespace sparsify {

enum MaskRule : int32_t { THRESHOLD = 0, TOP_K = 1, TOP_P = 2 };

// Mirrors sparsify/runtime/native_ffn.py.
struct InputMask {
    const float* thresholds;  // THRESHOLD: [inputs]: an element is kept where it is larger in size
    const float* weights;     // TOP_K, TOP_P: [inputs], of the sizes of elements; null for 1
    int64_t kept;             // TOP_K: number of elements to keep
    float mass;               // TOP_P: share of the sum of all scores that those to keep have together
    int32_t rule;
};

// Scratch for choosing elements by their scores.
struct Scores {
    std::vector<float> of, ordered;
    std::vector<int32_t> places;
};

// Sets to zero what is not among the `mask.kept` largest scores; of equal scores the first are kept, and what is not a number always.
inline void keep_largest(const InputMask& mask, int64_t count, float* values, Scores& s) {
    if (mask.kept >= count) return;
    s.ordered.resize(count);
    for (int64_t i = 0; i < count; ++i) s.ordered[i] = s.of[i] == s.of[i] ? s.of[i] : std::numeric_limits<float>::infinity();
    std::nth_element(s.ordered.begin(), s.ordered.begin() + mask.kept - 1, s.ordered.end(), std::greater<float>());
    const float edge = s.ordered[mask.kept - 1];
    int64_t equal = mask.kept;  // how many of those that equal the smallest kept score are kept
    for (int64_t i = 0; i < count; ++i) equal -= s.of[i] <= edge ? 0 : 1;
    for (int64_t i = 0; i < count; ++i) {
        const bool drops = s.of[i] < edge || (s.of[i] == edge && equal-- <= 0);
        values[i] = drops ? 0.0f : values[i];
    }
}

// Sets to zero what is not among the fewest, largest scores first, that add up to `mask.mass` of the sum of all.
inline void keep_heaviest(const InputMask& mask, int64_t count, float* values, Scores& s) {
    if (mask.mass >= 1.0f) return;
    s.places.resize(count);
    double total = 0.0, before = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        s.places[i] = static_cast<int32_t>(i);
        total += s.of[i];
    }
    if (total != total) {  // a score that is not a number: it alone is kept
        for (int64_t i = 0; i < count; ++i) values[i] = s.of[i] == s.of[i] ? 0.0f : values[i];
        return;
    }
    std::sort(s.places.begin(), s.places.end(),
              [&](int32_t a, int32_t b) { return s.of[a] > s.of[b] || (s.of[a] == s.of[b] && a < b); });
    for (int32_t i : s.places) {
        if (!(before < mask.mass * total)) values[i] = 0.0f;
        before += s.of[i];
    }
}

// to[b][i] = from[b][i] where the mask keeps it, otherwise 0, for `tokens` vectors; without a mask a copy. NaN is kept.
inline void apply_mask(const InputMask* mask, const float* from, int64_t tokens, int64_t count, float* to, int64_t stride) {
    for (int64_t b = 0; b < tokens; ++b) {
        const float* x = from + b * count;
        float* y = to + b * stride;
        if (!mask) {
            std::copy(x, x + count, y);
        } else if (mask->rule == THRESHOLD) {
            for (int64_t i = 0; i < count; ++i) y[i] = std::fabs(x[i]) <= mask->thresholds[i] ? 0.0f : x[i];
        } else {
            static thread_local Scores scores;
            scores.of.resize(count);
            for (int64_t i = 0; i < count; ++i) scores.of[i] = std::fabs(x[i]) * (mask->weights ? mask->weights[i] : 1.0f);
            std::copy(x, x + count, y);
            if (mask->rule == TOP_K) keep_largest(*mask, count, y, scores);
            else keep_heaviest(*mask, count, y, scores);
        }
    }
}

// The vectors `from` [tokens, count] as the rows of a projection read them.
template <class T, int B>
void fill_rows(const InputMask* mask, const float* from, int64_t tokens, int64_t count, Input& to) {
    float* values = to.prepare<T, B>(count);
    apply_mask(mask, from, tokens, count, values, to.width);
    to.finish<T, B>();
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
    void fill(const InputMask* mask, const float* from, int64_t tokens, int64_t inputs) {
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

}  // namespace sparsify
