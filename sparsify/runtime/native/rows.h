// Dot products of a few tokens with rows of a weight matrix, and sums of rows, in the format in which the rows are stored.
//
// Every dot product is summed in one fixed order, so that the result is the same bits for any number of threads.
#pragma once

#include "packed.h"
#include "threads.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace sparsify {

enum Dtype : int32_t { FP32 = 0, BF16 = 1, FP16 = 2 };
// STORED: of the dtype of the hidden states. Packed: of sparse weights.
enum WeightFormat : int32_t { STORED = 0, INT8 = 1, INT4 = 2, PACKED_BF16 = 3, PACKED_INT8 = 4, PACKED_INT4 = 5 };

constexpr int MAX_TOKENS = 8;
constexpr int ROWS = 4;             // rows of one pass: so many concurrent streams saturate the memory bandwidth
constexpr int rows_at_once(int tokens) { return tokens <= 4 ? ROWS : 2; }
constexpr int64_t BLOCK_BYTES = 131072;  // rows that a thread takes at once, at least; their first ones are not prefetched
constexpr int64_t MIN_BLOCK_ROWS = 64, BLOCKS_PER_THREAD = 8;

// Calls f with the format of hidden states and predictors.
template <class F>
void with_dtype(int32_t dtype, const F& f) {
    if (dtype == FP32) f(F32());
    else if (dtype == BF16) f(Bf16());
    else f(F16());
}

template <class T>
const typename T::Stored* row(const Matrix& m, int64_t n) {
    if constexpr (IsPacked<T>::value) return T::row(m.data, m.place(n));
    return static_cast<const typename T::Stored*>(m.data) + m.place(n) * m.row_stride;
}

template <class T>
int64_t bytes_of(const Matrix& m) {  // of a row; in the mean, of packed ones
    return m.row_stride * static_cast<int64_t>(sizeof(typename T::Stored));
}

// B tokens as the rows of a format read them: fp32 values [B, width], and for blocks also whole numbers (see Levels).
struct Input {
    std::vector<float> values;
    Levels levels;
    int64_t width = 0;

    // Room for B tokens of `count` elements, padded with zeros. The caller writes values, then calls finish.
    template <class T, int B>
    float* prepare(int64_t count) {
        width = T::width(count);
        values.assign(B * width, 0.0f);
        return values.data();
    }
    template <class T, int B>
    void finish() {
        if constexpr (T::BITS != 0) levels.round(values.data(), B, width, T::BITS);
#if defined(SPARSIFY_EXPAND)
        if constexpr (std::is_same_v<T, PackedBf16>) prepare_places(values.data(), B * width);
#endif
    }
};

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
                Lanes token = load_f32(x + b * width + i + k * LANES);
                if constexpr (R > 1) keep(token);
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

// The same for an Input: blocks are multiplied as whole numbers where the processor has an instruction for it.
template <class T, int R, int B>
SPARSIFY_OUT_OF_LINE void dot_input(const typename T::Stored* const* rows, const typename T::Stored* const* next, const Input& x,
               float (*out)[MAX_TOKENS]) {
    if constexpr (IsPacked<T>::value) {
        using D = typename T::Dense;
#if defined(SPARSIFY_EXPAND)
        if constexpr (std::is_same_v<T, PackedBf16>) return dot_expanded<R, B>(rows, next, x.values.data(), x.width, out);
#endif
        const int64_t elements = dense_elements<D>(x.width);
        typename D::Stored* room = unpacked_rows<D>(R * elements);
        const typename D::Stored* unpacked[R];
        for (int r = 0; r < R; ++r) {
            T::unpack(rows[r], next[r], x.width, 0, x.width, room + r * elements);
            unpacked[r] = room + r * elements;
        }
        return dot_input<D, R, B>(unpacked, unpacked, x, out);
    } else {
#if defined(SPARSIFY_LEVELS)
    if constexpr (T::BITS != 0) return dot_levels<T::BITS, R, B>(rows, next, x.levels, x.width, out);
#endif
    dot<T, R, B>(rows, next, x.values.data(), x.width, out);
    }
}

// Dot products of `count` listed rows (or of rows first, first + 1, ... without a list); calls take(n, values over tokens).
template <class T, int R, int B, class Take>
void dot_rows(const Matrix& m, const int32_t* list, int64_t first, int64_t count, const Input& x, const Take& take) {
    float out[R][MAX_TOKENS];
    const typename T::Stored *rows[R], *next[R];
    const auto nth = [&](int64_t i) { return list ? static_cast<int64_t>(list[i]) : first + i; };
    const int64_t ahead = std::max<int64_t>(1, AHEAD_BYTES / (R * bytes_of<T>(m))) * R;
    int64_t i = 0;
    for (; i + R <= count; i += R) {
        for (int r = 0; r < R; ++r) {
            rows[r] = row<T>(m, nth(i + r));
            next[r] = row<T>(m, nth(std::min(i + ahead + r, count - 1)));
        }
        dot_input<T, R, B>(rows, next, x, out);
        for (int r = 0; r < R; ++r) take(nth(i + r), out[r]);
    }
    for (; i < count; ++i) {
        rows[0] = row<T>(m, nth(i));
        dot_input<T, 1, B>(rows, rows, x, out);
        take(nth(i), out[0]);
    }
}

// All of `count` rows, distributed over the threads of the enclosing parallel region, without waiting for the other threads.
template <class T, int B, class Take>
void all_dots(const Matrix& m, const int32_t* list, int64_t count, const Input& x, const Take& take) {
    constexpr int R = rows_at_once(B);
    const int64_t even = count / (num_threads() * BLOCKS_PER_THREAD);
    const int64_t at_once = std::max({MIN_BLOCK_ROWS, even, BLOCK_BYTES / bytes_of<T>(m)});
    const int64_t blocks = (count + at_once - 1) / at_once;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = block * at_once, size = std::min(at_once, count - begin);
        dot_rows<T, R, B>(m, list ? list + begin : nullptr, begin, size, x, take);
    }
}

// sums[b][columns] += factors[row][b] * m[row][columns], over R listed rows in their order, for one thread's columns. Prefetches the
// rows `ahead` of them.
template <class T, int R, int B>
void add_rows(const Matrix& m, const int32_t* list, int64_t left, int64_t ahead, const float* factors, float* sums, int64_t width,
              int64_t begin, int64_t end) {
    constexpr int STEP = T::VECTORS * LANES;
    const typename T::Stored *rows[R], *next[R];
    float own[R][B];
    for (int r = 0; r < R; ++r) {
        next[r] = row<T>(m, list[std::min<int64_t>(ahead + r, left - 1)]);
        rows[r] = row<T>(m, list[r]);
        for (int b = 0; b < B; ++b) own[r][b] = factors[static_cast<int64_t>(list[r]) * B + b];
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
                for (int r = 0; r < R; ++r) total = multiply_add(weights[k][r], broadcast(own[r][b]), total);
                store(place, total);
            }
    }
    for (; i < end; ++i)
        for (int b = 0; b < B; ++b)
            for (int r = 0; r < R; ++r)
                sums[b * width + i] = std::fma(T::at(rows[r], i), own[r][b], sums[b * width + i]);
}

// As `add_listed`, for packed rows, so many at a time as are added together.
template <class T, int B>
void add_packed(const Matrix& m, const std::vector<int32_t>& list, const float* factors, float* sums, int64_t width, int64_t begin,
                int64_t end) {
    using D = typename T::Dense;
    static constexpr int32_t ORDER[ROWS] = {0, 1, 2, 3};
    const int64_t elements = dense_elements<D>(width), count = static_cast<int64_t>(list.size());
    typename D::Stored* room = unpacked_rows<D>(ROWS * elements);
    const Matrix unpacked{room, elements};
    for (int b = 0; b < B; ++b) std::fill(sums + b * width + begin, sums + b * width + end, 0.0f);
#if defined(SPARSIFY_EXPAND)
    if constexpr (std::is_same_v<T, PackedBf16>) {
        constexpr int AT_ONCE = B <= 2 ? 2 * ROWS : ROWS;
        const uint8_t *rows[AT_ONCE], *next[AT_ONCE];
        float own[AT_ONCE][B];
        for (int64_t i = 0; i < count; i += AT_ONCE) {
            const int64_t some = std::min<int64_t>(AT_ONCE, count - i);
            for (int64_t r = 0; r < some; ++r) {
                rows[r] = row<T>(m, list[i + r]);
                next[r] = row<T>(m, list[std::min(i + AT_ONCE + r, count - 1)]);
                std::copy_n(factors + static_cast<int64_t>(list[i + r]) * B, B, own[r]);
            }
            if (some == AT_ONCE) add_expanded<AT_ONCE, B>(rows, next, own, sums, width, begin, end);
            else for (int64_t r = 0; r < some; ++r) add_expanded<1, B>(rows + r, next + r, own + r, sums, width, begin, end);
        }
        for (int b = 0; b < B; ++b) unsort_places(sums + b * width + begin, end - begin);
        return;
    }
#endif
    float own[ROWS * B];
    for (int64_t i = 0; i < count; i += ROWS) {
        const int64_t some = std::min<int64_t>(ROWS, count - i);
        for (int64_t r = 0; r < some; ++r) {
            const auto* next = row<T>(m, list[std::min(i + ROWS + r, count - 1)]);
            T::unpack(row<T>(m, list[i + r]), next, width, begin, end, room + r * elements);
            std::copy_n(factors + static_cast<int64_t>(list[i + r]) * B, B, own + r * B);
        }
        if (some == ROWS) add_rows<D, ROWS, B>(unpacked, ORDER, ROWS, ROWS, own, sums, width, begin, end);
        else for (int64_t r = 0; r < some; ++r) add_rows<D, 1, B>(unpacked, ORDER + r, some - r, 1, own, sums, width, begin, end);
    }
}

template <int B>
void multiply_columns(const Matrix& m, float* sums, int64_t width, int64_t begin, int64_t end) {
    if (!m.factors) return;
    for (int b = 0; b < B; ++b)
        for (int64_t i = begin; i < end; ++i) sums[b * width + i] *= m.factors[i];
}

// sums[b][columns] = the sum of factors[row][b] * m[row][columns] over all listed rows in their order, for one thread's columns; then
// times the columns' own factors.
template <class T, int B>
SPARSIFY_OUT_OF_LINE void add_listed(const Matrix& m, const std::vector<int32_t>& list, const float* factors, float* sums, int64_t width, int64_t begin,
                int64_t end) {
    if constexpr (IsPacked<T>::value) {
        add_packed<T, B>(m, list, factors, sums, width, begin, end);
        multiply_columns<B>(m, sums, width, begin, end);
    } else {
#if defined(SPARSIFY_WORDS)
    if constexpr (T::BITS != 0) {
        for (int64_t i = begin; i < end; i += SUMMED_BLOCKS * BLOCK)
            sum_blocks<T::BITS, B>(m, list, factors, sums, width, i, std::min(SUMMED_BLOCKS, (end - i) / BLOCK));
        return multiply_columns<B>(m, sums, width, begin, end);
    }
#endif
    for (int b = 0; b < B; ++b) std::fill(sums + b * width + begin, sums + b * width + end, 0.0f);
    const int64_t count = static_cast<int64_t>(list.size()), span = T::value_bytes(end - begin);
    const int64_t ahead = std::max<int64_t>(1, AHEAD_BYTES / (ROWS * span)) * ROWS;
    for (int64_t i = ROWS; i < std::min(ahead, count); ++i)
        prefetch(reinterpret_cast<const char*>(row<T>(m, list[i])) + T::value_bytes(begin), span);
    int64_t i = 0;
    for (; i + ROWS <= count; i += ROWS) add_rows<T, ROWS, B>(m, list.data() + i, count - i, ahead, factors, sums, width, begin, end);
    for (; i < count; ++i) add_rows<T, 1, B>(m, list.data() + i, count - i, ahead, factors, sums, width, begin, end);
    multiply_columns<B>(m, sums, width, begin, end);
    }
}

}  // namespace sparsify
