// Hidden states rounded for products with weights in blocks: whole numbers from -127 to 127 and one scale for every 32 elements.
//
// Processors whose instructions multiply bytes add up a block's products exactly as whole numbers (level_dots.h); elsewhere the
// rounded values are multiplied in fp32, which gives the same up to the rounding of the sums. Mirrors rounded_states in
// sparsify/runtime/quantised.py.
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

constexpr int64_t LEVEL_GROUP = 64;  // elements that one instruction takes: two blocks

constexpr int64_t LEVEL_SUMS =
#if SPARSIFY_LEVELS == 256
    8;  // of a group: of four bytes each, and in int4 also of the four that are 32 after them
#else
    16;  // of a group: of four bytes each
#endif

struct LevelGroup {
    int8_t bytes[LEVEL_GROUP];   // in the order in which the format unpacks its weights
    int32_t starts[LEVEL_SUMS];  // minus the weights' offset times the sum of the bytes of each sum
    float scales[LEVEL_SUMS];    // those of the blocks: of each sum, or with eight sums of the first block, then of the second
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
            for (int64_t g = 0; g < groups; ++g)
                round_group(values + t * width + g * LEVEL_GROUP, std::min<int64_t>(2, width / 32 - g * 2), bits, all[g * tokens + t]);
    }

private:
    static void round_group(float* group, int64_t blocks, int bits, LevelGroup& to) {
        int8_t level[64] = {};
        float own[2] = {0.0f, 0.0f};
        for (int64_t block = 0; block < blocks; ++block) {
            float* x = group + block * 32;
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
        std::fill(to.starts, to.starts + LEVEL_SUMS, 0);
        for (int quarter = 0; quarter < 4; ++quarter) {
            const int from = halves ? (quarter & 1) * 32 + (quarter >> 1) * 16 : quarter * 16;
            std::copy(level + from, level + from + 16, to.bytes + quarter * 16);
            for (int i = 0; i < 4; ++i) {
                const int8_t* four = level + from + i * 4;
                const int64_t sum = (quarter * 4 + i) % LEVEL_SUMS;
                to.starts[sum] -= (halves ? 8 : 128) * (four[0] + four[1] + four[2] + four[3]);
                to.scales[sum] = own[LEVEL_SUMS == 16 ? from >> 5 : sum >> 2];
            }
        }
    }
};

}  // namespace sparsify
