"""Feed-forward blocks with a chosen share of firing neurons, and their answer in float64."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import torch
from hypothesis import assume

from sparsify.models import ACTIVATIONS, Activation, FfnActivation
from sparsify.models.masking import INPUTS, NUMBERS, READERS, SITES, SiteMask, SiteRule
from sparsify.models.quantised import BlockFormat, rounded_states
from sparsify.runtime import BlockMatrix, FfnWeights, Predictor, quantise
from sparsify.runtime.weights import Copies, Matrix

DRELU = ACTIVATIONS["drelu"]
IDS = torch.arange(3, 15)[None]
ALL = ACTIVATIONS | {
    "fatrelu": ACTIVATIONS["fatrelu"].with_threshold(0.3),
    "shifted_relu": ACTIVATIONS["shifted_relu"].with_threshold(-0.5),
}
FORMATS: tuple[BlockFormat | None, ...] = (None, "int8", "int4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Where the terms of a gate cancel, its rounding is larger than that of the sum that it goes into.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}

WORDS = 15 / 65534
"""What adding 16 rows in blocks with factors of 16 bits costs at most, as a share of the block's largest column: the largest factor is
exact, each other one off by half a 32767th of it."""
EXTRAS: dict[str, dict[str, Any]] = {
    "none": {},
    "constant": {"remainder": "constant"},
    "low_rank": {"remainder": "low_rank", "rank": 3},
    "rotated": {"rotated": True},
}
"""What a mask may have in addition, as fields of a `SiteRule`."""


def may_have(site: str, extra: str) -> bool:
    """Whether a site may have one of EXTRAS."""
    places = {"constant": READERS, "rotated": INPUTS, "low_rank": [one for one in INPUTS if len(INPUTS[one]) == 1]}
    return site in places.get(extra, SITES)


def block(
    tokens: int,
    hidden: int,
    neurons: int,
    dtype: torch.dtype = torch.float32,
    *,
    on: float = 0.2,
    seed: int = 0,
) -> tuple[torch.Tensor, FfnWeights]:
    """x [tokens, hidden] and weights whose gates are positive for about `on` of the neurons."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(tokens, hidden)
    x[:, 0] = 1.0
    gate, up, down_t = (normal(neurons, hidden) / hidden**0.5 for _ in range(3))
    lift = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(min(max(on, 1e-6), 1 - 1e-6)))
    gate[:, 0] = lift.double() if 0 < on < 1 else (2 * on - 1) * 6
    return x.to(dtype), FfnWeights(gate.to(dtype), up.to(dtype), down_t.to(dtype))


def predictor(weights: FfnWeights, rank: int, seed: int = 1) -> Predictor:
    """Random: what it predicts has nothing to do with what fires."""
    neurons, hidden = weights.gate.shape
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, hidden, generator=generator) / hidden**0.5
    b = torch.randn(neurons, rank, generator=generator)
    return Predictor(a.to(weights.gate.dtype), b.to(weights.gate.dtype), threshold=0.1)


def with_copies(x: torch.Tensor, weights: FfnWeights, activation: Activation) -> FfnWeights:
    """Weights as they are stored with int4 copies, and a threshold that the size of no product by these is near."""
    gate, up = (quantise(one, "int4") for one in (weights.gate, weights.up) if isinstance(one, torch.Tensor))
    chosen = Copies(gate, up, 0.0)
    chosen = replace(chosen, threshold=gap_in(sizes_by(chosen, x, activation)))
    return replace(weights, copies=chosen)


def sizes_by(chosen: Copies, x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """What copies say of the size of every product, in float64. [tokens, neurons]"""
    states = rounded_states(x).double()
    own = FfnActivation(activation.name, activation.gate_threshold)
    gate, up = (states @ one.dequantised(dtype=torch.float64).T for one in (chosen.gate, chosen.up))
    return own.proxy_sizes(gate, up)


def in_format(weights: FfnWeights, format: BlockFormat | None) -> tuple[FfnWeights, FfnWeights]:
    """The weights in blocks, and, in fp32, what these stand for; twice the weights themselves without a format."""
    if format is None:
        return weights, weights
    blocks = [quantise(one, format) for one in (weights.gate, weights.up)]
    blocks.append(quantise(weights.down_t, format, by_columns=True))
    plain = [one.dequantised() for one in blocks]
    chosen = None if weights.predictor is None else weights.predictor.like(weights.gate, in_blocks=True)
    given = replace(weights, gate=blocks[0], up=blocks[1], down_t=blocks[2], predictor=chosen)
    return given, replace(weights, gate=plain[0], up=plain[1], down_t=plain[2], predictor=chosen)


def spoil(matrix: torch.Tensor | BlockMatrix, rows: torch.Tensor) -> None:
    """Makes these rows no numbers."""
    if isinstance(matrix, BlockMatrix):
        matrix.data[rows] = 0xFF  # a scale of 0xFFFF is a NaN
    else:
        matrix[rows] = torch.nan


def products_of(x: torch.Tensor, weights: FfnWeights, activation: Activation) -> torch.Tensor:
    """Activations of every neuron in float64, before their thresholds and predictor. [tokens, neurons]"""
    gate = gates_of(x, weights, activation)
    if weights.gate_thresholds is not None:
        gate[gate.abs() <= weights.gate_thresholds] = 0.0
    return gate * ups_of(x, weights, activation)


def gates_of(x: torch.Tensor, weights: FfnWeights, activation: Activation) -> torch.Tensor:
    """Left factors of every neuron in float64, before any threshold. [tokens, neurons]"""
    own = FfnActivation(activation.name, activation.gate_threshold)
    gates = x.double() @ weights.gate.double().T
    if activation.gate == "gelu_tanh":  # 1 + tanh, as torch has it, cancels far below 0: at -7 it is off by a hundredth
        return gates * (2 * math.sqrt(2 / math.pi) * (gates + 0.044715 * gates**3)).sigmoid()
    return own.gate_factor(gates)


def ups_of(x: torch.Tensor, weights: FfnWeights, activation: Activation) -> torch.Tensor:
    """Right factors of every neuron in float64. [tokens, neurons]"""
    own = FfnActivation(activation.name, activation.gate_threshold)
    return own.up_factor(x.double() @ weights.up.double().T)


def random_mask(rule: str, channels: int, weighted: bool, seed: int) -> SiteMask:
    """A mask of a site by a rule, with numbers that drop some of it."""
    own = {"per": "channel"} if rule == "threshold" else {"weighted": weighted}
    parts = {NUMBERS[rule]: (channels,) if rule == "threshold" else (1,), "weight": (channels,)}
    mask = SiteMask(SiteRule(rule=rule, **own), parts)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(seed)
    for name, values in mask.named_buffers():
        values.copy_(torch.rand(values.shape, generator=generator) * 0.8 + (0.5 if name == "weight" else 0.0))
    return mask


def masked_clear_of_ties(mask: SiteMask | None, values: torch.Tensor) -> torch.Tensor:
    """What a mask leaves of values [tokens, neurons]; an example in which rounding may decide that is rejected."""
    if mask is None:
        return values
    noise = values.abs().max() * 1e-4
    for factor in (1.0, -1.0, 0.5):
        signs = torch.ones_like(values)
        signs[:, ::2] = -factor
        moved = mask(torch.where(values == 0, 0.0, values + factor * noise * signs))
        assume(bool(((moved != 0) == (mask(values) != 0)).all()))
    return mask(values)


def scores_of(x: torch.Tensor, chosen: Predictor) -> torch.Tensor:
    """Scores of every neuron. [tokens, neurons]"""

    def multiply(states: torch.Tensor, part: Matrix) -> torch.Tensor:
        if isinstance(part, BlockMatrix):
            return rounded_states(states).to(x.dtype) @ part.dequantised(dtype=x.dtype).T
        return states @ part.to(x.dtype).T

    return multiply(multiply(x, chosen.a).relu(), chosen.b)


def difference(
    given: torch.Tensor,
    x: torch.Tensor,
    weights: FfnWeights,
    activation: Activation,
    states: torch.Tensor | None = None,
) -> float:
    """Largest difference from float64, as a share of the largest sum of the sizes of what is added up.

    `states` is x as gate and up are multiplied with it, by default x; the predictor reads x.
    """
    product = products_of(x if states is None else states, weights, activation)
    if weights.thresholds is not None:
        product[product.abs() <= weights.thresholds] = 0.0
    if weights.predictor is not None:
        product[scores_of(x.double(), weights.predictor) <= weights.predictor.threshold] = 0.0
    if weights.copies is not None:
        product[sizes_by(weights.copies, x, activation) <= weights.copies.threshold] = 0.0
    sizes = product.abs() @ weights.down_t.double().abs()
    wrong = (given.double() - product @ weights.down_t.double()).abs()
    return (wrong.max() / sizes.max().clamp_min(1e-30)).item() if wrong.numel() else 0.0


def thresholds_between(values: torch.Tensor) -> torch.Tensor:
    """[neurons] in float32: in the middle of the widest gap between tokens' values, so that rounding decides nothing.

    Args:
        values: [tokens, neurons].
    """
    sizes = values.abs()
    edges = torch.cat([torch.zeros_like(sizes[:1]), sizes]).sort(dim=0).values
    widest = edges.diff(dim=0).argmax(dim=0, keepdim=True)
    return edges.gather(0, torch.cat([widest, widest + 1])).mean(dim=0).float()


def with_thresholds(
    read: FfnWeights, weights: FfnWeights, site: str, kind: str, x: torch.Tensor, name: str
) -> tuple[FfnWeights, FfnWeights]:
    """Both with thresholds on the gate or on the product: `none`, `zero`, `between` values, or `huge`."""
    if kind == "none":
        return read, weights
    thresholds = torch.full(weights.gate.shape[:1], {"huge": 1e9}.get(kind, 0.0))
    if kind == "between":
        values = gates_of if site == "gate" else products_of
        thresholds = thresholds_between(values(x, weights, ALL[name]))
    field = {"gate": "gate_thresholds", "inter": "thresholds"}[site]
    return replace(read, **{field: thresholds}), replace(weights, **{field: thresholds})


def clear_of_ties(x: torch.Tensor, chosen: Predictor) -> Predictor:
    """The predictor with a threshold that no score is near, so that rounding decides nothing."""
    return dataclasses.replace(chosen, threshold=gap_in(scores_of(x.double(), chosen)))


def gap_in(scores: torch.Tensor) -> float:
    """The middle of the widest gap between the lower half of the scores."""
    values = torch.cat([scores.flatten().sort().values, torch.tensor([1e3, 2e3])])
    widest = values.diff()[: max(len(values) // 2, 1)].argmax()
    return values[widest : widest + 2].mean().item()


@torch.no_grad()
def decoded_logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits of every token, each fed alone with the cache of those before it."""
    cache, rows = None, []
    for token in ids.T:
        out = model(token[:, None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[:, -1])
    return torch.stack(rows, 1)
