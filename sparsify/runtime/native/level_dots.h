// Dot products of rounded hidden states (levels.h) with rows of weights in blocks, as whole numbers: exact within a block, whose sum
// is then multiplied by the scales of both.
//
// SPARSIFY_LEVELS is defined where the processor has the instructions: 64 products at once with AVX-512 VNNI, 32 with AVX2.
#pragma once

#include "levels.h"

namespace sparsify {

#if SPARSIFY_LEVELS == 512

constexpr int64_t SCALED_GROUPS = 8;  // groups whose scales one load takes

// For each vector of sums of so many groups, which of the loaded scales goes to the upper half of each lane.
template <int BITS>
struct ScalePlaces {
    static constexpr int VECTORS = BITS / 4;  // of sums, in a group
    alignas(64) uint16_t places[SCALED_GROUPS * VECTORS][32];
    constexpr ScalePlaces() : places() {
        for (int vector = 0; vector < SCALED_GROUPS * VECTORS; ++vector)
            for (int lane = 0; lane < 16; ++lane)
                places[vector][2 * lane + 1] = static_cast<uint16_t>(BITS == 8 ? 2 * vector + (lane >> 3) : 4 * vector + (lane >> 2));
    }
};

// Up to 64 bytes of a row; the rest is zero.
inline __m512i load_bytes(const uint8_t* from, int64_t count) {
    return count >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((1ull << count) - 1, from);
}

// Adds the products of a group, of which a row has so many blocks.
template <int BITS, int R, int B>
inline void add_group(const uint8_t* const* rows, const __m512i* scales, const uint16_t (*places)[32], const Levels& x, int64_t group,
                      int64_t blocks, __m512 (&total)[R][B]) {
    constexpr int BLOCK_BYTES = BITS * 4, IN_VECTOR = 64 / BLOCK_BYTES;
#pragma GCC unroll 2
    for (int v = 0; v < ScalePlaces<BITS>::VECTORS && v * IN_VECTOR < blocks; ++v) {
        const __m512i place = _mm512_load_si512(places[v]);
        __m512i weights[R], second[R];  // without sign: 8 or 128 was added
        __m512 factors[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint8_t* from = rows[r] + group * GROUP_BLOCKS * BLOCK_BYTES + v * 64;
            const __m512i bytes = load_bytes(from, (blocks - v * IN_VECTOR) * BLOCK_BYTES);
            if constexpr (BITS == 8) {
                weights[r] = _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
            } else {
                weights[r] = _mm512_and_si512(bytes, _mm512_set1_epi8(15));
                second[r] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
            }
            factors[r] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, place, scales[r]));
        }
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) {
            const LevelGroup& own = *x.of(group, b);
            const __m512i states = _mm512_load_si512(own.bytes + v * 64), start = _mm512_load_si512(own.starts + v * 16);
            const __m512 scale = _mm512_load_ps(own.scales + v * 16);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                __m512i products = _mm512_dpbusd_epi32(start, weights[r], states);
                if constexpr (BITS == 4) products = _mm512_dpbusd_epi32(products, second[r], _mm512_load_si512(own.bytes + 64));
                total[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_mul_ps(factors[r], scale), total[r][b]);
            }
        }
    }
}

// As `dot` in rows.h, for rows in blocks.
template <int BITS, int R, int B, int TOKENS>
void dot_levels(const uint8_t* const* rows, const uint8_t* const* next, const Levels& x, int64_t width, float (*out)[TOKENS]) {
    constexpr int64_t GROUP_BYTES = LEVEL_GROUP * BITS / 8;
    constexpr int VECTORS = ScalePlaces<BITS>::VECTORS;
    __m512 total[R][B];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) total[r][b] = _mm512_setzero_ps();
    static constexpr ScalePlaces<BITS> PLACES;
    const int64_t blocks = width / 32;
    for (int64_t first = 0; first < blocks; first += SCALED_GROUPS * GROUP_BLOCKS) {
        const int64_t left = blocks - first, group = first / GROUP_BLOCKS;
        const __mmask32 valid = left >= 32 ? ~0u : (1u << left) - 1u;
        __m512i scales[R];
        for (int r = 0; r < R; ++r) {
            scales[r] = _mm512_maskz_loadu_epi16(valid, rows[r] + width * BITS / 8 + first * 2);
            prefetch(next[r] + width * BITS / 8 + first * 2, 64);
        }
        const int64_t whole = std::min(SCALED_GROUPS, left / GROUP_BLOCKS);
        for (int64_t g = 0; g < whole; ++g) {
            for (int r = 0; r < R; ++r) prefetch(next[r] + (group + g) * GROUP_BYTES, GROUP_BYTES);
            add_group<BITS, R, B>(rows, scales, PLACES.places + g * VECTORS, x, group + g, GROUP_BLOCKS, total);
        }
        const int64_t rest = left - whole * GROUP_BLOCKS;
        if (whole < SCALED_GROUPS && rest > 0) {
            for (int r = 0; r < R; ++r) prefetch(next[r] + (group + whole) * GROUP_BYTES, rest * GROUP_BYTES / GROUP_BLOCKS);
            add_group<BITS, R, B>(rows, scales, PLACES.places + whole * VECTORS, x, group + whole, rest, total);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) out[r][b] = _mm512_reduce_add_ps(total[r][b]);
}

#elif SPARSIFY_LEVELS == 256

inline __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// start + the sums of each four products of bytes, unsigned ones with signed ones. No two products may exceed 32767 together.
inline __m256i add_products(__m256i start, __m256i without_sign, __m256i with_sign) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(start, without_sign, with_sign);
#else
    const __m256i pairs = _mm256_maddubs_epi16(without_sign, with_sign);
    return _mm256_add_epi32(start, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

// The scales of a row's blocks 2 * group and 2 * group + 1, as bf16; the second is 0 if the row has only one of them left.
template <bool BOTH>
inline __m256i load_scales(const uint8_t* scales, int64_t group) {
    int32_t two = 0;
    std::memcpy(&two, scales + group * 4, BOTH ? 4 : 2);
    return _mm256_set1_epi32(two);
}

// Adds a group's products with B tokens to the sums of a row; BOTH is false for a row's last group if that has only one block.
template <int BITS, int B, bool BOTH>
inline void add_group(const uint8_t* row, int64_t values, const LevelGroup* x, int64_t group, __m256 (&total)[B]) {
    const __m256i scales = load_scales<BOTH>(row + values, group);
    if constexpr (BITS == 8) {
        const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
        const __m256 factors[2] = {_mm256_castsi256_ps(_mm256_slli_epi32(scales, 16)), _mm256_castsi256_ps(_mm256_and_si256(scales, high))};
#pragma GCC unroll 2
        for (int block = 0; block < (BOTH ? 2 : 1); ++block) {
            const __m256i weights = load_bytes(row + group * 64 + block * 32);
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) {
                const __m256i states = load_bytes(x[b].bytes + block * 32);
                // Weights with the signs of the states, times the states without: at most 2 * 127 * 127 for two products.
                const __m256i products =
                    add_products(_mm256_setzero_si256(), _mm256_abs_epi8(states), _mm256_sign_epi8(weights, states));
                const __m256 factor = _mm256_mul_ps(factors[block], _mm256_set1_ps(x[b].scales[block * 8]));
                total[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), factor, total[b]);
            }
        }
    } else {
        const uint8_t* at = row + group * 32;
        const __m256i packed = BOTH ? load_bytes(at) : _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
        const __m256i first = _mm256_and_si256(packed, _mm256_set1_epi8(15));  // the first halves of both blocks
        const __m256i second = _mm256_and_si256(_mm256_srli_epi16(packed, 4), _mm256_set1_epi8(15));
        const __m256i places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 0, 1, -1, -1, 0, 1, -1, -1, 0, 1,  //
                                                -1, -1, 2, 3, -1, -1, 2, 3, -1, -1, 2, 3, -1, -1, 2, 3);
        const __m256 factors = _mm256_castsi256_ps(_mm256_shuffle_epi8(scales, places));
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
#if defined(__AVXVNNI__)
            __m256i products = add_products(load_bytes(x[b].starts), first, load_bytes(x[b].bytes));
            products = add_products(products, second, load_bytes(x[b].bytes + 32));
#else
            // Four products of at most 15 * 127 are added up in 16 bits: one widening fewer.
            const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(first, load_bytes(x[b].bytes)),
                                                   _mm256_maddubs_epi16(second, load_bytes(x[b].bytes + 32)));
            const __m256i products = _mm256_add_epi32(load_bytes(x[b].starts), _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
            const __m256 factor = _mm256_mul_ps(factors, _mm256_loadu_ps(x[b].scales));
            total[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), factor, total[b]);
        }
    }
}

// R rows times B tokens from the first token on, few enough that the sums stay in registers: there are sixteen.
template <int BITS, int R, int B, int TOKENS>
void dot_few(const uint8_t* const* rows, const uint8_t* const* next, const Levels& x, int64_t width, int first, float (*out)[TOKENS]) {
    constexpr int64_t GROUP_BYTES = LEVEL_GROUP * BITS / 8;
    __m256 total[R][B];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) total[r][b] = _mm256_setzero_ps();
    const int64_t values = width * BITS / 8, whole = width / LEVEL_GROUP;
    for (int64_t g = 0; g < whole; ++g) {
        for (int r = 0; r < R; ++r) {
            if (BITS == 8 || (g & 1) == 0) prefetch(next[r] + g * GROUP_BYTES, 64);
            if ((g & 15) == 0) prefetch(next[r] + values + g * 4, 64);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) add_group<BITS, B, true>(rows[r], values, x.of(g, first), g, total[r]);
    }
    if (width % LEVEL_GROUP != 0)
        for (int r = 0; r < R; ++r) add_group<BITS, B, false>(rows[r], values, x.of(whole, first), whole, total[r]);
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) {
            const __m256 t = total[r][b];
            __m128 four = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
            four = _mm_add_ps(four, _mm_movehl_ps(four, four));
            out[r][first + b] = _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
        }
}

// As `dot` in rows.h, for rows in blocks.
template <int BITS, int R, int B, int TOKENS>
void dot_levels(const uint8_t* const* rows, const uint8_t* const* next, const Levels& x, int64_t width, float (*out)[TOKENS]) {
    constexpr int AT_ONCE = std::min(B, 4), FEW = std::min(R, 8 / AT_ONCE);
    for (int r = 0; r < R; r += FEW)
        for (int b = 0; b < B; b += AT_ONCE) dot_few<BITS, FEW, AT_ONCE>(rows + r, next + r, x, width, b, out + r);
}

#endif

}  // namespace sparsify
