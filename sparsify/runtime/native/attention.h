// Attention of one new token of each sequence over a cache of keys and values, grouped queries included.
//
// The positions are split into chunks of CHUNK, each with its own maximum and sum, which `combine` joins in order: the result is
// the same bits for any number of threads, and a few long sequences keep all threads busy.
#pragma once

#include "rows.h"

#include <limits>
#include <type_traits>

namespace sparsify {

constexpr int64_t CHUNK = 256;

// Mirrors sparsify/runtime/native_step.py.
struct Attention {
    int64_t tokens, heads, kv_heads, head_dim;
    int64_t cached;                       // positions in the cache before this token, which becomes the next one
    int64_t batch_stride, head_stride;    // of the cache, in elements; a position is head_dim elements
    const float *cos, *sin;               // [tokens, head_dim]
    const uint8_t* visible;               // [tokens, cached + 1]: 0 hides a position; null if all are visible
    float scaling;
    int32_t dtype;                        // of the cache

    int64_t group() const { return heads / kv_heads; }
    int64_t chunks() const { return (cached + CHUNK) / CHUNK; }
};

struct AttentionScratch {
    std::vector<float> q, k, v;                // [tokens, heads or kv_heads, head_dim], before the rotation
    std::vector<float> sums, maxima, weights;  // of each [tokens, heads, chunks]: [head_dim], and two numbers

    void reserve(const Attention& a) {
        q.resize(a.tokens * a.heads * a.head_dim);
        k.resize(a.tokens * a.kv_heads * a.head_dim);
        v.resize(k.size());
        const int64_t parts = a.tokens * a.heads * a.chunks();
        sums.resize(parts * a.head_dim);
        maxima.resize(parts);
        weights.resize(parts);
    }
};

// e^x for x <= 0 to within two units of the last place; a loop over it becomes vector instructions. NaN stays NaN.
inline float exp_negative(float x) {
    const float bounded = x < -87.0f ? -87.0f : x;
    const float shifted = bounded * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded exponent
    const float whole = shifted - 12582912.0f;
    const float rest = (bounded - whole * 0.693359375f) - whole * -2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const float power = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
    return x < -87.0f ? 0.0f : sum * power;
}

// The rotation of one head (arXiv 2104.09864, in the layout of transformers: element i is paired with i + half).
inline void rotate(const float* from, const float* cos, const float* sin, int64_t head_dim, float* to) {
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        to[i] = from[i] * cos[i] - from[i + half] * sin[i];
        to[i + half] = from[i + half] * cos[i + half] + from[i] * sin[i + half];
    }
}

// sums[b] += factors[r][b] * rows[r] over R rows of `width` elements.
template <class T, int R, int B>
void add_values(const typename T::Stored* const* rows, const float (*factors)[B], float* sums, int64_t width) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        Lanes values[R];
        for (int r = 0; r < R; ++r) values[r] = T::lanes(rows[r], i, 0, width);
        for (int b = 0; b < B; ++b) {
            Lanes total = load_f32(sums + b * width + i);
            for (int r = 0; r < R; ++r) total = multiply_add(values[r], broadcast(factors[r][b]), total);
            store(sums + b * width + i, total);
        }
    }
    for (; i < width; ++i)
        for (int b = 0; b < B; ++b)
            for (int r = 0; r < R; ++r) sums[b * width + i] += factors[r][b] * T::at(rows[r], i);
}

// B query heads (of which `used` count) that share keys and values, over the positions from begin to end.
template <class T, int B>
void attend(const Attention& a, const float* queries, int used, const typename T::Stored* keys, const typename T::Stored* values,
            const uint8_t* visible, int64_t begin, int64_t end, float* sums, int64_t sums_stride, float* maxima, float* weights,
            int64_t stride) {
    static thread_local std::vector<float> scores, total;
    const int64_t count = end - begin, width = a.head_dim;
    scores.assign(B * CHUNK, 0.0f);
    total.assign(B * width, 0.0f);
    for (int64_t t = 0; t < count; t += ROWS) {
        float out[ROWS][MAX_TOKENS];
        const typename T::Stored* rows[ROWS];
        for (int r = 0; r < ROWS; ++r) rows[r] = keys + std::min(begin + t + r, end - 1) * width;
        dot<T, ROWS, B>(rows, rows, queries, width, out);
        for (int64_t r = 0; r < std::min<int64_t>(ROWS, count - t); ++r)
            for (int b = 0; b < B; ++b)
                scores[b * CHUNK + t + r] = visible && !visible[begin + t + r] ? -std::numeric_limits<float>::infinity() : out[r][b] * a.scaling;
    }
    for (int b = 0; b < used; ++b) {
        float* own = scores.data() + b * CHUNK;
        float largest = -std::numeric_limits<float>::infinity();
        for (int64_t t = 0; t < count; ++t) largest = std::max(largest, own[t]);  // passes over NaN
        const float base = largest == -std::numeric_limits<float>::infinity() ? 0.0f : largest;
        for (int64_t t = 0; t < count; ++t) own[t] = exp_negative(own[t] - base);
        float sum = 0.0f;
        for (int64_t t = 0; t < count; ++t) sum += own[t];
        maxima[b * stride] = largest;
        weights[b * stride] = sum;
    }
    for (int64_t t = 0; t < count; t += ROWS) {
        float factors[ROWS][B];
        const typename T::Stored* rows[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            rows[r] = values + std::min(begin + t + r, end - 1) * width;
            for (int b = 0; b < B; ++b) factors[r][b] = t + r < count ? scores[b * CHUNK + t + r] : 0.0f;
        }
        add_values<T, ROWS, B>(rows, factors, total.data(), width);
    }
    for (int b = 0; b < used; ++b) std::copy_n(total.data() + b * width, width, sums + b * sums_stride);
}

// Writes the rotated key and the value of token b and head h to the cache, as its last position.
template <class T>
void append(const Attention& a, const AttentionScratch& s, int64_t b, int64_t h, typename T::Stored* keys, typename T::Stored* values) {
    static thread_local std::vector<float> rotated;
    rotated.resize(a.head_dim);
    const int64_t from = (b * a.kv_heads + h) * a.head_dim;
    rotate(s.k.data() + from, a.cos + b * a.head_dim, a.sin + b * a.head_dim, a.head_dim, rotated.data());
    for (int64_t i = 0; i < a.head_dim; ++i) {
        keys[a.cached * a.head_dim + i] = T::from(rotated[i]);
        values[a.cached * a.head_dim + i] = T::from(s.v[from + i]);
    }
}

template <class T>
void attention(const Attention& a, AttentionScratch& s, void* keys, void* values) {
    static thread_local std::vector<float> queries;
    const int64_t chunks = a.chunks(), tasks = a.tokens * a.kv_heads * chunks, group = a.group(), width = a.head_dim;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t chunk = chunks - 1 - task % chunks, h = task / chunks % a.kv_heads, b = task / chunks / a.kv_heads;
        const int64_t begin = chunk * CHUNK, end = std::min(a.cached + 1, begin + CHUNK);
        auto* own_keys = static_cast<typename T::Stored*>(keys) + b * a.batch_stride + h * a.head_stride;
        auto* own_values = static_cast<typename T::Stored*>(values) + b * a.batch_stride + h * a.head_stride;
        if (end == a.cached + 1) append<T>(a, s, b, h, own_keys, own_values);
        const uint8_t* visible = a.visible ? a.visible + b * (a.cached + 1) : nullptr;
        for (int64_t first = 0; first < group; first += 4) {
            const int used = static_cast<int>(std::min<int64_t>(4, group - first));
            queries.assign(4 * width, 0.0f);
            const int64_t head = b * a.heads + h * group + first;
            for (int g = 0; g < used; ++g)
                rotate(s.q.data() + (head + g) * width, a.cos + b * width, a.sin + b * width, width, queries.data() + g * width);
            const int64_t part = head * chunks + chunk;
            const auto go = [&](auto size) {
                attend<T, decltype(size)::value>(a, queries.data(), used, own_keys, own_values, visible, begin, end,
                                                 s.sums.data() + part * width, chunks * width, s.maxima.data() + part,
                                                 s.weights.data() + part, chunks);
            };
            if (used == 1) go(std::integral_constant<int, 1>());
            else if (used == 2) go(std::integral_constant<int, 2>());
            else go(std::integral_constant<int, 4>());
        }
    }
}

// Joins the chunks of all heads into [tokens, heads * head_dim]. Every thread that needs the output calls it.
inline void combine(const Attention& a, const AttentionScratch& s, float* out, int64_t stride) {
    const int64_t chunks = a.chunks(), width = a.head_dim;
    for (int64_t part = 0; part < a.tokens * a.heads; ++part) {
        const float *maxima = s.maxima.data() + part * chunks, *weights = s.weights.data() + part * chunks;
        const float largest = *std::max_element(maxima, maxima + chunks);
        float total = 0.0f;
        float* to = out + part / a.heads * stride + part % a.heads * width;
        std::fill(to, to + width, 0.0f);
        for (int64_t c = 0; c < chunks; ++c) {
            const float share = weights[c] == 0.0f ? 0.0f : std::exp(maxima[c] - largest);  // 0 where all is hidden
            total += share * weights[c];
            const float* sums = s.sums.data() + (part * chunks + c) * width;
            for (int64_t i = 0; i < width; ++i) to[i] += share * sums[i];
        }
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        for (int64_t i = 0; i < width; ++i) to[i] *= inverse;
    }
}

}  // namespace sparsify
