"""How many zeros each layer gets: the same in all, or fewer where they cost more, as measured.

Each layer is masked alone, at two shares of zeros, and the rise of the loss on held-out calibration tokens is measured. A layer's
damage is modelled as s · o^k with the odds o = z / (1 - z) of its zeros z: s is the layer's own, and k, the median of what the two
shares say, is common. Shares that minimise the sum of the damages at the wanted mean follow from one Lagrange multiplier. No layer moves
further from the mean than half of the way to 1, or as much below it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import torch
from torch.nn import functional

from sparsify.mixture.sequences.reader import NO_LOSS, PackedSequence, collate
from sparsify.models import SparseModel, mask_tensors

MAX_TOKENS = 8192
"""Held-out calibration tokens that losses are measured on."""
OPEN = {"threshold": -torch.inf, "kept_share": 1.0, "kept_mass": 1.0, "constant": 0.0}
"""Values of a mask's parts with which it drops and adds nothing."""
LEAST_SHARE = 0.01
"""Of the mean damage: what layers without measurable damage count as."""


def probe_shares(target_zeros: float) -> tuple[float, float]:
    """The two shares at which layers are measured: the wanted one, and one with half of its odds."""
    return target_zeros / (2 - target_zeros), target_zeros


@torch.no_grad()
def damage_by_layer(model: SparseModel, sequences: Sequence[PackedSequence]) -> list[float]:
    """Rise of the loss, in nats per token, with the masks of one layer alone. The model's masks are as before afterwards."""
    count = max(1, MAX_TOKENS // len(sequences[0].input_ids))
    parts = [
        (part.rpartition(".")[2], name)
        for site in mask_tensors(model.config).values()
        for part, (name, _) in site.items()
    ]
    buffers = dict(model.named_buffers())
    of_layer = [
        [(buffers[f"model.layers.{layer}.{name}"], OPEN[part]) for part, name in parts if part in OPEN]
        for layer in range(model.config.num_hidden_layers)
    ]
    stored = [[buffer.clone() for buffer, _ in layer] for layer in of_layer]
    for buffer, value in (one for layer in of_layer for one in layer):
        buffer.fill_(value)
    dense = _loss(model, sequences[:count])
    damages = []
    for layer, values in zip(of_layer, stored, strict=True):
        for (buffer, _), value in zip(layer, values, strict=True):
            buffer.copy_(value)
        damages.append(_loss(model, sequences[:count]) - dense)
        for buffer, value in layer:
            buffer.fill_(value)
    for (buffer, _), value in (
        (one, value) for pair in zip(of_layer, stored, strict=True) for one, value in zip(*pair, strict=True)
    ):
        buffer.copy_(value)
    return damages


def allocate(low: Sequence[float], high: Sequence[float], target_zeros: float) -> list[float]:
    """Each layer's share of zeros, of mean `target_zeros`, from the damages at `probe_shares`."""
    odds = [share / (1 - share) for share in probe_shares(target_zeros)]
    floor = LEAST_SHARE * max(sum(high) / len(high), 1e-9)
    factors = [max(damage, floor) / odds[1] for damage in high]
    slopes = [
        math.log(after / before) / math.log(odds[1] / odds[0])
        for before, after in zip(low, high, strict=True)
        if before > floor and after > floor
    ]
    power = min(4.0, max(1.0, median(slopes))) if slopes else 1.0
    reach = (1 - target_zeros) / 2
    bounds = max(0.0, target_zeros - reach), target_zeros + reach

    def share(factor: float, price: float) -> float:
        """Where one more zero costs the price: bisected, since the cost of one more rises with the zeros."""
        least, most = bounds
        for _ in range(50):
            middle = (least + most) / 2
            middle_odds = middle / (1 - middle)
            cost = factor * power * (middle_odds / odds[1]) ** (power - 1) / (1 - middle) ** 2
            least, most = (middle, most) if cost < price else (least, middle)
        return (least + most) / 2

    cheap, dear = -60.0, 60.0  # logarithms of prices
    for _ in range(100):
        price = (cheap + dear) / 2
        mean = sum(share(factor, math.exp(price)) for factor in factors) / len(factors)
        cheap, dear = (price, dear) if mean < target_zeros else (cheap, price)
    return [round(share(factor, math.exp((cheap + dear) / 2)), 6) for factor in factors]


def _loss(model: SparseModel, sequences: Sequence[PackedSequence]) -> float:
    total, labels = 0.0, 0
    for sequence in sequences:
        batch = collate([sequence])
        inputs = {key: batch[key].to(model.device) for key in ("input_ids", "position_ids")}
        wanted = batch["labels"].to(model.device).flatten()
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1).float()
        total += float(functional.cross_entropy(logits, wanted, ignore_index=NO_LOSS, reduction="sum"))
        labels += int((wanted != NO_LOSS).sum())
    return total / max(labels, 1)
