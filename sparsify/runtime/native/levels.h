// Hidden states rounded for products with weights in blocks: whole numbers from -127 to 127 and one scale for every 32 elements.
//
// A processor that multiplies bytes (AVX-512 VNNI) adds up a block's products exactly as whole numbers; elsewhere the rounded
// values are multiplied in fp32, which gives the same up to the rounding of the sums. Mirrors rounded_states in
// sparsify/runtime/quantised.py.
#pragma once

#include "lanes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define SPARSIFY_LEVELS 1
#endif

namespace sparsify {

constexpr int64_t LEVEL_GROUP = 64;  // elements that one instruction takes: two blocks

struct Levels {
    std::vector<int8_t> bytes;    // [tokens, groups * 64], in the order in which the format unpacks its weights
    std::vector<int32_t> starts;  // [tokens, groups * 16]: minus the weights' offset times the sum of each four bytes
    std::vector<float> scales;    // [tokens, groups * 16]: the scale of the block of each four bytes
    int64_t groups = 0;

    // Rounds values [tokens, width] to multiples of their block's scale. A block with a value that is not finite becomes NaN.
    void round(float* values, int tokens, int64_t width, int bits) {
        groups = (width + LEVEL_GROUP - 1) / LEVEL_GROUP;
        bytes.resize(tokens * groups * 64);
        starts.resize(tokens * groups * 16);
        scales.resize(tokens * groups * 16);
        for (int t = 0; t < tokens; ++t)
            for (int64_t g = 0; g < groups; ++g)
                round_group(values + t * width, g, std::min<int64_t>(2, (width - g * LEVEL_GROUP) / 32), bits,
                            bytes.data() + (t * groups + g) * 64, starts.data() + (t * groups + g) * 16,
                            scales.data() + (t * groups + g) * 16);
    }

private:
    static void round_group(float* token, int64_t group, int64_t blocks, int bits, int8_t* to, int32_t* start, float* scale) {
        int8_t level[64] = {};
        float own[2] = {0.0f, 0.0f};
        for (int64_t block = 0; block < blocks; ++block) {
            float* x = token + group * LEVEL_GROUP + block * 32;
            float largest = 0.0f, finite = 0.0f;
            for (int i = 0; i < 32; ++i) {
                largest = std::max(largest, std::fabs(x[i]));
                finite += x[i] * 0.0f;  // NaN unless all are finite
            }
            const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
            own[block] = finite == 0.0f ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
            if (finite != 0.0f) {
                std::fill(x, x + 32, own[block]);
                continue;
            }
            for (int i = 0; i < 32; ++i) {
                const float rounded = std::nearbyint(std::min(127.0f, std::max(-127.0f, x[i] * inverse)));
                level[block * 32 + i] = static_cast<int8_t>(rounded);
                x[i] = rounded * own[block];
            }
        }
        // int4 unpacks the first halves of both blocks, then their second halves; int8 in order.
        const bool halves = bits == 4;
        for (int quarter = 0; quarter < 4; ++quarter) {
            const int from = halves ? (quarter & 1) * 32 + (quarter >> 1) * 16 : quarter * 16;
            std::copy(level + from, level + from + 16, to + quarter * 16);
            for (int i = 0; i < 4; ++i) {
                const int8_t* four = level + from + i * 4;
                start[quarter * 4 + i] = -(halves ? 8 : 128) * (four[0] + four[1] + four[2] + four[3]);
                scale[quarter * 4 + i] = own[from >> 5];
            }
        }
    }
};

#if defined(SPARSIFY_LEVELS)

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
        const int64_t at = b * x.groups + group;
        const __m512i bytes = _mm512_loadu_si512(x.bytes.data() + at * 64);
        const __m512i start = _mm512_loadu_si512(x.starts.data() + at * 16);
        const __m512 scale = _mm512_loadu_ps(x.scales.data() + at * 16);
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

#endif

}  // namespace sparsify
