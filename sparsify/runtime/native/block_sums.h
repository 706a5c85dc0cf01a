// Sums of listed rows of weights in blocks, each row times a factor of each token, as whole numbers.
//
// A weight is a value times its block's scale, so a term is value * (scale * factor). Of each 16 listed rows, the products in brackets
// are rounded to 16 bits, to multiples of a 32767th of the largest in their block; then a sum of 16 terms is exact in 32 bits and is
// added in fp32. Processors multiply 16-bit words in pairs, so two rows are added at a time. Sums are the same bits for any columns
// that a thread has.
#pragma once

#include "blocks.h"

#include <algorithm>
#include <limits>
#include <vector>

#if defined(__AVX512BW__)
#define SPARSIFY_WORDS 512
#elif defined(__AVX2__) && defined(__FMA__)
#define SPARSIFY_WORDS 256
#endif

#if defined(SPARSIFY_WORDS)

namespace sparsify {

// A vector of words of 16 bits, or of numbers of 32 bits. Its lanes of 128 bits hold 16 bytes of a row each.
#if SPARSIFY_WORDS == 512

struct Words {
    __m512i v;
};
inline Words load_words(const void* from) { return {_mm512_loadu_si512(from)}; }
inline Words load_words(const void* from, int64_t bytes) {  // the rest becomes zeros
    const int64_t numbers = std::min<int64_t>(std::max<int64_t>(bytes, 0) / 4, 16);
    return {_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << numbers) - 1), from)};
}
inline Words interleave_low(Words a, Words b) { return {_mm512_unpacklo_epi16(a.v, b.v)}; }
inline Words interleave_high(Words a, Words b) { return {_mm512_unpackhi_epi16(a.v, b.v)}; }
inline Words with_mask(Words a, short mask) { return {_mm512_and_si512(a.v, _mm512_set1_epi16(mask))}; }
inline Words high_four_bits(Words a) { return {_mm512_srli_epi16(a.v, 12)}; }
inline Words high_byte(Words a) { return {_mm512_srai_epi16(a.v, 8)}; }
inline Words low_byte(Words a) { return {_mm512_srai_epi16(_mm512_slli_epi16(a.v, 8), 8)}; }
// total + the sums of each two products.
inline Words add_products(Words a, Words b, Words total) {
#if defined(__AVX512VNNI__)
    return {_mm512_dpwssd_epi32(total.v, a.v, b.v)};
#else
    return {_mm512_add_epi32(total.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}
// The first number in the lanes of the first block, and so on; a block has one lane or two.
inline Words spread(const void* numbers, int lanes_of_block) {
    const __m512i places = lanes_of_block == 1 ? _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
                                               : _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return {_mm512_permutexvar_epi32(places, _mm512_castsi128_si512(_mm_loadu_si128(static_cast<const __m128i*>(numbers))))};
}
template <int COUNT>
Words times_power(Words whole) {
    return {_mm512_slli_epi32(whole.v, COUNT)};
}
inline Words times(Words numbers, float factor) {
    return {_mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(numbers.v), _mm512_set1_ps(factor)))};
}
inline void add_scaled(Words whole, Words scales, float* total) {
    const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole.v), _mm512_castsi512_ps(scales.v), _mm512_loadu_ps(total));
    _mm512_storeu_ps(total, sum);
}

#else

struct Words {
    __m256i v;
};
inline Words load_words(const void* from) { return {_mm256_loadu_si256(static_cast<const __m256i*>(from))}; }
inline Words load_words(const void* from, int64_t bytes) {  // the rest becomes zeros
    if (bytes >= 32) return load_words(from);
    if (bytes <= 0) return {_mm256_setzero_si256()};
    return {_mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(from)))};
}
inline Words interleave_low(Words a, Words b) { return {_mm256_unpacklo_epi16(a.v, b.v)}; }
inline Words interleave_high(Words a, Words b) { return {_mm256_unpackhi_epi16(a.v, b.v)}; }
inline Words with_mask(Words a, short mask) { return {_mm256_and_si256(a.v, _mm256_set1_epi16(mask))}; }
inline Words high_four_bits(Words a) { return {_mm256_srli_epi16(a.v, 12)}; }
inline Words high_byte(Words a) { return {_mm256_srai_epi16(a.v, 8)}; }
inline Words low_byte(Words a) { return {_mm256_srai_epi16(_mm256_slli_epi16(a.v, 8), 8)}; }
// total + the sums of each two products.
inline Words add_products(Words a, Words b, Words total) {
#if defined(__AVXVNNI__)
    return {_mm256_dpwssd_avx_epi32(total.v, a.v, b.v)};
#else
    return {_mm256_add_epi32(total.v, _mm256_madd_epi16(a.v, b.v))};
#endif
}
// The first number in the lanes of the first block, and so on; a block has one lane or two.
inline Words spread(const void* numbers, int lanes_of_block) {
    if (lanes_of_block == 2) return {_mm256_castps_si256(_mm256_broadcast_ss(static_cast<const float*>(numbers)))};
    const __m256 both = _mm256_castpd_ps(_mm256_broadcast_sd(static_cast<const double*>(numbers)));
    return {_mm256_castps_si256(_mm256_permutevar_ps(both, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)))};
}
template <int COUNT>
Words times_power(Words whole) {
    return {_mm256_slli_epi32(whole.v, COUNT)};
}
inline Words times(Words numbers, float factor) {
    return {_mm256_castps_si256(_mm256_mul_ps(_mm256_castsi256_ps(numbers.v), _mm256_set1_ps(factor)))};
}
inline void add_scaled(Words whole, Words scales, float* total) {
    const __m256 sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole.v), _mm256_castsi256_ps(scales.v), _mm256_loadu_ps(total));
    _mm256_storeu_ps(total, sum);
}

#endif

constexpr int64_t TILE = SPARSIFY_WORDS / 128;           // blocks whose sums are in registers at once
constexpr int SUMS = 8;                                  // vectors of these sums
constexpr int64_t SUM_LANES = SPARSIFY_WORDS / 32;       // numbers in a vector
constexpr int64_t SUMMED_ROWS = 16, PAIRS = 8;           // rows whose sum is whole numbers
constexpr int64_t SUMMED_BLOCKS = 128;                   // blocks of a row that are read at once: memory is read fastest in long runs
constexpr int64_t TILE_COLUMNS = TILE * BLOCK;

// The values of a tile in two rows, as pairs of words. int4: 8 more than the weights.
template <int BITS, bool WHOLE>
inline void unpack_pairs(const uint8_t* one, const uint8_t* other, int64_t bytes, Words (&pairs)[SUMS]) {
    constexpr int64_t STEP = SPARSIFY_WORDS / 8;
#pragma GCC unroll 2
    for (int part = 0; part < BITS / 4; ++part) {
        const int64_t at = part * STEP;
        const Words a = WHOLE ? load_words(one + at) : load_words(one + at, bytes - at);
        const Words b = WHOLE ? load_words(other + at) : load_words(other + at, bytes - at);
        const Words both[2] = {interleave_low(a, b), interleave_high(a, b)};
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            if constexpr (BITS == 4) {
                pairs[half * 4] = with_mask(both[half], 0x000f);
                pairs[half * 4 + 1] = with_mask(both[half], 0x00f0);  // 16 times the value
                pairs[half * 4 + 2] = with_mask(both[half], 0x0f00);  // 256 times; still, the sum of 16 rows fits into 32 bits
                pairs[half * 4 + 3] = high_four_bits(both[half]);
            } else {
                pairs[part * 4 + half * 2] = low_byte(both[half]);
                pairs[part * 4 + half * 2 + 1] = high_byte(both[half]);
            }
        }
    }
}

// The column of a tile that each number of its sums belongs to.
template <int BITS>
struct TileColumns {
    uint8_t of[TILE_COLUMNS];
    constexpr TileColumns() : of() {
        for (int64_t i = 0; i < TILE_COLUMNS; ++i) {
            const int64_t sum = i / SUM_LANES, lane = i % SUM_LANES / 4, word = i % 4 * 2;
            of[i] = static_cast<uint8_t>(BITS == 4 ? lane * 32 + sum / 4 * 8 + word + (sum & 2) / 2 + (sum & 1) * 16
                                                   : sum / 4 * (SPARSIFY_WORDS / 8) + lane * 16 + (sum & 2) * 4 + word + (sum & 1));
        }
    }
};

// Scales times factors of up to 16 rows for up to 128 blocks and B tokens, rounded.
template <int BITS, int B>
struct Coefficients {
    alignas(64) int32_t pairs[PAIRS][B][SUMMED_BLOCKS];  // of two rows, 16 bits each
    alignas(64) int32_t starts[B][SUMMED_BLOCKS];        // int4: minus 8 times the sum of all rows'
    alignas(64) float scales[B][SUMMED_BLOCKS];          // what they are multiples of

    // factors[r]: those of row r's tokens; scales_of[r]: its blocks' scales in bf16.
    void fill(const float* const* factors, const uint8_t* const* scales_of, int64_t rows, int64_t blocks) {
        for (int64_t block = 0; block < blocks; block += 8)
            for (int b = 0; b < B; ++b) {
                if (block + 8 <= blocks) fill_eight<true>(factors, scales_of, rows, b, block, 8);
                else fill_eight<false>(factors, scales_of, rows, b, block, blocks - block);
            }
    }

private:
    template <bool WHOLE>
    void fill_eight(const float* const* factors, const uint8_t* const* scales_of, int64_t rows, int b, int64_t block, int64_t count) {
        __m256 products[SUMMED_ROWS];
        __m256i largest = _mm256_setzero_si256();  // bits without sign compare as sizes do, and those of a NaN are larger
        for (int64_t r = 0; r < rows; ++r) {
            uint16_t rest[8] = {};
            if (!WHOLE) std::memcpy(rest, scales_of[r] + block * 2, count * 2);
            const void* eight = WHOLE ? static_cast<const void*>(scales_of[r] + block * 2) : rest;
            const __m256i numbers = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(eight)));
            products[r] = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(numbers, 16)), _mm256_set1_ps(factors[r][b]));
            largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(products[r]), _mm256_set1_epi32(0x7fffffff)));
        }
        if (rows % 2 == 1) products[rows] = _mm256_setzero_ps();
        const __m256 size = _mm256_castsi256_ps(largest), most = _mm256_set1_ps(std::numeric_limits<float>::max());
        const __m256 inverse = _mm256_min_ps(_mm256_div_ps(_mm256_set1_ps(32767.0f), size), most);  // for 0, and for NaN, `most`
        const __m256 missing = _mm256_mul_ps(size, _mm256_setzero_ps());  // NaN unless all products are finite
        _mm256_store_ps(scales[b] + block, _mm256_add_ps(_mm256_div_ps(_mm256_set1_ps(1.0f), inverse), missing));
        // The rounded number is in the low bits, in two's complement.
        const __m256 middle = _mm256_set1_ps(12582912.0f);
        const auto rounded = [&](int64_t r) { return _mm256_castps_si256(_mm256_fmadd_ps(products[r], inverse, middle)); };
        __m256i start = _mm256_setzero_si256();
        for (int64_t r = 0; r < rows; r += 2) {
            const __m256i pair = _mm256_blend_epi16(rounded(r), _mm256_slli_epi32(rounded(r + 1), 16), 0xaa);
            _mm256_store_si256(reinterpret_cast<__m256i*>(pairs[r / 2][b] + block), pair);
            if (BITS == 4) start = _mm256_add_epi32(start, _mm256_madd_epi16(pair, _mm256_set1_epi16(-8)));
        }
        _mm256_store_si256(reinterpret_cast<__m256i*>(starts[b] + block), start);
    }
};

// Adds a tile of all pairs of rows to totals[b * stride].
template <int BITS, int B, bool WHOLE>
void add_tile(const uint8_t* const* rows, int64_t pairs, int64_t blocks, const Coefficients<BITS, B>& c, int64_t block, float* totals,
              int64_t stride) {
    constexpr int LANES_OF_BLOCK = BITS / 4, PARTS = BITS / 4;  // int8: the second half of the vectors are the tile's second half
    const int64_t at = block * BLOCK * BITS / 8, bytes = blocks * BLOCK * BITS / 8;
    const auto spread_over = [&](const void* numbers, int sum) {
        const int part = sum / (SUMS / PARTS);
        return spread(static_cast<const int32_t*>(numbers) + part * TILE / PARTS, LANES_OF_BLOCK);
    };
    const auto start = [&](int b, Words(&sums)[SUMS]) {
        if constexpr (BITS == 4) {
            const Words once = spread_over(c.starts[b] + block, 0), by_place[4] = {once, times_power<4>(once), times_power<8>(once), once};
#pragma GCC unroll 8
            for (int k = 0; k < SUMS; ++k) sums[k] = by_place[k % 4];
        } else {
#pragma GCC unroll 8
            for (int k = 0; k < SUMS; ++k) sums[k] = spread_over(c.starts[b] + block, k);
        }
    };
    const auto add_pair = [&](const Words(&weights)[SUMS], int64_t pair, int b, Words(&sums)[SUMS]) {
#pragma GCC unroll 8
        for (int k = 0; k < SUMS; ++k) sums[k] = add_products(weights[k], spread_over(c.pairs[pair][b] + block, k), sums[k]);
    };
    const auto finish = [&](int b, const Words(&sums)[SUMS]) {
#pragma GCC unroll 8
        for (int k = 0; k < SUMS; ++k) {
            const Words scales = spread_over(c.scales[b] + block, k);
            const float unit = BITS == 4 && k % 4 == 1 ? 1.0f / 16 : BITS == 4 && k % 4 == 2 ? 1.0f / 256 : 1.0f;
            add_scaled(sums[k], unit == 1.0f ? scales : times(scales, unit), totals + b * stride + k * SUM_LANES);
        }
    };
    Words sums[SUMS];
    if constexpr (B == 1) {
        start(0, sums);
        for (int64_t p = 0; p < pairs; ++p) {
            Words weights[SUMS];
            unpack_pairs<BITS, WHOLE>(rows[2 * p] + at, rows[2 * p + 1] + at, bytes, weights);
            add_pair(weights, p, 0, sums);
        }
        finish(0, sums);
    } else {
        Words weights[PAIRS][SUMS];  // unpacked once for all tokens
        for (int64_t p = 0; p < pairs; ++p)
            unpack_pairs<BITS, WHOLE>(rows[2 * p] + at, rows[2 * p + 1] + at, bytes, weights[p]);
        for (int b = 0; b < B; ++b) {
            start(b, sums);
            for (int64_t p = 0; p < pairs; ++p) add_pair(weights[p], p, b, sums);
            finish(b, sums);
        }
    }
}

// sums[b * width + j] = the sum of factors[n * B + b] * m[n][j] over all listed rows n, for up to 128 blocks of columns from `begin`.
template <int BITS, int B>
void sum_blocks(const Matrix& m, const std::vector<int32_t>& list, const float* factors, float* sums, int64_t width, int64_t begin,
                int64_t blocks) {
    constexpr int64_t TILES = SUMMED_BLOCKS / TILE, STRIDE = TILES * TILE_COLUMNS, TILE_BYTES = TILE_COLUMNS * BITS / 8;
    alignas(64) float totals[B * STRIDE] = {};
    Coefficients<BITS, B> coefficients;
    const auto row_of = [&](int64_t n) { return static_cast<const uint8_t*>(m.data) + m.place(n) * m.row_stride + begin * BITS / 8; };
    const int64_t to_scales = (width - begin) * BITS / 8 + begin / BLOCK * 2, count = static_cast<int64_t>(list.size());
    const int64_t span = blocks * BLOCK * BITS / 8, ahead = std::max<int64_t>(1, AHEAD_BYTES / (SUMMED_ROWS * span)) * SUMMED_ROWS;
    for (int64_t i = SUMMED_ROWS; i < std::min(ahead, count); ++i) {
        prefetch(row_of(list[i]), span);
        prefetch(row_of(list[i]) + to_scales, blocks * 2);
    }
    for (int64_t first = 0; first < count; first += SUMMED_ROWS) {
        const int64_t group = std::min(SUMMED_ROWS, count - first);
        const int64_t following = std::min(SUMMED_ROWS, std::max<int64_t>(0, count - first - ahead));
        const uint8_t *rows[SUMMED_ROWS], *scales[SUMMED_ROWS], *next[SUMMED_ROWS];
        const float* own[SUMMED_ROWS];
        for (int64_t r = 0; r < group; ++r) {
            rows[r] = row_of(list[first + r]);
            scales[r] = rows[r] + to_scales;
            own[r] = factors + static_cast<int64_t>(list[first + r]) * B;
        }
        if (group % 2 == 1) rows[group] = rows[group - 1];  // its coefficients are 0
        for (int64_t r = 0; r < following; ++r) {
            next[r] = row_of(list[first + ahead + r]);
            prefetch(next[r] + to_scales, blocks * 2);
        }
        coefficients.fill(own, scales, group, blocks);
        for (int64_t t = 0; t * TILE < blocks; ++t) {
            if (t * TILE_BYTES % 64 == 0)
                for (int64_t r = 0; r < following; ++r)
                    for (int64_t i = 0; i < TILE_BYTES; i += 64) prefetch(next[r] + t * TILE_BYTES + i, 64);
            const int64_t left = blocks - t * TILE, pairs = (group + 1) / 2;
            float* place = totals + t * TILE_COLUMNS;
            if (left >= TILE) add_tile<BITS, B, true>(rows, pairs, TILE, coefficients, t * TILE, place, STRIDE);
            else add_tile<BITS, B, false>(rows, pairs, left, coefficients, t * TILE, place, STRIDE);
        }
    }
    static constexpr TileColumns<BITS> COLUMNS;
    for (int b = 0; b < B; ++b)
        for (int64_t t = 0; t * TILE < blocks; ++t)
            for (int64_t i = 0; i < TILE_COLUMNS; ++i) {
                const int64_t column = t * TILE_COLUMNS + COLUMNS.of[i];
                if (column < blocks * BLOCK) sums[b * width + begin + column] = totals[b * STRIDE + t * TILE_COLUMNS + i];
            }
}

}  // namespace sparsify

#endif
