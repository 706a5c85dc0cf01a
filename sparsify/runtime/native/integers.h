// Products of whole numbers: codes of weights, of 8 or 4 bits, with codes of activations, of at most 8 bits.
//
// A tile has TILE_ROWS rows of a matrix. Its lines follow each other; a line has STEP columns of all rows. A line of 8 bits is TILE_ROWS groups of
// STEP bytes, one group a row; one of 4 bits is half as many bytes, row r in their low four bits and row 16 + r in the high ones.
// OFFSET was added to every code. A vector of the processor so has STEP products of each of its rows next to each other, and there
// is nothing to add up across it. A column, alone, is one shift away, so columns can be read in any order: a panel has a tile's
// columns in another order, or in the same, each code as wide as it is multiplied.
//
// The instructions: 64 products at once with AVX-512 VNNI; with AVX2 32 of 4-bit weights, added up in 16 bits while they fit, and 16 of
// 8-bit weights; elsewhere plain loops.
#pragma once

#include "lanes.h"

#include <algorithm>
#include <type_traits>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define SPARSIFY_INTEGERS 512
#elif defined(__AVX2__)
#define SPARSIFY_INTEGERS 256
#else
#define SPARSIFY_INTEGERS 0
#endif

namespace sparsify {

constexpr int64_t TILE_ROWS = 32, HALF = TILE_ROWS / 2;
#if SPARSIFY_INTEGERS == 512
constexpr int64_t STEP = 4;
constexpr int MOST_VECTORS = 12;
#else
constexpr int64_t STEP = 2;
constexpr int MOST_VECTORS = 6;
#endif

template <int BITS>
struct Codes {
    static constexpr int64_t LINE_BYTES = TILE_ROWS * STEP * BITS / 8;
    static constexpr int OFFSET = BITS == 4 ? 8 : SPARSIFY_INTEGERS == 512 ? 128 : 0;
    // How codes are multiplied: of activations, and of weights in a panel.
    using Activation = std::conditional_t<BITS == 8 && SPARSIFY_INTEGERS != 512, int16_t, int8_t>;
    using Weight = std::conditional_t<BITS == 8 && SPARSIFY_INTEGERS != 512, int16_t, uint8_t>;
    static constexpr int64_t PANEL_LINE = TILE_ROWS * STEP;  // weights
    // Vectors of activations that are multiplied together: their sums are in registers.
    static constexpr int VECTORS = BITS == 8 && SPARSIFY_INTEGERS != 512 ? MOST_VECTORS / 2 : MOST_VECTORS;
};

// Columns after which sums must have been widened to fp32: then products of bytes still fit into 32 bits.
constexpr int64_t MOST_COLUMNS = 65536;

// How many lines of 4-bit weights may be added up in 16 bits, if codes of activations are at most this large.
constexpr int64_t lines_in_16_bits(int largest) { return 32767 / (2 * 15 * largest); }

inline uint8_t code_at(const uint8_t* tile, int64_t row, int64_t column, int bits) {
    const int64_t place = row % HALF * STEP + column % STEP, step = column / STEP;
    if (bits == 4) return tile[step * Codes<4>::LINE_BYTES + place] >> (row < HALF ? 0 : 4) & 15;
    return tile[step * Codes<8>::LINE_BYTES + row / HALF * HALF * STEP + place];
}

// Puts the codes of a row [columns] into a tile whose bytes are zero where 4 bits are put.
template <int BITS>
void put_row(const int8_t* codes, int64_t columns, int64_t row, uint8_t* tile) {
    for (int64_t column = 0; column < (columns + STEP - 1) / STEP * STEP; ++column) {
        const int code = (column < columns ? codes[column] : 0) + Codes<BITS>::OFFSET;
        const int64_t place = row % HALF * STEP + column % STEP, step = column / STEP;
        if (BITS == 4) tile[step * Codes<4>::LINE_BYTES + place] |= static_cast<uint8_t>((code & 15) << (row < HALF ? 0 : 4));
        else tile[step * Codes<8>::LINE_BYTES + row / HALF * HALF * STEP + place] = static_cast<uint8_t>(code);
    }
}

// The tile's columns order[begin], ..., order[end - 1] as a panel; what pads its last line is arbitrary.
template <int BITS>
void fill_panel(const uint8_t* tile, const int32_t* order, int64_t begin, int64_t end, typename Codes<BITS>::Weight* to) {
    constexpr int64_t LINE_BYTES = Codes<BITS>::LINE_BYTES, PANEL_LINE = Codes<BITS>::PANEL_LINE;
    for (int64_t first = begin; first < end; first += STEP, to += PANEL_LINE) {
        int64_t columns[STEP];
        for (int64_t s = 0; s < STEP; ++s) columns[s] = order[std::min(first + s, end - 1)];
#if SPARSIFY_INTEGERS == 512
        for (int64_t half = 0; half < (BITS == 8 ? 2 : 1); ++half) {
            __m512i all = _mm512_setzero_si512();
            for (int64_t s = 0; s < STEP; ++s) {
                const __m512i line = _mm512_loadu_si512(tile + columns[s] / STEP * LINE_BYTES + half * 64);
                const __m512i own = _mm512_srl_epi32(line, _mm_cvtsi64_si128(columns[s] % STEP * 8));
                all = _mm512_or_si512(all, _mm512_sll_epi32(_mm512_and_si512(own, _mm512_set1_epi32(255)), _mm_cvtsi64_si128(s * 8)));
            }
            if (BITS == 8) {
                _mm512_storeu_si512(to + half * 64, all);
            } else {
                _mm512_storeu_si512(to, _mm512_and_si512(all, _mm512_set1_epi8(15)));
                _mm512_storeu_si512(to + 64, _mm512_and_si512(_mm512_srli_epi16(all, 4), _mm512_set1_epi8(15)));
            }
        }
#elif SPARSIFY_INTEGERS == 256
        const auto line = [&](int64_t s, int64_t half) {
            return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + columns[s] / STEP * LINE_BYTES + half * 32));
        };
        if constexpr (BITS == 4) {
            const __m256i low_bytes = _mm256_set1_epi16(255), low_bits = _mm256_set1_epi8(15);
            const __m256i one = _mm256_and_si256(_mm256_srl_epi16(line(0, 0), _mm_cvtsi64_si128(columns[0] % 2 * 8)), low_bytes);
            const __m256i two = _mm256_and_si256(_mm256_srl_epi16(line(1, 0), _mm_cvtsi64_si128(columns[1] % 2 * 8)), low_bytes);
            const __m256i both = _mm256_or_si256(one, _mm256_slli_epi16(two, 8));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_and_si256(both, low_bits));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), _mm256_and_si256(_mm256_srli_epi16(both, 4), low_bits));
        } else {
            for (int64_t half = 0; half < 2; ++half) {
                __m256i own[2];
                for (int64_t s = 0; s < 2; ++s)
                    own[s] = _mm256_srai_epi16(_mm256_sll_epi16(line(s, half), _mm_cvtsi64_si128(columns[s] % 2 ? 0 : 8)), 8);
                const __m256i low = _mm256_unpacklo_epi16(own[0], own[1]), high = _mm256_unpackhi_epi16(own[0], own[1]);
                auto* place = reinterpret_cast<__m256i*>(to + half * 32);
                _mm256_storeu_si256(place, _mm256_permute2x128_si256(low, high, 0x20));
                _mm256_storeu_si256(place + 1, _mm256_permute2x128_si256(low, high, 0x31));
            }
        }
#else
        for (int64_t row = 0; row < TILE_ROWS; ++row)
            for (int64_t s = 0; s < STEP; ++s) {
                const uint8_t code = code_at(tile, row, columns[s], BITS);
                to[row * STEP + s] = BITS == 8 ? static_cast<int8_t>(code) : code;
            }
#endif
    }
}

// The sums of the next columns' products for V vectors of activations x [lines, V, STEP] and a tile's rows: sums[v][row] +=. The weights are
// lines of a tile or, if PANEL, of a panel. `flush` lines at most are added up in 16 bits, where this is done.
template <int BITS, bool PANEL, int V>
void add_products(const void* weights, const typename Codes<BITS>::Activation* x, int64_t lines, int64_t flush, int32_t (*sums)[TILE_ROWS]) {
    constexpr int64_t LINE = PANEL ? Codes<BITS>::PANEL_LINE * static_cast<int64_t>(sizeof(typename Codes<BITS>::Weight)) : Codes<BITS>::LINE_BYTES;
    const auto* from = static_cast<const uint8_t*>(weights);
#if SPARSIFY_INTEGERS == 512
    __m512i total[V][2];
    for (int v = 0; v < V; ++v)
        for (int h = 0; h < 2; ++h) total[v][h] = _mm512_loadu_si512(sums[v] + h * HALF);
    for (int64_t i = 0; i < lines; ++i, from += LINE, x += V * STEP) {
        __m512i own[2];
        if constexpr (PANEL || BITS == 8) {
            own[0] = _mm512_loadu_si512(from);
            own[1] = _mm512_loadu_si512(from + 64);
        } else {
            const __m512i both = _mm512_loadu_si512(from);
            own[0] = _mm512_and_si512(both, _mm512_set1_epi8(15));
            own[1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), _mm512_set1_epi8(15));
        }
        if (!PANEL) prefetch(from + AHEAD_BYTES, LINE);
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v) {
            int32_t four;
            std::memcpy(&four, x + v * STEP, sizeof four);
            const __m512i codes = _mm512_set1_epi32(four);
            total[v][0] = _mm512_dpbusd_epi32(total[v][0], own[0], codes);
            total[v][1] = _mm512_dpbusd_epi32(total[v][1], own[1], codes);
        }
    }
    for (int v = 0; v < V; ++v)
        for (int h = 0; h < 2; ++h) _mm512_storeu_si512(sums[v] + h * HALF, total[v][h]);
#elif SPARSIFY_INTEGERS == 256
    const auto load = [](const void* place) { return _mm256_loadu_si256(static_cast<const __m256i*>(place)); };
    const auto add_to = [&](int32_t* place, __m256i values) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), _mm256_add_epi32(load(place), values));
    };
    if constexpr (BITS == 4) {
        const __m256i low_bits = _mm256_set1_epi8(15);
        for (int64_t begin = 0; begin < lines; begin += flush) {
            const int64_t end = std::min(begin + flush, lines);
            __m256i total[V][2];
            for (int v = 0; v < V; ++v) total[v][0] = total[v][1] = _mm256_setzero_si256();
            for (int64_t i = begin; i < end; ++i, from += LINE, x += V * STEP) {
                __m256i own[2];
                if constexpr (PANEL) {
                    own[0] = load(from);
                    own[1] = load(from + 32);
                } else {
                    const __m256i both = load(from);
                    own[0] = _mm256_and_si256(both, low_bits);
                    own[1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_bits);
                    if (i % 2 == 0) prefetch(from + AHEAD_BYTES, 64);
                }
#pragma GCC unroll 6
                for (int v = 0; v < V; ++v) {
                    int16_t two;
                    std::memcpy(&two, x + v * STEP, sizeof two);
                    const __m256i codes = _mm256_set1_epi16(two);
                    total[v][0] = _mm256_add_epi16(total[v][0], _mm256_maddubs_epi16(own[0], codes));
                    total[v][1] = _mm256_add_epi16(total[v][1], _mm256_maddubs_epi16(own[1], codes));
                }
            }
            for (int v = 0; v < V; ++v)
                for (int h = 0; h < 2; ++h) {
                    add_to(sums[v] + h * HALF, _mm256_cvtepi16_epi32(_mm256_castsi256_si128(total[v][h])));
                    add_to(sums[v] + h * HALF + 8, _mm256_cvtepi16_epi32(_mm256_extracti128_si256(total[v][h], 1)));
                }
        }
    } else {
        __m256i total[V][4];
        for (int v = 0; v < V; ++v)
            for (int q = 0; q < 4; ++q) total[v][q] = load(sums[v] + q * 8);
        for (int64_t i = 0; i < lines; ++i, from += LINE, x += V * STEP) {
            if (!PANEL) prefetch(from + AHEAD_BYTES, LINE);
            __m256i codes[V];
            for (int v = 0; v < V; ++v) {
                int32_t two;
                std::memcpy(&two, x + v * STEP, sizeof two);
                codes[v] = _mm256_set1_epi32(two);
            }
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q) {
                const __m256i own = PANEL ? load(from + q * 32)
                                          : _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + q * 16)));
#pragma GCC unroll 6
                for (int v = 0; v < V; ++v) total[v][q] = _mm256_add_epi32(total[v][q], _mm256_madd_epi16(own, codes[v]));
            }
        }
        for (int v = 0; v < V; ++v)
            for (int q = 0; q < 4; ++q) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums[v] + q * 8), total[v][q]);
    }
#else
    for (int64_t i = 0; i < lines; ++i, from += LINE, x += V * STEP) {
        int16_t own[TILE_ROWS * STEP];
        for (int64_t place = 0; place < TILE_ROWS * STEP; ++place) {
            if (PANEL) own[place] = reinterpret_cast<const typename Codes<BITS>::Weight*>(from)[place];
            else if (BITS == 8) own[place] = static_cast<int8_t>(from[place]);
            else own[place] = from[place % (HALF * STEP)] >> (place < HALF * STEP ? 0 : 4) & 15;
        }
        for (int v = 0; v < V; ++v)
            for (int64_t row = 0; row < TILE_ROWS; ++row)
                for (int64_t s = 0; s < STEP; ++s) sums[v][row] += own[row * STEP + s] * x[v * STEP + s];
    }
#endif
}

}  // namespace sparsify
