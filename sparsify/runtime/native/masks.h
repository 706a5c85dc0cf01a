// Masks: which elements of a vector are set to zero. Mirrors sparsify/models/masking.py.
#pragma once

#include "lanes.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace sparsify {

enum MaskRule : int32_t { THRESHOLD = 0, TOP_K = 1, TOP_P = 2 };

// The mask of a site of `count` elements. Mirrors CMask in sparsify/runtime/native_ffn.py.
struct SiteMask {
    const float* thresholds;  // THRESHOLD: [count]: an element is kept where it is larger in size
    const float* weights;     // TOP_K, TOP_P: [count], of the sizes of elements; null for 1
    Matrix basis;             // [count, count], of the model's dtype: multiplied with the vector first; null for none
    int64_t kept;             // TOP_K: number of elements to keep
    float mass;               // TOP_P: share of the sum of all scores that those to keep have together
    int32_t rule;
};

// Whether an element's fate depends on the others.
inline bool compares(const SiteMask* mask) { return mask && mask->rule != THRESHOLD; }

// Scratch for choosing elements by their scores.
struct Scores {
    std::vector<float> of, ordered;
    std::vector<int32_t> places;
};

// Sets to zero what is not among the `mask.kept` largest scores; of equal scores the first are kept, and what is not a number always.
inline void keep_largest(const SiteMask& mask, int64_t count, float* values, Scores& s) {
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
inline void keep_heaviest(const SiteMask& mask, int64_t count, float* values, Scores& s) {
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
    const double wanted = mask.mass * total;
    const auto larger = [&](int32_t a, int32_t b) { return s.of[a] > s.of[b] || (s.of[a] == s.of[b] && a < b); };
    // Halves the range in which the last score to keep lies; `before` is the sum of those larger than all of the range.
    auto first = s.places.begin(), last = s.places.end();
    while (last - first > 1) {
        const auto middle = first + (last - first) / 2;
        std::nth_element(first, middle, last, larger);
        double upper = before;
        for (auto i = first; i < middle; ++i) upper += s.of[*i];
        if (upper < wanted) before = upper;
        (upper < wanted ? first : last) = middle;
    }
    for (auto i = before < wanted ? last : first; i < s.places.end(); ++i) values[*i] = 0.0f;
}

// Sets to zero, in place, what the mask does not keep of a vector of `count` elements. NaN is kept.
inline void mask_vector(const SiteMask& mask, int64_t count, float* values) {
    if (mask.rule == THRESHOLD) {
        for (int64_t i = 0; i < count; ++i) values[i] = std::fabs(values[i]) <= mask.thresholds[i] ? 0.0f : values[i];
        return;
    }
    static thread_local Scores scores;
    scores.of.resize(count);
    for (int64_t i = 0; i < count; ++i) scores.of[i] = std::fabs(values[i]) * (mask.weights ? mask.weights[i] : 1.0f);
    if (mask.rule == TOP_K) keep_largest(mask, count, values, scores);
    else keep_heaviest(mask, count, values, scores);
}

// to[b] = from[b] masked, for `tokens` vectors; without a mask a copy.
inline void apply_mask(const SiteMask* mask, const float* from, int64_t tokens, int64_t count, float* to, int64_t stride) {
    for (int64_t b = 0; b < tokens; ++b) {
        std::copy(from + b * count, from + (b + 1) * count, to + b * stride);
        if (mask) mask_vector(*mask, count, to + b * stride);
    }
}

}  // namespace sparsify
