// Rows of sparse weights: one bit for each weight that says whether it is stored, and the stored ones one after another.
//
// A matrix begins with the places of its rows in bytes, int64 [rows]. A row begins with the places of its chunks of PACKED_CHUNK columns,
// uint32 each, counted from the row. A chunk has 64 bits for each group of 64 columns, the scales of its blocks of 32 (bf16; of int8
// and int4), and its values: bf16, int8, or int4 of which each group begins with a whole byte and 8 is added.
// Rows are padded with zeros to whole groups. They are unpacked into rows of a dense format, in a buffer that stays in the cache, and
// read by the kernels of that format. Mirrors sparsify/runtime/packed.py.
#pragma once

#include "block_sums.h"

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)
#define SPARSIFY_EXPAND 1
#endif

namespace sparsify {

constexpr int64_t PACKED_CHUNK = 512, GROUP = 64;
constexpr int64_t BEYOND = 64;  // bytes that may be read behind the last value

inline int64_t ones(uint64_t bits) { return __builtin_popcountll(bits); }

#if !defined(SPARSIFY_EXPAND) && defined(__SSSE3__)
// For each eight bits, where the stored values go that they name: bytes for a shuffle; 0x80 makes a zero.
template <int BYTES>
struct Places {
    alignas(64) uint8_t of[256][8 * BYTES];
    constexpr Places() : of() {
        for (int bits = 0; bits < 256; ++bits) {
            int from = 0;
            for (int i = 0; i < 8; ++i)
                for (int byte = 0; byte < BYTES; ++byte)
                    of[bits][i * BYTES + byte] = static_cast<uint8_t>(bits >> i & 1 ? BYTES * from + byte : 0x80), from += byte == BYTES - 1 && bits >> i & 1;
        }
    }
};
#endif

// 64 bf16 of which `stored` has those that the bits name; returns the place behind them.
inline const uint8_t* unpack_bf16(uint64_t bits, const uint8_t* stored, uint16_t* to) {
#if defined(SPARSIFY_EXPAND)
    const __mmask32 low = static_cast<__mmask32>(bits), high = static_cast<__mmask32>(bits >> 32);
    _mm512_storeu_si512(to, _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(stored)));
    stored += 2 * ones(low);
    _mm512_storeu_si512(to + 32, _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(stored)));
    return stored + 2 * ones(high);
#elif defined(__SSSE3__)
    static constexpr Places<2> PLACES;
    for (int i = 0; i < 64; i += 8) {
        const uint64_t eight = bits >> i & 255;
        const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(stored));
        const __m128i places = _mm_load_si128(reinterpret_cast<const __m128i*>(PLACES.of[eight]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm_shuffle_epi8(values, places));
        stored += 2 * ones(eight);
    }
    return stored;
#else
    for (int i = 0; i < 64; ++i) {
        const bool is_stored = bits >> i & 1;
        uint16_t value;
        std::memcpy(&value, stored, sizeof value);
        to[i] = is_stored ? value : 0;
        stored += 2 * is_stored;
    }
    return stored;
#endif
}

// 64 bytes of which `stored` has those that the bits name.
inline void unpack_bytes(uint64_t bits, const uint8_t* stored, uint8_t* to) {
#if defined(SPARSIFY_EXPAND)
    _mm512_storeu_si512(to, _mm512_maskz_expand_epi8(bits, _mm512_loadu_si512(stored)));
#elif defined(__SSSE3__)
    static constexpr Places<1> PLACES;
    for (int i = 0; i < 64; i += 8) {
        const uint64_t eight = bits >> i & 255;
        const __m128i values = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(stored));
        const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(PLACES.of[eight]));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + i), _mm_shuffle_epi8(values, places));
        stored += ones(eight);
    }
#else
    for (int i = 0; i < 64; ++i) {
        const bool is_stored = bits >> i & 1;
        to[i] = is_stored ? *stored : 0;
        stored += is_stored;
    }
#endif
}

// 64 bytes from 32, the low four bits of each first, less 8.
inline void widen_int4(const uint8_t* from, uint8_t* to) {
#if defined(__AVX512BW__)
    const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    const __m512i both = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15));
    _mm512_storeu_si512(to, _mm512_sub_epi8(both, _mm512_set1_epi8(8)));
#else
    for (int i = 0; i < 32; ++i) {
        to[2 * i] = static_cast<uint8_t>((from[i] & 15) - 8);
        to[2 * i + 1] = static_cast<uint8_t>((from[i] >> 4) - 8);
    }
#endif
}

// A packed format, whose rows are unpacked into those of DENSE.
template <class DENSE, int VALUE_BITS>
struct Packed {
    using Dense = DENSE;
    using Stored = uint8_t;
    static constexpr bool IS_PACKED = true;
    static constexpr int BITS = DENSE::BITS, VECTORS = static_cast<int>(GROUP / LANES);
    static constexpr bool HAS_SCALES = VALUE_BITS != 16;
    static int64_t width(int64_t hidden) { return (hidden + GROUP - 1) / GROUP * GROUP; }
    static void ask(const Stored*, int64_t, int64_t, int64_t) {}

    static const uint8_t* row(const void* matrix, int64_t n) {
        int64_t place;
        std::memcpy(&place, static_cast<const uint8_t*>(matrix) + n * sizeof place, sizeof place);
        return static_cast<const uint8_t*>(matrix) + place;
    }

    // Unpacks the columns from `begin` on, a multiple of GROUP, of a row of `width` into the same columns of a row of DENSE. While that
    // is done, the same bytes of the next row are prefetched.
    static void unpack(const uint8_t* row, const uint8_t* next, int64_t width, int64_t begin, int64_t end, typename DENSE::Stored* to) {
        for (int64_t column = begin; column < end;) {
            const int64_t chunk = column / PACKED_CHUNK, first = chunk * PACKED_CHUNK, last = std::min(width, first + PACKED_CHUNK);
            uint32_t place;
            std::memcpy(&place, row + chunk * sizeof place, sizeof place);
            const uint8_t *bits = row + place, *scales = bits + (last - first) / 8;
            const uint8_t* stored = scales + (HAS_SCALES ? (last - first) / 32 * 2 : 0);
            if constexpr (HAS_SCALES) std::memcpy(to + width + first / 32 * 2, scales, (last - first) / 32 * 2);
            for (int64_t at = first; at < std::min(last, end); at += GROUP) {
                uint64_t own;
                std::memcpy(&own, bits + (at - first) / 8, sizeof own);
                const int64_t count = ones(own);
                if (at < column) {  // in front of a part that begins within a chunk
                    stored += VALUE_BITS == 4 ? (count + 1) / 2 : count * VALUE_BITS / 8;
                    continue;
                }
                if ((at & (1024 / (VALUE_BITS == 16 ? 16 : 8) - 1)) == 0) prefetch(next + (stored - row), 64);
                if constexpr (VALUE_BITS == 16) {
                    stored = unpack_bf16(own, stored, to + at);
                } else if constexpr (VALUE_BITS == 8) {
                    unpack_bytes(own, stored, to + at);
                    stored += count;
                } else {
                    alignas(64) uint8_t levels[64];
                    widen_int4(stored, levels);
                    unpack_bytes(own, levels, to + at);
                    stored += (count + 1) / 2;
                }
            }
            column = last;
        }
    }
};
using PackedBf16 = Packed<Bf16, 16>;
using PackedInt8 = Packed<Int8Blocks, 8>;
using PackedInt4 = Packed<Int8Blocks, 4>;

#if defined(SPARSIFY_EXPAND)

// Of 32 bf16, those at even places and those at odd ones, as fp32.
inline __m512 even(__m512i weights) { return _mm512_castsi512_ps(_mm512_slli_epi32(weights, 16)); }
inline __m512 odd(__m512i weights) {
    return _mm512_castsi512_ps(_mm512_and_si512(weights, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}

// The next 32 weights of a row; moves behind their stored values.
inline __m512i expand(uint32_t bits, const uint8_t*& stored) {
    const __m512i weights = _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(stored));
    stored += 2 * __builtin_popcount(bits);
    return weights;
}

// Sorts each 32 values into those at even places and those at odd ones, as the products below read them; `width` is a multiple of 32.
inline void sort_places(float* values, int64_t width) {
    float odd[16];
    for (int64_t at = 0; at < width; at += 32) {
        for (int i = 0; i < 16; ++i) {
            odd[i] = values[at + 2 * i + 1];
            values[at + i] = values[at + 2 * i];
        }
        std::copy(odd, odd + 16, values + at + 16);
    }
}
inline void unsort_places(float* values, int64_t width) {
    float sorted[32];
    for (int64_t at = 0; at < width; at += 32) {
        std::copy(values + at, values + at + 32, sorted);
        for (int i = 0; i < 16; ++i) {
            values[at + 2 * i] = sorted[i];
            values[at + 2 * i + 1] = sorted[16 + i];
        }
    }
}

// How products with packed bf16 read 32 values, and the sums of their products.
#if defined(__AVX512BF16__)
using Places32 = __m512i;  // as bf16, which they are: what multiplies bf16 weights is rounded to it
inline void prepare_places(float* values, int64_t count) {
    auto* narrow = reinterpret_cast<uint8_t*>(values);
    for (int64_t i = 0; i < count; ++i) {
        const uint16_t one = float_to_bf16(values[i]);
        std::memcpy(narrow + 2 * i, &one, sizeof one);
    }
}
inline Places32 load_places(const float* values, int64_t at) { return _mm512_loadu_si512(reinterpret_cast<const uint8_t*>(values) + 2 * at); }
inline void add_products(__m512i weights, Places32 x, __m512* total, int sums) {
    total[0] = _mm512_dpbf16_ps(total[0], reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(x));
}
#else
struct Places32 {
    __m512 even, odd;
};
inline void prepare_places(float* values, int64_t count) { sort_places(values, count); }
inline Places32 load_places(const float* values, int64_t at) { return {_mm512_loadu_ps(values + at), _mm512_loadu_ps(values + at + 16)}; }
inline void add_products(__m512i weights, Places32 x, __m512* total, int sums) {
    total[0] = _mm512_fmadd_ps(even(weights), x.even, total[0]);
    total[sums - 1] = _mm512_fmadd_ps(odd(weights), x.odd, total[sums - 1]);
}
#endif

// As `dot` in rows.h, for packed bf16 and prepared values.
template <int R, int B, int TOKENS>
void dot_expanded(const uint8_t* const* rows, const uint8_t* const* next, const float* x, int64_t width, float (*out)[TOKENS]) {
    constexpr int SUMS = R * B <= 8 ? 2 : 1;
    __m512 total[R][B][SUMS];
    const uint8_t* stored[R];
    for (int r = 0; r < R; ++r) {
        stored[r] = rows[r] + (width + PACKED_CHUNK - 1) / PACKED_CHUNK * 4;
        for (int b = 0; b < B; ++b)
            for (int k = 0; k < SUMS; ++k) total[r][b][k] = _mm512_setzero_ps();
    }
    for (int64_t first = 0; first < width; first += PACKED_CHUNK) {
        const int64_t groups = std::min(PACKED_CHUNK, width - first) / GROUP;
        const uint8_t* bits[R];
        for (int r = 0; r < R; ++r) {
            bits[r] = stored[r];
            stored[r] += groups * 8;
        }
        for (int64_t g = 0; g < groups; ++g) {
            for (int r = 0; r < R; ++r) prefetch(next[r] + (stored[r] - rows[r]), 64);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const int64_t place = first + g * GROUP + half * 32;
                __m512i weights[R];
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    uint32_t own;
                    std::memcpy(&own, bits[r] + g * 8 + half * 4, sizeof own);
                    weights[r] = expand(own, stored[r]);
                }
#pragma GCC unroll 8
                for (int b = 0; b < B; ++b) {
                    const Places32 values = load_places(x, b * width + place);
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) add_products(weights[r], values, total[r][b], SUMS);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b)
            out[r][b] = _mm512_reduce_add_ps(SUMS == 2 ? _mm512_add_ps(total[r][b][0], total[r][b][SUMS - 1]) : total[r][b][0]);
}

// Adds factors[r][b] times the columns of R rows to sorted sums [B, width], from `begin` on.
template <int R, int B>
void add_expanded(const uint8_t* const* rows, const uint8_t* const* next, const float (*factors)[B], float* sums, int64_t width,
                  int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end;) {
        const int64_t chunk = column / PACKED_CHUNK, first = chunk * PACKED_CHUNK, last = std::min(width, first + PACKED_CHUNK);
        const uint8_t *bits[R], *stored[R];
        for (int r = 0; r < R; ++r) {
            uint32_t place;
            std::memcpy(&place, rows[r] + chunk * sizeof place, sizeof place);
            bits[r] = rows[r] + place;
            stored[r] = bits[r] + (last - first) / 8;
            for (int64_t at = first; at < column; at += GROUP) {  // in front of a part that begins within a chunk
                uint64_t own;
                std::memcpy(&own, bits[r] + (at - first) / 8, sizeof own);
                stored[r] += 2 * ones(own);
            }
        }
        for (int64_t at = column; at < std::min(last, end); at += 32) {
            if ((at & 32) == 0)
                for (int r = 0; r < R; ++r) prefetch(next[r] + (stored[r] - rows[r]), 64);
            __m512i weights[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                uint32_t own;
                std::memcpy(&own, bits[r] + (at - first) / 8, sizeof own);
                weights[r] = expand(own, stored[r]);
            }
#pragma GCC unroll 8
            for (int b = 0; b < B; ++b) {
                float* place = sums + b * width + at;
                __m512 low = _mm512_loadu_ps(place), high = _mm512_loadu_ps(place + 16);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const __m512 factor = _mm512_set1_ps(factors[r][b]);
                    low = _mm512_fmadd_ps(even(weights[r]), factor, low);
                    high = _mm512_fmadd_ps(odd(weights[r]), factor, high);
                }
                _mm512_storeu_ps(place, low);
                _mm512_storeu_ps(place + 16, high);
            }
        }
        column = last;
    }
}

#endif

template <class T, class = void>
struct IsPacked : std::false_type {};
template <class T>
struct IsPacked<T, std::void_t<decltype(T::IS_PACKED)>> : std::true_type {};

// Room for so many unpacked rows of a thread, each of so many elements; it stays in the cache between calls.
template <class T>
typename T::Stored* unpacked_rows(int64_t elements) {
    static thread_local std::vector<typename T::Stored> room;
    if (static_cast<int64_t>(room.size()) < elements) room.resize(elements);
    return room.data();
}

// Elements of a row of a dense format, in units of its Stored.
template <class D>
int64_t dense_elements(int64_t width) {
    return D::BITS == 0 ? width : width * D::BITS / 8 + width / 32 * 2;
}

}  // namespace sparsify
