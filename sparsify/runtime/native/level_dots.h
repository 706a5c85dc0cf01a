// Dot products of rounded hidden states (levels.h) with rows of weights in blocks, as whole numbers: exact within a block, whose sum
// is then multiplied by the scales of both.
//
// SPARSIFY_LEVELS is defined where the processor has the instructions: 64 products at once with AVX-512 VNNI, 32 with AVX2.
#pragma once

#include "levels.h"

namespace sparsify {

#if SPARSIFY_LEVELS == 512

// Unsigned weights of a group, 8 or 128 added to each. `left` is the number of blocks that the row still has: a row's last group may
// have only one.
template <int BITS>
inline __m512i unpack_group(const uint8_t* row, int64_t group, int64_t left) {
    if constexpr (BITS == 8) {
        const __mmask64 valid = left >= 2 ? ~0ull : 0xffffffffull;
        return _mm512_xor_si512(_mm512_maskz_loadu_epi8(valid, row + group * 64), _mm512_set1_epi8(static_cast<char>(0x80)));
    } else {
        __m256i packed;
        if (left >= 2) packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + group * 32));
        else packed = _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + group * 32)));
        const __m512i both = _mm512_broadcast_i64x4(packed);
#if defined(__GFNI__)
        // One instruction takes the low four bits of each byte in the lower half, and the high four in the upper half.
        const int64_t low = 0x0102040800000000, high = 0x1020408000000000;
        return _mm512_gf2p8affine_epi64_epi8(both, _mm512_setr_epi64(low, low, low, low, high, high, high, high), 0);
#else
        const __m512i counts = _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4);
        return _mm512_and_si512(_mm512_srlv_epi64(both, counts), _mm512_set1_epi8(15));
#endif
    }
}

constexpr int64_t SCALED_GROUPS = 16;  // groups whose scales one load takes

// For each of so many groups, which of the loaded scales goes to the upper half of each lane.
template <int BITS>
struct ScalePlaces {
    alignas(64) uint16_t places[SCALED_GROUPS][32];
    constexpr ScalePlaces() : places() {
        for (int group = 0; group < SCALED_GROUPS; ++group)
            for (int lane = 0; lane < 16; ++lane)
                places[group][2 * lane + 1] = static_cast<uint16_t>(2 * group + (BITS == 8 ? lane >> 3 : (lane >> 2) & 1));
    }
};

template <int BITS, int R, int B>
inline void add_group(const uint8_t* const* rows, const __m512i* scales, __m512i place, const Levels& x, int64_t group, int64_t left,
                      __m512 (&total)[R][B]) {
    __m512i weights[R];
    __m512 factors[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        weights[r] = unpack_group<BITS>(rows[r], group, left);
        factors[r] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, place, scales[r]));
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
        const LevelGroup& own = *x.of(group, b);
        const __m512i bytes = _mm512_loadu_si512(own.bytes);
        const __m512i start = _mm512_loadu_si512(own.starts);
        const __m512 scale = _mm512_loadu_ps(own.scales);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const __m512 products = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, weights[r], bytes));
            total[r][b] = _mm512_fmadd_ps(products, _mm512_mul_ps(factors[r], scale), total[r][b]);
        }
    }
}

// As `dot` in rows.h, for rows in blocks.
template <int BITS, int R, int B, int TOKENS>
void dot_levels(const uint8_t* const* rows, const uint8_t* const* next, const Levels& x, int64_t width, float (*out)[TOKENS]) {
    constexpr int64_t GROUP_BYTES = LEVEL_GROUP * BITS / 8;
    __m512 total[R][B];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) total[r][b] = _mm512_setzero_ps();
    static constexpr ScalePlaces<BITS> PLACES;
    const int64_t blocks = width / 32, groups = (blocks + 1) / 2;
    for (int64_t first = 0; first < groups; first += SCALED_GROUPS) {
        const int64_t left = blocks - 2 * first;
        const __mmask32 valid = left >= 32 ? ~0u : (1u << left) - 1u;
        __m512i scales[R];
        for (int r = 0; r < R; ++r) {
            scales[r] = _mm512_maskz_loadu_epi16(valid, rows[r] + width * BITS / 8 + first * 4);
            prefetch_near(next[r] + width * BITS / 8 + first * 4);
        }
        const int64_t whole = std::min(SCALED_GROUPS, left / 2);
        for (int64_t g = 0; g < whole; ++g) {
            if (BITS == 8 || (g & 1) == 0)
                for (int r = 0; r < R; ++r) prefetch_near(next[r] + (first + g) * GROUP_BYTES);
            add_group<BITS, R, B>(rows, scales, _mm512_load_si512(PLACES.places[g]), x, first + g, 2, total);
        }
        if (whole < SCALED_GROUPS && (left & 1))
            add_group<BITS, R, B>(rows, scales, _mm512_load_si512(PLACES.places[whole]), x, first + whole, 1, total);
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
                const __m256 factor = _mm256_mul_ps(factors[block], _mm256_set1_ps(x[b].scales[block * 4]));
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
            if (BITS == 8 || (g & 1) == 0) prefetch_near(next[r] + g * GROUP_BYTES);
            if ((g & 15) == 0) prefetch_near(next[r] + values + g * 4);
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
