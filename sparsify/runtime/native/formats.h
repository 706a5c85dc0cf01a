// The functions that read weights, for each format of theirs: format.cpp compiles those of one format, so that a compiler can
// work on all formats at once. Every other file declares them.
#pragma once

#include "step.h"

#define SPARSIFY_FUNCTIONS(PREFIX, T, B)                                                                                             \
    PREFIX template void dot_input<T, 1, B>(const T::Stored* const*, const T::Stored* const*, const Input&, float (*)[MAX_TOKENS]);  \
    PREFIX template void dot_input<T, rows_at_once(B), B>(const T::Stored* const*, const T::Stored* const*, const Input&,            \
                                                          float (*)[MAX_TOKENS]);                                                    \
    PREFIX template void add_listed<T, B>(const Matrix&, const std::vector<int32_t>&, const float*, float*, int64_t, int64_t, int64_t); \
    PREFIX template void phases<T, B>(FfnCall&, const FfnTokens&, FfnScratch&, int, int);                                            \
    PREFIX template void step::project<T, B, 1>(const std::array<step::Product, 1>&, const float*, int64_t, int64_t, int32_t,        \
                                                step::Shared&, step::Own&, int, int);                                                \
    PREFIX template void step::project<T, B, 3>(const std::array<step::Product, 3>&, const float*, int64_t, int64_t, int32_t,        \
                                                step::Shared&, step::Own&, int, int);                                                \
    PREFIX template void step::head<T, B>(const StepCall&, step::Own&);
#define SPARSIFY_FORMAT_FUNCTIONS(PREFIX, T) \
    SPARSIFY_FUNCTIONS(PREFIX, T, 1) SPARSIFY_FUNCTIONS(PREFIX, T, 2) SPARSIFY_FUNCTIONS(PREFIX, T, 4) SPARSIFY_FUNCTIONS(PREFIX, T, 8)

namespace sparsify {

SPARSIFY_FORMAT_FUNCTIONS(extern, F32)
SPARSIFY_FORMAT_FUNCTIONS(extern, Bf16)
SPARSIFY_FORMAT_FUNCTIONS(extern, F16)
SPARSIFY_FORMAT_FUNCTIONS(extern, Int8Blocks)
SPARSIFY_FORMAT_FUNCTIONS(extern, Int4Blocks)
SPARSIFY_FORMAT_FUNCTIONS(extern, PackedBf16)
SPARSIFY_FORMAT_FUNCTIONS(extern, PackedInt8)
SPARSIFY_FORMAT_FUNCTIONS(extern, PackedInt4)

}  // namespace sparsify
