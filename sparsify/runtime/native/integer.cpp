// Linear layers of whole numbers: what a quantised projection multiplies, for one token or many.
//
// A token's activations are rounded to codes times one step, codes are multiplied with those of the weights as whole numbers
// (integers.h), and sums are multiplied by the step and by the scale of their row. With smoothing (arXiv 2409.20361), columns are divided by their
// largest activation first: those of similar size, `smooth_group` of them in the order of size, by the largest of all. Many tokens read
// the weights in that order, so that each group has one factor. One token, and activations that are not rounded, are multiplied as
// numbers of three digits instead, 21 bits, of which every digit is a vector of codes.
#include "integers.h"
#include "threads.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

namespace sparsify {

// Mirrors sparsify/runtime/integer_products.py.
struct IntegerCall {
    const float* x;         // [tokens, inputs]
    const uint8_t* tiles;   // as sparsify_integer_pack packs them
    const float* scales;    // [outputs]
    float* out;             // [tokens, outputs]
    int64_t tokens, inputs, outputs;
    int64_t smooth_group;   // columns that share their maximum; 0 without smoothing
    int32_t weight_bits;    // 4 or 8
    int32_t activation_bits;  // 2 to 8, or 16: they are not rounded
    int32_t threads;
    int32_t apart;          // whether each token is smoothed by itself, not all together
};

namespace {

constexpr float LEAST_MAXIMUM = 1e-5f;
constexpr int DIGITS = 3, BASE_BITS = 7, LARGEST_DIGIT = 64;
constexpr float LARGEST_NUMBER = 63 * 16384 + 63 * 128 + 63;
constexpr int64_t PANEL_COLUMNS = 128, DIRECT_BLOCKS = 2;

int64_t lines_of(int64_t columns) { return (columns + STEP - 1) / STEP; }

// Columns, in the order in which they are read, whose sums have one factor.
struct Chunk {
    int64_t begin, end, first_line;
    float factor;
    int64_t lines() const { return lines_of(end - begin); }
};

// Vectors of codes that are multiplied together.
struct Block {
    int64_t first;
    int count;
};

// Columns by the size of their activations, and what each is divided by, in that order.
struct Smoothing {
    std::vector<int32_t> order, other_order;
    std::vector<float> divisors;
    std::vector<uint32_t> keys, other_keys;
};

// What all threads read.
struct Plan {
    Smoothing smoothing;  // of all tokens together; otherwise without divisors, and in order
    std::vector<Chunk> chunks;
    std::vector<Block> blocks;
    int64_t vectors, places;  // of tokens, and with what fills the last block
    int64_t flush;
    bool in_digits, is_sorted, in_panels, is_lost;  // lost: a number that is not finite is part of every output
    std::vector<int8_t> bytes;
    std::vector<int16_t> words;
    std::vector<int32_t> starts;  // [chunks, places]: what the weights' offset adds to sums, negated
    std::vector<float> factors;   // [places]

    template <class Code>
    Code* codes() {
        if constexpr (sizeof(Code) == 1) return bytes.data();
        else return words.data();
    }
};

void in_order(int64_t count, std::vector<int32_t>& order) {
    order.resize(count);
    std::iota(order.begin(), order.end(), 0);
}

// Descending and stable: columns of the same size stay in their order.
void sort_columns(const std::vector<float>& sizes, Smoothing& to) {
    constexpr int PASS_BITS = 11, PASSES = 3;
    const int64_t count = static_cast<int64_t>(sizes.size());
    in_order(count, to.order);
    to.keys.resize(count), to.other_keys.resize(count), to.other_order.resize(count);
    for (int64_t i = 0; i < count; ++i) to.keys[i] = ~float_to_bits(sizes[i]);
    for (int pass = 0; pass < PASSES; ++pass) {
        int64_t places[1 << PASS_BITS] = {};
        const auto part = [&](uint32_t key) { return key >> (pass * PASS_BITS) & ((1u << PASS_BITS) - 1); };
        for (const uint32_t key : to.keys) ++places[part(key)];
        int64_t next = 0;
        for (int64_t& place : places) next += std::exchange(place, next);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t place = places[part(to.keys[i])]++;
            to.other_keys[place] = to.keys[i], to.other_order[place] = to.order[i];
        }
        to.keys.swap(to.other_keys), to.order.swap(to.other_order);
    }
}

// The largest of sizes that are compared as whole numbers, so that what is not finite is the largest.
float largest_size(const float* values, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, float_to_bits(values[i]) & 0x7fffffffu);
    return bits_to_float(largest);
}

bool is_finite(float size) { return float_to_bits(size) < 0x7f800000u; }

// Sorts the columns of x [tokens, inputs] and shares maxima; returns whether all of it is finite.
bool smooth(const float* x, int64_t tokens, int64_t inputs, int64_t group, Smoothing& to) {
    std::vector<float> sizes(inputs, 0.0f);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < inputs; ++i)
            sizes[i] = bits_to_float(std::max(float_to_bits(sizes[i]), float_to_bits(x[t * inputs + i]) & 0x7fffffffu));
    const bool finite = is_finite(largest_size(sizes.data(), inputs));
    for (float& one : sizes) one = std::max(one, LEAST_MAXIMUM);
    sort_columns(sizes, to);
    to.divisors.resize(inputs);
    for (int64_t i = 0; i < inputs; ++i) to.divisors[i] = sizes[to.order[i / group * group]];
    return finite;
}

template <int BITS>
void make_plan(const IntegerCall& call, Plan& plan) {
    const bool rounds = call.activation_bits < 16, smooths = rounds && call.smooth_group > 0;
    plan.is_sorted = smooths && !call.apart && call.tokens > 1;
    plan.in_digits = !rounds || (smooths && !plan.is_sorted);
    plan.is_lost = plan.is_sorted && !smooth(call.x, call.tokens, call.inputs, call.smooth_group, plan.smoothing);
    if (!plan.is_sorted) {
        in_order(call.inputs, plan.smoothing.order);
        plan.smoothing.divisors.clear();
    }
    plan.vectors = call.tokens * (plan.in_digits ? DIGITS : 1);
    plan.blocks.clear();
    for (plan.places = 0; plan.places < plan.vectors;) {
        const int64_t left = plan.vectors - plan.places;
        int count = Codes<BITS>::VECTORS;
        while (count > 3 && count / 2 >= left) count /= 2;
        plan.blocks.push_back({plan.places, static_cast<int>(std::min<int64_t>(count, count == 3 ? left : count))});
        plan.places += plan.blocks.back().count;
    }
    plan.in_panels = plan.is_sorted || static_cast<int64_t>(plan.blocks.size()) > DIRECT_BLOCKS;
    plan.flush = lines_in_16_bits(plan.in_digits ? LARGEST_DIGIT : (1 << (call.activation_bits - 1)) - 1);
    const int64_t most = plan.in_panels ? PANEL_COLUMNS : MOST_COLUMNS, group = plan.is_sorted ? call.smooth_group : call.inputs;
    plan.chunks.clear();
    int64_t line = 0;
    for (int64_t first = 0; first < call.inputs; first += group)
        for (int64_t begin = first, end = std::min(first + group, call.inputs); begin < end; begin += most) {
            plan.chunks.push_back({begin, std::min(begin + most, end), line, plan.is_sorted ? plan.smoothing.divisors[first] : 1.0f});
            line += plan.chunks.back().lines();
        }
    if constexpr (sizeof(typename Codes<BITS>::Activation) == 1) plan.bytes.assign(line * STEP * plan.places, 0);
    else plan.words.assign(line * STEP * plan.places, 0);
    plan.starts.assign(plan.chunks.size() * plan.places, 0);
    plan.factors.assign(plan.places, 0.0f);
}

// Writes one vector, codes [inputs] in the order of the columns as they are read.
template <int BITS>
void put_vector(const int8_t* codes, int64_t vector, Plan& plan) {
    using Code = typename Codes<BITS>::Activation;
    size_t number = 0;
    while (number + 1 < plan.blocks.size() && plan.blocks[number + 1].first <= vector) ++number;
    const Block block = plan.blocks[number];
    for (size_t c = 0; c < plan.chunks.size(); ++c) {
        const Chunk& chunk = plan.chunks[c];
        Code* to = plan.codes<Code>() + STEP * (chunk.first_line * plan.places + chunk.lines() * block.first + (vector - block.first));
        int32_t total = 0;
        for (int64_t i = chunk.begin; i < chunk.end; i += STEP, to += block.count * STEP)
            for (int64_t s = 0; s < std::min(STEP, chunk.end - i); ++s) to[s] = codes[i + s], total += codes[i + s];
        plan.starts[c * plan.places + vector] = -Codes<BITS>::OFFSET * total;
    }
}

// What a thread needs to round a token.
struct Rounding {
    std::vector<float> values, in_place;
    std::vector<int32_t> numbers;
    std::vector<int8_t> codes;
    Smoothing smoothing;
};

template <int BITS>
void round_token(const IntegerCall& call, int64_t token, Plan& plan, Rounding& own) {
    const int64_t inputs = call.inputs, digits = plan.in_digits ? DIGITS : 1, vector = token * digits;
    const float* x = call.x + token * inputs;
    std::vector<float>& values = own.values;
    std::vector<int8_t>& codes = own.codes;
    values.assign(x, x + inputs), codes.resize(inputs);
    const bool rounds = call.activation_bits < 16, smooths = rounds && call.smooth_group > 0;
    const Smoothing& smoothing = plan.is_sorted ? plan.smoothing : own.smoothing;
    if (smooths && !plan.is_sorted) smooth(x, 1, inputs, call.smooth_group, own.smoothing);
    if (smooths)
        for (int64_t i = 0; i < inputs; ++i) values[i] = x[smoothing.order[i]] / smoothing.divisors[i];
    float size = largest_size(values.data(), inputs), step = 1.0f;
    if (plan.is_lost || !is_finite(largest_size(x, inputs))) {
        std::fill_n(plan.factors.begin() + vector, digits, std::numeric_limits<float>::quiet_NaN());
        return;
    }
    if (rounds) {
        const float limit = static_cast<float>((1 << (call.activation_bits - 1)) - 1);
        step = size / limit;
        if (step == 0.0f) return;
        for (float& one : values) one = std::nearbyint(std::min(limit, std::max(-limit, one / step)));
        if (!plan.in_digits) {
            for (int64_t i = 0; i < inputs; ++i) codes[i] = static_cast<int8_t>(values[i]);
            put_vector<BITS>(codes.data(), vector, plan);
            plan.factors[vector] = step;
            return;
        }
        own.in_place.resize(inputs);
        for (int64_t i = 0; i < inputs; ++i) own.in_place[smoothing.order[i]] = values[i] * smoothing.divisors[i];
        values.swap(own.in_place);
        size = largest_size(values.data(), inputs);
    }
    if (size == 0.0f) return;
    const float inverse = LARGEST_NUMBER / size, unit = size / LARGEST_NUMBER * step;
    std::vector<int32_t>& numbers = own.numbers;
    numbers.resize(inputs);
    for (int64_t i = 0; i < inputs; ++i)
        numbers[i] = static_cast<int32_t>(std::nearbyint(std::min(LARGEST_NUMBER, std::max(-LARGEST_NUMBER, values[i] * inverse))));
    for (int digit = 0; digit < DIGITS; ++digit) {
        for (int64_t i = 0; i < inputs; ++i) {
            const int32_t low = ((numbers[i] + LARGEST_DIGIT) & (2 * LARGEST_DIGIT - 1)) - LARGEST_DIGIT;
            codes[i] = static_cast<int8_t>(low);
            numbers[i] = (numbers[i] - low) >> BASE_BITS;
        }
        put_vector<BITS>(codes.data(), vector + digit, plan);
        plan.factors[vector + digit] = unit * static_cast<float>(1 << (digit * BASE_BITS));
    }
}

template <class F>
void with_count(int count, const F& f) {
    if (count == 1) f(std::integral_constant<int, 1>());
    else if (count == 2) f(std::integral_constant<int, 2>());
    else if (count == 3) f(std::integral_constant<int, 3>());
    else if (count == 6) f(std::integral_constant<int, 6>());
    else f(std::integral_constant<int, MOST_VECTORS>());
}

// The outputs of one tile.
template <int BITS>
void multiply_tile(const IntegerCall& call, Plan& plan, int64_t number) {
    using Code = typename Codes<BITS>::Activation;
    static thread_local std::vector<float> totals;
    static thread_local std::vector<typename Codes<BITS>::Weight> panel;
    const uint8_t* tile = call.tiles + number * lines_of(call.inputs) * Codes<BITS>::LINE_BYTES;
    if (plan.is_sorted) prefetch(tile, lines_of(call.inputs) * Codes<BITS>::LINE_BYTES);
    totals.assign(plan.places * TILE_ROWS, 0.0f);
    panel.resize(plan.in_panels ? lines_of(PANEL_COLUMNS) * Codes<BITS>::PANEL_LINE : 0);
    for (size_t c = 0; c < plan.chunks.size(); ++c) {
        const Chunk& chunk = plan.chunks[c];
        const int64_t lines = chunk.lines();
        if (plan.in_panels) fill_panel<BITS>(tile, plan.smoothing.order.data(), chunk.begin, chunk.end, panel.data());
        const uint8_t* direct = tile + chunk.begin / STEP * Codes<BITS>::LINE_BYTES;
        const Code* x = plan.codes<Code>() + STEP * chunk.first_line * plan.places;
        for (const Block& block : plan.blocks) {
            with_count(block.count, [&](auto count) {
                constexpr int V = std::min(decltype(count)::value, Codes<BITS>::VECTORS);
                alignas(64) int32_t sums[V][TILE_ROWS];
                for (int v = 0; v < V; ++v) std::fill(sums[v], sums[v] + TILE_ROWS, plan.starts[c * plan.places + block.first + v]);
                if (plan.in_panels) add_products<BITS, true, V>(panel.data(), x, lines, plan.flush, sums);
                else add_products<BITS, false, V>(direct, x, lines, plan.flush, sums);
                for (int v = 0; v < V; ++v) {
                    float* to = totals.data() + (block.first + v) * TILE_ROWS;
                    for (int64_t r = 0; r < TILE_ROWS; ++r) to[r] += chunk.factor * static_cast<float>(sums[v][r]);
                }
            });
            x += lines * STEP * block.count;
        }
    }
    const int64_t digits = plan.in_digits ? DIGITS : 1, rows = std::min(TILE_ROWS, call.outputs - number * TILE_ROWS);
    for (int64_t t = 0; t < call.tokens; ++t) {
        float sums[TILE_ROWS] = {};
        for (int64_t v = t * digits; v < (t + 1) * digits; ++v)
            for (int64_t r = 0; r < TILE_ROWS; ++r) sums[r] += plan.factors[v] * totals[v * TILE_ROWS + r];
        for (int64_t r = 0; r < rows; ++r) call.out[t * call.outputs + number * TILE_ROWS + r] = sums[r] * call.scales[number * TILE_ROWS + r];
    }
}

template <int BITS>
void multiply_all(const IntegerCall& call) {
    static thread_local Plan kept;
    Plan& plan = kept;  // inside the region the thread_local name would mean each thread's own object
    make_plan<BITS>(call, plan);
    in_parallel(call.threads, [&](int thread, int threads) {
        static thread_local Rounding own;
        for (int64_t t = thread; t < call.tokens; t += threads) round_token<BITS>(call, t, plan, own);
        barrier();
        const int64_t tiles = (call.outputs + TILE_ROWS - 1) / TILE_ROWS;
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t number = 0; number < tiles; ++number) multiply_tile<BITS>(call, plan, number);
    });
}

// A row's product with the Hadamard matrix of size core * power: values [core, power, inner], of which the first two are mixed. Mirrors
// `multiply` in sparsify/models/hadamard.py.
void turn(float* values, int64_t core, int64_t power, int64_t inner, const float* matrix, std::vector<float>& room) {
    const int64_t size = core * power, line = power * inner;
    for (int64_t half = inner; half < line; half *= 2)
        for (int64_t first = 0; first < size * inner; first += 2 * half)
            for (int64_t i = first; i < first + half; ++i) {
                const float one = values[i], two = values[i + half];
                values[i] = one + two, values[i + half] = one - two;
            }
    if (core > 1) {
        room.assign(values, values + size * inner);
        std::fill(values, values + size * inner, 0.0f);
        for (int64_t j = 0; j < core; ++j)
            for (int64_t k = 0; k < core; ++k)
                for (int64_t i = 0; i < line; ++i) values[j * line + i] += matrix[k * core + j] * room[k * line + i];
    }
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
    for (int64_t i = 0; i < size * inner; ++i) values[i] *= scale;
}

}  // namespace
}  // namespace sparsify

extern "C" {

// Turns rows of values [rows, core * power, inner] in place; `matrix` is the core's [core, core].
void sparsify_integer_turn(float* values, int64_t rows, int64_t core, int64_t power, int64_t inner, const float* matrix, int threads) {
    sparsify::in_parallel(threads, [&](int thread, int threads) {
        static thread_local std::vector<float> room;
        for (int64_t row = thread; row < rows; row += threads)
            sparsify::turn(values + row * core * power * inner, core, power, inner, matrix, room);
    });
}

int sparsify_integer_product(const sparsify::IntegerCall* call) {
    if (call->weight_bits == 4) sparsify::multiply_all<4>(*call);
    else if (call->weight_bits == 8) sparsify::multiply_all<8>(*call);
    else return 1;
    return 0;
}

void sparsify_start() { sparsify::watch_forks(); }

int64_t sparsify_integer_call_bytes() { return sizeof(sparsify::IntegerCall); }

int64_t sparsify_integer_tile_bytes(int64_t inputs, int weight_bits) {
    using namespace sparsify;
    return lines_of(inputs) * (weight_bits == 4 ? Codes<4>::LINE_BYTES : Codes<8>::LINE_BYTES);
}

// Packs codes [outputs, inputs], of so many bits in a byte each, into tiles that are zero.
void sparsify_integer_pack(const int8_t* codes, int64_t outputs, int64_t inputs, int weight_bits, uint8_t* tiles) {
    using namespace sparsify;
    const int64_t bytes = sparsify_integer_tile_bytes(inputs, weight_bits);
    for (int64_t row = 0; row < outputs; ++row) {
        uint8_t* tile = tiles + row / TILE_ROWS * bytes;
        if (weight_bits == 4) put_row<4>(codes + row * inputs, inputs, row % TILE_ROWS, tile);
        else put_row<8>(codes + row * inputs, inputs, row % TILE_ROWS, tile);
    }
}
}
