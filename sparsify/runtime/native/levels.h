// Hidden states rounded for products with weights in blocks: whole numbers from -127 to 127 and one scale for every 32 elements.
//
// Processors whose instructions multiply bytes add up a block's products exactly as whole numbers (level_dots.h); elsewhere the
// rounded values are multiplied in fp32, which gives the same up to the rounding of the sums. Mirrors rounded_states in
// sparsify/models/quantised.py.
#pragma once

#include "lanes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

// The width in bits of vectors whose bytes are multiplied as whole numbers.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define SPARSIFY_LEVELS 512
#elif defined(__AVX2__) && defined(__FMA__)
#define SPARSIFY_LEVELS 256
#endif

namespace sparsify {

constexpr int64_t LEVEL_SUMS =
#if SPARSIFY_LEVELS == 256
    8;  // in a vector: of four bytes each
#else
    16;  // in a vector: of four bytes each
#endif
constexpr int64_t LEVEL_VECTOR = 4 * LEVEL_SUMS, LEVEL_GROUP = 2 * LEVEL_VECTOR, GROUP_BLOCKS = LEVEL_GROUP / 32;

// The states of a group of blocks, two vectors of bytes. int8 weights are unpacked in order, and each vector has its own sums; int4
// weights are unpacked into the first halves of all blocks, then their second halves, which are added to the same sums.
struct alignas(64) LevelGroup {
    int8_t bytes[LEVEL_GROUP];
    int32_t starts[2 * LEVEL_SUMS];  // minus the weights' offset times the sum of the bytes of each sum
    float scales[2 * LEVEL_SUMS];    // that of each sum's block
};

struct Levels {
    std::vector<LevelGroup> all;  // [groups, tokens]
    int64_t tokens = 0;

    const LevelGroup* of(int64_t group, int64_t token = 0) const { return all.data() + group * tokens + token; }

    // Rounds values [tokens, width] to multiples of their block's scale. A block with a value that is not finite becomes NaN.
    void round(float* values, int count, int64_t width, int bits) {
        tokens = count;
        const int64_t groups = (width + LEVEL_GROUP - 1) / LEVEL_GROUP;
        all.resize(groups * tokens);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t blocks = std::min(GROUP_BLOCKS, width / 32 - g * GROUP_BLOCKS);
                round_group(values + t * width + g * LEVEL_GROUP, blocks, bits, all[g * tokens + t]);
            }
    }

private:
    static void round_group(float* group, int64_t blocks, int bits, LevelGroup& to) {
        to = LevelGroup();
        for (int64_t block = 0; block < blocks; ++block) {
            int8_t level[32] = {};
            const float scale = round_block(group + block * 32, level);
            for (int64_t four = 0; four < 8; ++four) {
                const int8_t* from = level + four * 4;
                const int64_t half = four / 4, in_order = block * 8 + four, in_halves = block * 4 + four % 4;
                const int64_t sum = bits == 4 ? in_halves : in_order;
                std::copy(from, from + 4, to.bytes + 4 * (bits == 4 ? half * LEVEL_SUMS + in_halves : in_order));
                to.starts[sum] -= (bits == 4 ? 8 : 128) * (from[0] + from[1] + from[2] + from[3]);
                to.scales[sum] = scale;
            }
        }
    }

    // Rounds 32 values and returns their scale.
    static float round_block(float* x, int8_t* level) {
        uint32_t size = 0;  // compilers vectorise it: bits without sign compare as sizes do, and what is not finite is the largest
        for (int i = 0; i < 32; ++i) size = std::max(size, float_to_bits(x[i]) & 0x7fffffffu);
        const float largest = bits_to_float(size);
        if (size >= 0x7f800000u) {
            std::fill(x, x + 32, std::numeric_limits<float>::quiet_NaN());
            return x[0];
        }
        const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f, scale = largest / 127.0f;
        for (int i = 0; i < 32; ++i) {
            const float rounded = std::nearbyint(std::min(127.0f, std::max(-127.0f, x[i] * inverse)));
            level[i] = static_cast<int8_t>(rounded);
            x[i] = rounded * scale;
        }
        return scale;
    }
};

}  // namespace sparsify
