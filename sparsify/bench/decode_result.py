"""What `sparsify bench decode` measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from pydantic import BaseModel

CONTENDERS = ("torch", "dense", "exact", "predictor")
"""torch's dense block, our dense kernel (C++, or Triton on a GPU), the exact sparse kernel, the sparse kernel with a predictor."""


class Timing(BaseModel):
    """Seconds of interleaved repeats, in the order in which they were taken."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.seconds)


class Ratio(BaseModel):
    """How many times as fast: the median over the pairs of each repeat, and the middle half of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, slower: Timing, faster: Timing) -> Ratio:
        """Of two contenders that took turns."""
        pairs = sorted(a / b for a, b in zip(slower.seconds, faster.seconds, strict=True))
        quarter = len(pairs) // 4
        return cls(median=median(pairs), low=pairs[quarter], high=pairs[-1 - quarter])

    def __str__(self) -> str:
        return f"{self.median:.2f} ±{(self.high - self.low) / 2:.2f}"


class FfnPoint(BaseModel):
    """One block under one sparsity.

    Attributes:
        active_share: Share of neurons whose product is not zero, for one token.
        gate_share: Share of neurons whose gate is positive, for one token.
        tokens: Batch.
        bytes_read: Bytes of weights that each contender reads.
        read_bytes_per_second: Of plain reading, which took its turn among the contenders.
        seconds: By contender.
    """

    active_share: float
    gate_share: float
    tokens: int
    threads: int
    bytes_read: dict[str, int]
    read_bytes_per_second: float
    seconds: dict[str, Timing]

    def ratio(self, contender: str, baseline: str) -> Ratio:
        """Speed-up of one over another."""
        return Ratio.of(self.seconds[baseline], self.seconds[contender])

    def ideal(self, contender: str) -> float:
        """Speed-up over the dense kernel if bytes were all that cost."""
        return self.bytes_read["dense"] / self.bytes_read[contender]

    def read_share(self, contender: str) -> float:
        """Bytes a second, as a share of those that plain reading got."""
        speed = self.bytes_read[contender] / self.seconds[contender].median
        return speed / self.read_bytes_per_second


class LayerRead(BaseModel):
    """What decoding read of one layer of a model."""

    layer: int
    fired_share: float
    touched_share: float

    @property
    def ideal(self) -> float:
        """Speed-up of its block if bytes were all that cost."""
        return 1 / self.touched_share


class ModelPoint(BaseModel):
    """A whole model that decodes the same tokens densely and sparsely.

    Attributes:
        model: What it is.
        weights: How its accelerated selves read their feed-forward weights: stored, int8 or int4.
        decode_seconds: Of a token, by contender.
        prompt_seconds: Of the prompt, by contender; all of them go the dense way, with down_proj in the kernels' order for the sparse ones.
        outside_share: Share of a token's time outside the feed-forward blocks, by contender.
        bytes_read: Of weights for a token, by contender.
    """

    model: str
    dtype: str
    weights: str
    layers: int
    prompt_tokens: int
    threads: int
    active_share: float
    decode_seconds: dict[str, Timing]
    prompt_seconds: dict[str, Timing]
    outside_share: dict[str, float]
    bytes_read: dict[str, float]
    reads: list[LayerRead]

    def ratio(self, contender: str) -> Ratio:
        """Speed-up of decoding over the model's dense self."""
        return Ratio.of(self.decode_seconds["torch"], self.decode_seconds[contender])


class DecodeBench(BaseModel):
    """Everything.

    Attributes:
        dtype: Of the hidden states, of torch's contender and of the predictors.
        weights: How the C++ kernels read the weights: stored (as dtype says), int8 or int4.
    """

    hidden: int
    neurons: int
    rank: int
    dtype: str
    weights: str
    threads: int
    repeats: int
    device: str
    processor: str
    load_before: float
    ffn: list[FfnPoint]
    models: list[ModelPoint]


def formats(dtype: str, weights: str) -> str:
    """What is read and computed in, in words."""
    return dtype if weights == "stored" else f"{weights} weight blocks on {dtype}"


def crossover(points: Sequence[FfnPoint]) -> tuple[int | None, int | None]:
    """The largest batch up to which exact decoding beats torch's dense product, and the next one that was measured.

    Of the points whose gates decide alone at the active share of the largest batch; the first is None where torch wins even
    at the smallest, the second where it never does.
    """
    largest = max(points, key=lambda one: one.tokens)
    same = (largest.active_share, largest.gate_share, largest.threads)
    batches = {
        one.tokens: one.ratio("exact", "torch").median > 1
        for one in points
        if (one.active_share, one.gate_share, one.threads) == same
    }
    won = None
    for tokens in sorted(batches):
        if not batches[tokens]:
            return won, tokens
        won = tokens
    return won, None
