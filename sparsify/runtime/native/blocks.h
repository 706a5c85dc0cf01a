// Rows of weights in blocks of 32: int8 or int4 values with one scale a block, dequantised as they are read.
//
// A row is the values of all its blocks, then their scales in bf16; the last block is padded with zeros. Value times scale
// has at most 15 significant bits, so a dequantised weight is exact in fp32. Mirrors sparsify/models/quantised.py.
#pragma once

#include "level_dots.h"

namespace sparsify {

constexpr int64_t BLOCK = 32;

// Broadcasts the bf16 at p. The two bytes before p belong to the row, too, so a load of four bytes at p - 2 puts the bf16 into the
// upper half of an fp32 (little-endian); the mask clears the lower half.
#if defined(__AVX512F__)

inline Lanes broadcast_bf16(const uint8_t* p) {
    int32_t two;
    std::memcpy(&two, p - 2, sizeof two);
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_set1_epi32(two), _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))))};
}
inline Lanes load_int8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// Sixteen of the block's 32, times scale: half 0 is in the low four bits, half 1 in the high ones.
inline Lanes load_int4(const uint8_t* p, int half, Lanes scale) {
    const __m512 levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    // The permutation is the lookup table of the 16 levels; it uses only the low four bits of each index.
    return {_mm512_permutexvar_ps(half ? _mm512_srli_epi32(pairs, 4) : pairs, _mm512_mul_ps(levels, scale.v))};
}

#elif !defined(SPARSIFY_PLAIN_LANES)

inline Lanes broadcast_bf16(const uint8_t* p) {
    int32_t two;
    std::memcpy(&two, p - 2, sizeof two);
    const __m256 all = _mm256_castsi256_ps(_mm256_and_si256(_mm256_set1_epi32(two), _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
    return {all, all};
}
inline Lanes widen_int8(__m128i sixteen) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(sixteen)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(sixteen, 8)))};
}
inline Lanes load_int8(const uint8_t* p) { return widen_int8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Lanes load_int4(const uint8_t* p, int half, Lanes scale) {
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i bits = _mm_and_si128(half ? _mm_srli_epi16(pairs, 4) : pairs, _mm_set1_epi8(15));
    return multiply(widen_int8(_mm_sub_epi8(bits, _mm_set1_epi8(8))), scale);
}

#else

inline Lanes broadcast_bf16(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return broadcast(bf16_to_float(bits));
}
inline Lanes load_int8(const uint8_t* p) {
    return each([=](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
}
inline Lanes load_int4(const uint8_t* p, int half, Lanes scale) {
    return each([&](int i) { return static_cast<float>((half ? p[i] >> 4 : p[i] & 15) - 8) * scale.v[i]; });
}

#endif

// The interface is that of F32 in lanes.h.
template <int NUM_BITS>
struct Blocks {
    using Stored = uint8_t;
    static constexpr int BITS = NUM_BITS;
    static constexpr int VECTORS = 2;
    static int64_t width(int64_t hidden) { return (hidden + BLOCK - 1) / BLOCK * BLOCK; }
    static int64_t value_bytes(int64_t count) { return count * BITS >> 3; }
    static const Stored* value(const Stored* row, int64_t i) { return row + value_bytes(i); }
    static const Stored* scale(const Stored* row, int64_t i, int64_t width) { return value(row, width) + (i >> 5 << 1); }
    static Lanes lanes(const Stored* row, int64_t i, int k, int64_t width) {
        const Lanes factor = broadcast_bf16(scale(row, i, width));
        if (BITS == 8) return multiply(load_int8(value(row, i) + k * LANES), factor);
        return load_int4(value(row, i), k, factor);
    }
    // One prefetch per 64 bytes.
    static void ask(const Stored* row, int64_t i, int64_t, int64_t width) {
        if ((i & (512 / BITS - 1)) == 0) prefetch(value(row, i), 64);
        if ((i & 1023) == 0) prefetch(scale(row, i, width), 64);
    }
    static float at(const Stored*, int64_t) { return 0.0f; }  // no row ends within a block
};
using Int8Blocks = Blocks<8>;
using Int4Blocks = Blocks<4>;

}  // namespace sparsify
