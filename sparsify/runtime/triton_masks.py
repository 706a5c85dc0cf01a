"""The Triton kernel that applies a mask to the input of projections: one program for each token, without a synchronisation.

The torch code of a mask needs to know on the host how many elements `top_k` keeps; this kernel reads it where it is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _kept_count(share, channels):
    """How many of so many elements `top_k` keeps, as `kept_count` of models/masking.py: halves go to the even number."""
    exact = share * channels
    whole = tl.floor(exact)
    is_odd = whole - 2.0 * tl.floor(whole / 2.0)
    rest = exact - whole + (is_odd - 0.5) * 1e-9
    return tl.minimum(tl.maximum(tl.where(rest > 0.5, whole + 1.0, whole), 1.0), channels.to(tl.float64))


@triton.jit
def mask_input(
    x,
    number,
    weight,
    out,
    channels,
    x_stride,
    number_stride,
    number_expert_stride,
    weight_expert_stride,
    RULE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [experts, tokens, channels] = x [tokens, channels], set to zero where a rule of models/masking.py does not keep it."""
    token, expert = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    value = tl.load(x + token * x_stride + channel, mask=inside, other=0.0)
    score = tl.abs(value.to(tl.float32))
    own = number + expert * number_expert_stride
    if RULE == "threshold":
        dropped = score <= tl.load(own + channel * number_stride, mask=inside, other=0.0).to(tl.float32)
    else:
        if WEIGHTED:
            score *= tl.load(weight + expert * weight_expert_stride + channel, mask=inside, other=0.0).to(tl.float32)
        setting = tl.load(own).to(tl.float64)
        if RULE == "top_k":
            size = inside.to(tl.float32)
            goal = _kept_count(setting, channels + tl.zeros((), tl.int32)).to(tl.float32)
        else:
            size = tl.where(score == score, score, 0.0)
            total = tl.sum(score, axis=0)
            goal = ((1.0 - setting) * total).to(tl.float32)
            goal = tl.where(total == total, goal, 0.0)  # with what is not a number, that alone is kept
            goal = tl.where(setting <= 0.0, float("inf"), goal)
        # Scores are not negative, so that they have the order of their bits. Bit by bit this finds the largest cut such that the sizes
        # of those from it on reach the goal. Those above are kept, and of those at it the first, up to the goal.
        bits = tl.where(inside, score.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
        cut = tl.zeros((), tl.int32)
        for place in range(31):
            higher = cut | (1 << (30 - place))
            cut = tl.where(tl.sum(tl.where(bits >= higher, size, 0.0), axis=0) >= goal, higher, cut)
        equal = bits == cut
        earlier = tl.cumsum(equal.to(tl.int32), axis=0) - 1
        before = tl.sum(tl.where(bits > cut, size, 0.0), axis=0) + tl.where(earlier > 0, earlier * size, 0.0)
        kept = (bits > cut) | (equal & (before < goal))
        dropped = (score == score) & (kept == 0)
    places = (expert * tl.num_programs(0) + token) * channels + channel
    tl.store(out + places, tl.where(dropped, 0.0, value.to(tl.float32)).to(out.dtype.element_ty), mask=inside)
