// The functions that read weights, for each format of theirs: each format is a library of its own, compiled when it is needed first.
//
// format.cpp makes the library of format SPARSIFY_NUMBER. It writes the addresses of its functions into a table that kernels.cpp has and
// all libraries share. Functions of other formats are called through it.
#pragma once

#include "step.h"

#include <cstdio>
#include <cstdlib>

namespace sparsify {

// Numbers of formats; mirrors FORMATS in sparsify/runtime/build.py.
template <class T>
constexpr int NUMBER = 0;
template <>
inline constexpr int NUMBER<Bf16> = 1;
template <>
inline constexpr int NUMBER<F16> = 2;
template <>
inline constexpr int NUMBER<Int8Blocks> = 3;
template <>
inline constexpr int NUMBER<Int4Blocks> = 4;
template <>
inline constexpr int NUMBER<PackedBf16> = 5;
template <>
inline constexpr int NUMBER<PackedInt8> = 6;
template <>
inline constexpr int NUMBER<PackedInt4> = 7;
constexpr int FORMATS = 8, BATCHES = 4;

template <class T, int B>
using Dot = void (*)(const typename T::Stored* const*, const typename T::Stored* const*, const Input&, float (*)[MAX_TOKENS]);
template <int B>
using Add = void (*)(const Matrix&, const std::vector<int32_t>&, const float*, float*, int64_t, int64_t, int64_t);
using Phases = void (*)(FfnCall&, const FfnTokens&, FfnScratch&, int, int);
template <size_t N>
using Project = void (*)(const std::array<step::Product, N>&, const float*, int64_t, int64_t, int32_t, step::Shared&, step::Own&, int, int);
using Head = void (*)(const StepCall&, step::Own&);

// The functions of one format for B tokens.
template <class T, int B>
struct Functions {
    Dot<T, B> dot_one, dot_rows;
    Add<B> add;
    Phases phases;
    Project<1> project;
    Project<3> project_three;
    Head head;
};
constexpr size_t FUNCTIONS_BYTES = sizeof(Functions<F32, 1>);

struct Formats {
    alignas(8) unsigned char of[FORMATS][BATCHES][FUNCTIONS_BYTES];
    bool is_loaded[FORMATS];
    // What libraries must have in common: they may be compiled apart, but not for different processors.
    static int64_t layout() { return LANES + 100 * LEVEL_SUMS + 10000 * static_cast<int64_t>(sizeof(FfnCall) + sizeof(StepCall) + sizeof(Input)); }
};
static Formats* formats;  // each library's own pointer to the one table

constexpr int batch_number(int tokens) { return tokens == 1 ? 0 : tokens == 2 ? 1 : tokens == 4 ? 2 : 3; }

template <class T, int B>
Functions<T, B>& functions() {
    return *reinterpret_cast<Functions<T, B>*>(formats->of[NUMBER<T>][batch_number(B)]);
}

// As `functions`, of a library that must have been loaded.
template <class T, int B>
const Functions<T, B>& loaded() {
    if (!formats->is_loaded[NUMBER<T>]) {
        std::fprintf(stderr, "sparsify: the library of weight format %d is not loaded\n", NUMBER<T>);
        std::abort();
    }
    return functions<T, B>();
}

}  // namespace sparsify

// Calls of another library's functions.
#define SPARSIFY_CALLS(T, B)                                                                                                             \
    template <>                                                                                                                          \
    void dot_input<T, 1, B>(const T::Stored* const* rows, const T::Stored* const* next, const Input& x, float (*out)[MAX_TOKENS]) {      \
        loaded<T, B>().dot_one(rows, next, x, out);                                                                                      \
    }                                                                                                                                    \
    template <>                                                                                                                          \
    void dot_input<T, rows_at_once(B), B>(const T::Stored* const* rows, const T::Stored* const* next, const Input& x,                    \
                                          float (*out)[MAX_TOKENS]) {                                                                    \
        loaded<T, B>().dot_rows(rows, next, x, out);                                                                                     \
    }                                                                                                                                    \
    template <>                                                                                                                          \
    void add_listed<T, B>(const Matrix& m, const std::vector<int32_t>& list, const float* factors, float* sums, int64_t width,           \
                          int64_t begin, int64_t end) {                                                                                  \
        loaded<T, B>().add(m, list, factors, sums, width, begin, end);                                                                   \
    }                                                                                                                                    \
    template <>                                                                                                                          \
    void phases<T, B>(FfnCall & call, const FfnTokens& in, FfnScratch& s, int thread, int threads) {                                     \
        loaded<T, B>().phases(call, in, s, thread, threads);                                                                             \
    }                                                                                                                                    \
    template <>                                                                                                                          \
    void step::project<T, B, 1>(const std::array<step::Product, 1>& products, const float* given, int64_t tokens, int64_t inputs,        \
                                int32_t dtype, step::Shared& s, step::Own& own, int thread, int threads) {                               \
        loaded<T, B>().project(products, given, tokens, inputs, dtype, s, own, thread, threads);                                         \
    }                                                                                                                                    \
    template <>                                                                                                                          \
    void step::project<T, B, 3>(const std::array<step::Product, 3>& products, const float* given, int64_t tokens, int64_t inputs,        \
                                int32_t dtype, step::Shared& s, step::Own& own, int thread, int threads) {                               \
        loaded<T, B>().project_three(products, given, tokens, inputs, dtype, s, own, thread, threads);                                   \
    }                                                                                                                                    \
    template <>                                                                                                                          \
    void step::head<T, B>(const StepCall& call, step::Own& own) {                                                                        \
        loaded<T, B>().head(call, own);                                                                                                  \
    }
#define SPARSIFY_FORMAT_CALLS(T) SPARSIFY_CALLS(T, 1) SPARSIFY_CALLS(T, 2) SPARSIFY_CALLS(T, 4) SPARSIFY_CALLS(T, 8)

namespace sparsify {

#if SPARSIFY_NUMBER != 0
SPARSIFY_FORMAT_CALLS(F32)
#endif
#if SPARSIFY_NUMBER != 1
SPARSIFY_FORMAT_CALLS(Bf16)
#endif
#if SPARSIFY_NUMBER != 2
SPARSIFY_FORMAT_CALLS(F16)
#endif
#if SPARSIFY_NUMBER != 3
SPARSIFY_FORMAT_CALLS(Int8Blocks)
#endif
#if SPARSIFY_NUMBER != 4
SPARSIFY_FORMAT_CALLS(Int4Blocks)
#endif
#if SPARSIFY_NUMBER != 5
SPARSIFY_FORMAT_CALLS(PackedBf16)
#endif
#if SPARSIFY_NUMBER != 6
SPARSIFY_FORMAT_CALLS(PackedInt8)
#endif
#if SPARSIFY_NUMBER != 7
SPARSIFY_FORMAT_CALLS(PackedInt4)
#endif

}  // namespace sparsify
