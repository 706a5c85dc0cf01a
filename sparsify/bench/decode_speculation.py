"""What verifying several drafted tokens in one step costs, against one token: where neurons are skipped, each token adds rows.

A step reads the rows that any of its tokens needs. The native step has one token for each of several sequences, and is timed so;
several tokens of one sequence would read the same weights, and only their attention would differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparsify.bench.decode_models import WARM_UP_TOKENS, sharing
from sparsify.bench.decode_result import SpeculationPoint, Timing
from sparsify.bench.decode_shapes import Shape, random_model
from sparsify.bench.timing import Clock
from sparsify.runtime import accelerate
from sparsify.runtime.native_ffn import MAX_TOKENS

PROMPT_TOKENS = 64


@torch.no_grad()
def measure_speculation(
    shape: Shape,
    layers: int,
    active: float,
    gates: float,
    overlap: float,
    tokens: Sequence[int],
    dtype: torch.dtype,
    weights: str,
    repeats: int,
    on_progress: Callable[[str], object],
) -> list[SpeculationPoint]:
    """Times steps of one and of several `tokens` (each at most MAX_TOKENS), dense and exact, interleaved.

    The share `overlap` of the firing neurons is common to all tokens of a step; the others are drawn independently.
    """
    on_progress("making a model of random weights")
    model, _ = random_model(shape, layers, active, gates, MAX_TOKENS, dtype, kinds=MAX_TOKENS, overlap=overlap)
    models = {"dense": sharing(model), "exact": model}
    for name, one in models.items():
        accelerate(one, weights=weights, dense=name == "dense", max_tokens=MAX_TOKENS)
    counts = sorted({1, *tokens})
    ways = {(name, count): _Way(one, count) for name, one in models.items() for count in counts}
    clock = Clock("cpu")
    for repeat in range(repeats + WARM_UP_TOKENS):
        on_progress(f"verifying up to {counts[-1]} tokens, overlap {overlap:.0%}, repeat {repeat} of {repeats}")
        for way in ways.values():
            start = clock.mark()
            way.step()
            if repeat >= WARM_UP_TOKENS:
                way.seconds.append(clock.seconds(start, clock.mark()))
    return [
        SpeculationPoint(
            variant=name,
            tokens=count,
            overlap=overlap,
            seconds=Timing(seconds=way.seconds),
            one=Timing(seconds=ways[name, 1].seconds),
        )
        for (name, count), way in ways.items()
        if count > 1
    ]


class _Way:
    """A model with a cache of so many sequences, whose next tokens are of different kinds."""

    def __init__(self, model: Any, count: int) -> None:
        self.model, self.seconds = model, list[float]()
        prompt = torch.arange(PROMPT_TOKENS).expand(count, -1)
        self.ids = torch.arange(count)[:, None]
        self.cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values

    def step(self) -> None:
        self.model(self.ids, past_key_values=self.cache, use_cache=True)
