// Sixteen fp32 values at a time, and rows of weights that are read as such.
//
// All code that depends on the instruction set is here: AVX-512, AVX2, and plain loops of sixteen that compilers vectorise for
// other processors (e.g. NEON). No -ffast-math: NaN and the order of sums matter.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

// For functions that are called from many places and run for much longer than a call takes: compiling each copy takes seconds.
#if defined(__GNUC__)
#define SPARSIFY_OUT_OF_LINE __attribute__((noinline))
#else
#define SPARSIFY_OUT_OF_LINE
#endif

namespace sparsify {

constexpr int64_t LANES = 16;

#if defined(__AVX512F__)

struct Lanes {
    __m512 v;
};
inline Lanes zeros() { return {_mm512_setzero_ps()}; }
inline Lanes broadcast(float a) { return {_mm512_set1_ps(a)}; }
inline Lanes load_f32(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes multiply(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float sum(Lanes a) { return _mm512_reduce_add_ps(a.v); }
// In a register: a compiler may load it again for each use, and a processor loads only one such vector at a time.
inline void keep(Lanes& a) { __asm__("" : "+v"(a.v)); }
inline Lanes load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Lanes load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Lanes {
    __m256 low, high;
};
inline Lanes zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline Lanes load_f32(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Lanes a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}
inline Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Lanes multiply(Lanes a, Lanes b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline void keep(Lanes&) {}
inline float sum(Lanes a) {
    const __m256 eight = _mm256_add_ps(a.low, a.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline __m256 widen_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Lanes load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
inline Lanes load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}

#else
#define SPARSIFY_PLAIN_LANES 1
#endif

// ---- scalars: ends of rows, and everything on machines without the above ----

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }
inline float f16_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    if (rest >= 0x0400u) return bits_to_float(sign | ((rest << 13) + 0x38000000u));
    const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;  // subnormal: multiples of 2^-24
    return sign ? -small : small;
}
inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = float_to_bits(value);
    if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline uint16_t float_to_f16(float value) {
    const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u;
    const uint32_t size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
    if (size < 0x38800000u) {                                              // subnormal: let the adder round
        const float rounded = bits_to_float(size) + 0.5f;
        return static_cast<uint16_t>(sign | (float_to_bits(rounded) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13));
}

#if defined(SPARSIFY_PLAIN_LANES)

struct Lanes {
    float v[LANES];
};
template <class F>
inline Lanes each(F f) {
    Lanes r;
    for (int i = 0; i < LANES; ++i) r.v[i] = f(i);
    return r;
}
inline Lanes zeros() { return each([](int) { return 0.0f; }); }
inline Lanes broadcast(float a) { return each([=](int) { return a; }); }
inline Lanes load_f32(const float* p) { return each([=](int i) { return p[i]; }); }
inline void store(float* p, Lanes a) { std::memcpy(p, a.v, sizeof a.v); }
inline Lanes add(const Lanes& a, const Lanes& b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Lanes multiply(const Lanes& a, const Lanes& b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline void keep(Lanes&) {}
inline float sum(const Lanes& a) {
    float r[LANES];
    std::memcpy(r, a.v, sizeof r);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) r[i] += r[i + width];
    return r[0];
}
inline Lanes load_bf16(const uint16_t* p) { return each([=](int i) { return bf16_to_float(p[i]); }); }
inline Lanes load_f16(const uint16_t* p) { return each([=](int i) { return f16_to_float(p[i]); }); }

#endif

// ---- prefetching ----

// Into L2, not L1: several rows ahead of the current ones are more than a small L1 holds together with them.
inline void prefetch(const void* data, int64_t bytes) {
#if defined(__GNUC__)
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(data) + i, 0, 2);
#endif
}

constexpr int64_t AHEAD_BYTES = 16384;  // read between a row's prefetch and its use: less takes less time than memory's latency

// ---- formats of weights and of hidden states ----

// Mirrors sparsify/runtime/native_ffn.py.
struct Matrix {
    const void* data;
    int64_t row_stride;    // in elements, or in bytes of blocks
    const int32_t* slots;  // row n is at place slots[n]; null where it is at place n
    const float* factors;  // of its columns: sums of rows are multiplied by them; null for 1
    int64_t place(int64_t n) const { return slots ? slots[n] : n; }
};

// Interface of a format: VECTORS are read together, aligned to as many vectors; a row of `hidden` elements is stored as
// width(hidden) elements; lanes(row, i, k, width) is vector k after element i; ask() prefetches `count` elements; at() and from()
// convert one element; value_bytes() is the size of so many elements without scales. BITS is that of a weight in blocks, 0 for stored
// weights.
template <class T>
struct Plain {
    static constexpr int VECTORS = 1, BITS = 0;
    static int64_t value_bytes(int64_t count) { return count * static_cast<int64_t>(sizeof(T)); }
    static int64_t width(int64_t hidden) { return hidden; }
    static void ask(const T* row, int64_t i, int64_t count, int64_t) { prefetch(row + i, count * sizeof(T)); }
};
struct F32 : Plain<float> {
    using Stored = float;
    static Lanes lanes(const Stored* row, int64_t i, int k, int64_t) { return load_f32(row + i + k * LANES); }
    static float at(const Stored* row, int64_t i) { return row[i]; }
    static Stored from(float value) { return value; }
};
struct Bf16 : Plain<uint16_t> {
    using Stored = uint16_t;
    static Lanes lanes(const Stored* row, int64_t i, int k, int64_t) { return load_bf16(row + i + k * LANES); }
    static float at(const Stored* row, int64_t i) { return bf16_to_float(row[i]); }
    static Stored from(float value) { return float_to_bf16(value); }
};
struct F16 : Plain<uint16_t> {
    using Stored = uint16_t;
    static Lanes lanes(const Stored* row, int64_t i, int k, int64_t) { return load_f16(row + i + k * LANES); }
    static float at(const Stored* row, int64_t i) { return f16_to_float(row[i]); }
    static Stored from(float value) { return float_to_f16(value); }
};

// A value as a dtype holds it.
template <class X>
float rounded(float value) {
    const typename X::Stored stored = X::from(value);
    return X::at(&stored, 0);
}

}  // namespace sparsify
