"""The Triton kernels of a block or of a layer's experts, for one to eight tokens. `triton_ffn` launches them.

    predict (optional) -> gate rows -> up rows where the gate factor is not zero -> down rows where the product is kept

A projection whose input is masked is held by columns, each a contiguous run. Then `add_rows` adds up the columns of inputs that are
not zero, as it adds up rows of down_proj, and `gate_sums` or `up_sums` takes the place of `gate_rows` or `up_rows`.

The number of programs never depends on values on the device, so the host never synchronises, and a CUDA graph can hold all
launches. Neurons are split into chunks. Every program lists the neurons of its chunk that any token needs, from the output of
the previous kernel, takes its share of that list, and exits at once if the list is shorter. Sums have one fixed order, and only
integers are added atomically: the same input gives the same bits.

Values between kernels are fp32 [experts, tokens, neurons]. A block without experts is one expert to which
every token is routed (SLOTS is 0 then). Programs of experts without tokens exit before they read any weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify.runtime.triton_masks import mask_input

__all__ = ["add_rows", "gate_rows", "gate_sums", "mask_input", "predictor_layer", "sum_chunks", "up_rows", "up_sums"]

OFFERED, GATE, UP, DOWN, GATE_COLUMNS, UP_COLUMNS = (tl.constexpr(place) for place in range(6))
"""Indices of `counts`: neurons of the experts that tokens were routed to, rows read of each projection, and columns read."""


@triton.jit
def _sent(index, expert, tokens, slots, T: tl.constexpr, SLOTS: tl.constexpr):
    """Which of T tokens (padded to a power of two) are routed to the expert, bool [T]."""
    token = tl.arange(0, T)
    sent = token < tokens
    if SLOTS > 0:
        slot = tl.arange(0, SLOTS)
        there = sent[:, None] & (slot < slots)[None, :]
        chosen = tl.load(index + token[:, None] * slots + slot[None, :], mask=there, other=-1)
        sent = tl.max((chosen == expert).to(tl.int32), axis=1) > 0
    return sent


@triton.jit
def _listed(values, stride, sent, chunk, neurons, ALL: tl.constexpr, T: tl.constexpr, CHUNK: tl.constexpr):
    """The neurons of a chunk, the index of each in the list of neurons that any token needs (or -1), and the list's length."""
    neuron = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = neuron < neurons
    if ALL:
        wanted = inside.to(tl.int32)
    else:
        place = tl.arange(0, T)[:, None] * stride + neuron[None, :]
        given = tl.load(values + place, mask=sent[:, None] & inside[None, :], other=0.0)
        wanted = tl.max((given != 0.0).to(tl.int32), axis=0)  # a NaN is not zero
    # Stream compaction: the prefix sum of the flags is each needed neuron's index in the list.
    return neuron, tl.where(wanted > 0, tl.cumsum(wanted, axis=0) - 1, -1), tl.sum(wanted, axis=0)


@triton.jit
def _taken(neuron, place, count, first, ROWS: tl.constexpr):
    """The neurons at indices first ... first + ROWS - 1 of the list, and which of these indices exist."""
    wanted = first + tl.arange(0, ROWS)
    # Triton cannot index registers, so each index selects its neuron by a masked sum over the chunk.
    hit = place[None, :] == wanted[:, None]
    return tl.sum(tl.where(hit, neuron[None, :], 0), axis=1), wanted < count


@triton.jit
def _dots(x, x_stride, sent, rows, there, width, T: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Dot products of rows, given by pointers, with the tokens: [T, ROWS]."""
    # Sums stay in registers over the whole row, one per element of the tile; they are reduced once, at the end.
    if T == 1:  # a 2D tile needs no layout conversion
        single = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(0, width, WIDTH):
            column = start + tl.arange(0, WIDTH)
            inside = column < width
            mask = there[:, None] & inside[None, :]
            weights = tl.load(rows[:, None] + column[None, :], mask=mask, other=0.0)
            seen = tl.load(x + column, mask=inside, other=0.0)
            single += weights.to(tl.float32) * seen.to(tl.float32)[None, :]
        return tl.sum(single, axis=1)[None, :]
    else:
        token = tl.arange(0, T)
        total = tl.zeros((T, ROWS, WIDTH), tl.float32)
        for start in range(0, width, WIDTH):
            column = start + tl.arange(0, WIDTH)
            inside = column < width
            mask = there[:, None] & inside[None, :]
            weights = tl.load(rows[:, None] + column[None, :], mask=mask, other=0.0)
            place = x + token[:, None] * x_stride + column[None, :]
            seen = tl.load(place, mask=sent[:, None] & inside[None, :], other=0.0)
            total += seen.to(tl.float32)[:, None, :] * weights.to(tl.float32)[None, :, :]
        return tl.sum(total, axis=2)


@triton.jit
def _gate_factor(g, threshold, small, KIND: tl.constexpr, THRESHOLDS: tl.constexpr):
    """The left factor of pre-activations; 0 up to `small`, the threshold of each neuron's factor."""
    factor = g
    if KIND == "silu":
        factor = g / (1.0 + tl.exp(-g))
    elif KIND == "gelu_tanh":  # (1 + tanh(z)) / 2 is the sigmoid of 2z
        factor = g / (1.0 + tl.exp(-1.5957691216 * (g + 0.044715 * g * g * g)))
    elif KIND == "relu_squared":
        factor = tl.where(g <= threshold, 0.0, g * g)
    elif KIND == "shifted_relu":
        factor = tl.where(g <= threshold, 0.0, g - threshold)
    else:
        factor = tl.where(g <= threshold, 0.0, g)
    if THRESHOLDS:
        factor = tl.where(tl.abs(factor) <= small, 0.0, factor)
    return factor


@triton.jit
def _product(factor, u, small, RELU: tl.constexpr, DENSE: tl.constexpr, THRESHOLDS: tl.constexpr):
    """The product of both factors, from pre-activations of the right one; 0 up to `small`, the threshold of each neuron."""
    if RELU:
        u = tl.where(u <= 0.0, 0.0, u)
    value = factor * u
    if not DENSE:  # a zero factor gives zero even if the up row holds NaN or infinity
        value = tl.where(factor == 0.0, 0.0, value)
    if THRESHOLDS:
        value = tl.where(tl.abs(value) <= small, 0.0, value)
    return value


@triton.jit
def _chunk_sum(partial, expert, token, tokens, chunks, columns, column, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """What `add_rows` left of an expert's chunks for one token, added up: [WIDTH]."""
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        rows = ((expert * chunks + chunk) * tokens + token) * columns
        mask = (chunk < chunks)[:, None] & (column < columns)[None, :]
        total += tl.sum(tl.load(partial + rows[:, None] + column[None, :], mask=mask, other=0.0), axis=0)
    return total


@triton.jit
def _is_sent(index, expert, token, slots, SLOTS: tl.constexpr):
    """Whether one token is routed to the expert."""
    sent = token >= 0
    if SLOTS > 0:
        slot = tl.arange(0, SLOTS)
        chosen = tl.load(index + token * slots + slot, mask=slot < slots, other=-1)
        sent = tl.max((chosen == expert).to(tl.int32), axis=0) > 0
    return sent


@triton.jit
def predictor_layer(
    x,
    weight,
    out,
    index,
    tokens,
    slots,
    width,
    rows_of_weight,
    x_stride,
    x_expert_stride,
    weight_stride,
    weight_expert_stride,
    threshold,
    WANTED: tl.constexpr,
    T: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out [experts, tokens, rows of weight] = x @ weight.T, set to 0 up to the threshold; with WANTED, to 1 above it."""
    expert = tl.program_id(1).to(tl.int64)
    sent = _sent(index, expert, tokens, slots, T, SLOTS)
    if tl.max(sent.to(tl.int32), axis=0) > 0:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        there = row < rows_of_weight
        rows = weight + expert * weight_expert_stride + row.to(tl.int64) * weight_stride
        own = x + expert * x_expert_stride
        scores = _dots(own, x_stride, sent, rows, there, width, T, ROWS, WIDTH)
        place = (expert * tokens + tl.arange(0, T))[:, None] * rows_of_weight + row[None, :]
        mask = sent[:, None] & there[None, :]
        kept = scores
        if WANTED:
            kept = tl.full((T, ROWS), 1.0, tl.float32)
        tl.store(out + place, tl.where(scores <= threshold, 0.0, kept), mask=mask)


@triton.jit
def gate_rows(
    x,
    gate,
    wanted,
    thresholds,
    constant,
    factors,
    counts,
    index,
    tokens,
    slots,
    hidden,
    neurons,
    x_stride,
    x_expert_stride,
    gate_stride,
    gate_expert_stride,
    threshold,
    KIND: tl.constexpr,
    PREDICTED: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    CONSTANT: tl.constexpr,
    T: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """factors [experts, tokens, neurons], zero-initialised: the gate factor where the neuron is predicted and kept."""
    expert = tl.program_id(1).to(tl.int64)
    chunk, first = tl.program_id(0) // (CHUNK // ROWS), tl.program_id(0) % (CHUNK // ROWS) * ROWS
    sent = _sent(index, expert, tokens, slots, T, SLOTS)
    if tl.max(sent.to(tl.int32), axis=0) > 0:
        own = expert * tokens * neurons
        neuron, place, count = _listed(wanted + own, neurons, sent, chunk, neurons, not PREDICTED, T, CHUNK)
        if first == 0:
            tl.atomic_add(counts + GATE, count.to(tl.int64))
            if chunk == 0:
                tl.atomic_add(counts + OFFERED, tl.zeros((), tl.int64) + neurons)
        if first < count:
            row, there = _taken(neuron, place, count, first, ROWS)
            rows = gate + expert * gate_expert_stride + row.to(tl.int64) * gate_stride
            g = _dots(x + expert * x_expert_stride, x_stride, sent, rows, there, hidden, T, ROWS, WIDTH)
            if CONSTANT:
                g += tl.load(constant + expert * neurons + row, mask=there, other=0.0).to(tl.float32)[None, :]
            small = 0.0
            if THRESHOLDS:
                small = tl.load(thresholds + expert * neurons + row, mask=there, other=0.0)[None, :]
            factor = _gate_factor(g, threshold, small, KIND, THRESHOLDS)
            places = own + tl.arange(0, T)[:, None] * neurons + row[None, :]
            mask = sent[:, None] & there[None, :]
            if PREDICTED:  # the list is over all tokens; this is the prediction for each token
                mask = mask & (tl.load(wanted + places, mask=mask, other=0.0) != 0.0)
            tl.store(factors + places, factor, mask=mask)


@triton.jit
def up_rows(
    x,
    up,
    factors,
    thresholds,
    constant,
    product,
    counts,
    index,
    tokens,
    slots,
    hidden,
    neurons,
    x_stride,
    x_expert_stride,
    up_stride,
    up_expert_stride,
    DENSE: tl.constexpr,
    RELU: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    CONSTANT: tl.constexpr,
    T: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """product [experts, tokens, neurons], zero-initialised: the gate factor times the up factor where that is kept."""
    expert = tl.program_id(1).to(tl.int64)
    chunk, first = tl.program_id(0) // (CHUNK // ROWS), tl.program_id(0) % (CHUNK // ROWS) * ROWS
    sent = _sent(index, expert, tokens, slots, T, SLOTS)
    if tl.max(sent.to(tl.int32), axis=0) > 0:
        own = expert * tokens * neurons
        neuron, place, count = _listed(factors + own, neurons, sent, chunk, neurons, DENSE, T, CHUNK)
        if first == 0:
            tl.atomic_add(counts + UP, count.to(tl.int64))
        if first < count:
            row, there = _taken(neuron, place, count, first, ROWS)
            rows = up + expert * up_expert_stride + row.to(tl.int64) * up_stride
            u = _dots(x + expert * x_expert_stride, x_stride, sent, rows, there, hidden, T, ROWS, WIDTH)
            if CONSTANT:
                u += tl.load(constant + expert * neurons + row, mask=there, other=0.0).to(tl.float32)[None, :]
            small = 0.0
            if THRESHOLDS:
                small = tl.load(thresholds + expert * neurons + row, mask=there, other=0.0)[None, :]
            places = own + tl.arange(0, T)[:, None] * neurons + row[None, :]
            mask = sent[:, None] & there[None, :]
            factor = tl.load(factors + places, mask=mask, other=0.0)
            value = _product(factor, u, small, RELU, DENSE, THRESHOLDS)
            tl.store(product + places, value, mask=mask)


@triton.jit
def add_rows(
    values,
    weight,
    partial,
    counts,
    index,
    tokens,
    slots,
    width,
    lines,
    values_stride,
    values_expert_stride,
    weight_stride,
    weight_expert_stride,
    COUNT: tl.constexpr,
    DENSE: tl.constexpr,
    T: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """partial [experts, chunks, tokens, width] = values @ weight, over those of each chunk of its lines whose value is not zero.

    Values are [tokens, lines], of each expert or of all, weights [lines, width].
    """
    chunk, expert = tl.program_id(0), tl.program_id(2).to(tl.int64)
    sent = _sent(index, expert, tokens, slots, T, SLOTS)
    if tl.max(sent.to(tl.int32), axis=0) > 0:
        own = values + expert * values_expert_stride
        line, place, count = _listed(own, values_stride, sent, chunk, lines, DENSE, T, CHUNK)
        if tl.program_id(1) == 0:
            tl.atomic_add(counts + COUNT, count.to(tl.int64))
            if COUNT == GATE_COLUMNS and chunk == 0:
                tl.atomic_add(counts + OFFERED, tl.zeros((), tl.int64) + width)
        token = tl.arange(0, T)
        column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        inside = column < width
        total = tl.zeros((T, ROWS, WIDTH), tl.float32)
        for first in range(0, count, ROWS):
            row, there = _taken(line, place, count, first, ROWS)  # pyright: ignore[reportGeneralTypeIssues]
            rows = weight + expert * weight_expert_stride + row.to(tl.int64) * weight_stride
            mask = there[:, None] & inside[None, :]
            weights = tl.load(rows[:, None] + column[None, :], mask=mask, other=0.0)
            places = own + token[:, None] * values_stride + row[None, :]
            seen = tl.load(places, mask=sent[:, None] & there[None, :], other=0.0)
            total += seen.to(tl.float32)[:, :, None] * weights.to(tl.float32)[None, :, :]
        to = (expert * tl.num_programs(0) + chunk) * tokens + token
        places = to[:, None] * width + column[None, :]
        tl.store(partial + places, tl.sum(total, axis=1), mask=sent[:, None] & inside[None, :])


@triton.jit
def gate_sums(
    partial,
    wanted,
    thresholds,
    constant,
    factors,
    index,
    tokens,
    slots,
    chunks,
    neurons,
    threshold,
    KIND: tl.constexpr,
    PREDICTED: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    CONSTANT: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`factors` as of `gate_rows`, from what `add_rows` left of the gate's columns."""
    token, expert = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if _is_sent(index, expert, token, slots, SLOTS):
        neuron = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
        inside = neuron < neurons
        g = _chunk_sum(partial, expert, token, tokens, chunks, neurons, neuron, CHUNKS, WIDTH)
        if CONSTANT:
            g += tl.load(constant + expert * neurons + neuron, mask=inside, other=0.0).to(tl.float32)
        small = 0.0
        if THRESHOLDS:
            small = tl.load(thresholds + expert * neurons + neuron, mask=inside, other=0.0)
        factor = _gate_factor(g, threshold, small, KIND, THRESHOLDS)
        places = (expert * tokens + token) * neurons + neuron
        mask = inside
        if PREDICTED:
            mask = inside & (tl.load(wanted + places, mask=inside, other=0.0) != 0.0)
        tl.store(factors + places, factor, mask=mask)


@triton.jit
def up_sums(
    partial,
    factors,
    thresholds,
    constant,
    product,
    index,
    tokens,
    slots,
    chunks,
    neurons,
    DENSE: tl.constexpr,
    RELU: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    CONSTANT: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`product` as of `up_rows`, from what `add_rows` left of the columns of the up projection."""
    token, expert = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if _is_sent(index, expert, token, slots, SLOTS):
        neuron = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
        inside = neuron < neurons
        u = _chunk_sum(partial, expert, token, tokens, chunks, neurons, neuron, CHUNKS, WIDTH)
        if CONSTANT:
            u += tl.load(constant + expert * neurons + neuron, mask=inside, other=0.0).to(tl.float32)
        small = 0.0
        if THRESHOLDS:
            small = tl.load(thresholds + expert * neurons + neuron, mask=inside, other=0.0)
        places = (expert * tokens + token) * neurons + neuron
        factor = tl.load(factors + places, mask=inside, other=0.0)
        tl.store(product + places, _product(factor, u, small, RELU, DENSE, THRESHOLDS), mask=inside)


@triton.jit
def sum_chunks(
    partial,
    out,
    index,
    shares,
    constant,
    tokens,
    slots,
    chunks,
    hidden,
    SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    CONSTANT: tl.constexpr,
):
    """out [tokens, hidden]: the sum over chunks and over the token's experts, each times its weight."""
    token = tl.program_id(1)
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < hidden
    total = tl.zeros((WIDTH,), tl.float32)
    for slot in range(0, slots):
        expert = tl.zeros((), tl.int64)
        share = tl.zeros((), tl.float32) + 1.0
        if SLOTS > 0:
            expert = tl.load(index + token * slots + slot).to(tl.int64)
            share = tl.load(shares + token * slots + slot).to(tl.float32)
        expert_output = _chunk_sum(partial, expert, token, tokens, chunks, hidden, column, CHUNKS, WIDTH)
        if CONSTANT:
            expert_output += tl.load(constant + expert * hidden + column, mask=inside, other=0.0).to(tl.float32)
        total += share * expert_output
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=inside)
