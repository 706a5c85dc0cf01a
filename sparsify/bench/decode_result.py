"""The result of `sparsify bench decode`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from pydantic import BaseModel

VARIANTS = ("torch", "dense", "exact", "predictor")
"""torch's dense block, our dense kernel (C++, or Triton on a GPU), the exact sparse kernel, the sparse kernel with a predictor."""


MODEL_VARIANTS = (*VARIANTS, "packed", "both")
"""Of a model whose weights are sparse also: every row, without the zeros among the weights; and so the rows that are needed."""


class Timing(BaseModel):
    """Seconds of interleaved repeats, in the order of measurement."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return median(self.seconds)


class SpeedUp(BaseModel):
    """Speed-up: median and interquartile range over the pairs of each repeat."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, slower: Timing, faster: Timing) -> SpeedUp:
        pairs = sorted(a / b for a, b in zip(slower.seconds, faster.seconds, strict=True))
        quarter = len(pairs) // 4
        return cls(median=median(pairs), low=pairs[quarter], high=pairs[-1 - quarter])

    def __str__(self) -> str:
        return f"{self.median:.2f} ±{(self.high - self.low) / 2:.2f}"


class FfnPoint(BaseModel):
    """One block at one sparsity.

    Attributes:
        active_share: Share of neurons whose product is not zero, for one token.
        gate_share: Share of neurons whose gate is positive, for one token.
        tokens: Batch size.
        bytes_read: Bytes of weights read, by variant.
        read_bytes_per_second: Memory bandwidth, measured interleaved with the variants.
        seconds: Timing, by variant.
    """

    active_share: float
    gate_share: float
    tokens: int
    threads: int
    bytes_read: dict[str, int]
    read_bytes_per_second: float
    seconds: dict[str, Timing]

    def ratio(self, variant: str, baseline: str) -> SpeedUp:
        return SpeedUp.of(self.seconds[baseline], self.seconds[variant])

    def ideal(self, variant: str) -> float:
        """Speed-up over the dense kernel if only the bytes read mattered."""
        return self.bytes_read["dense"] / self.bytes_read[variant]

    def read_share(self, variant: str) -> float:
        speed = self.bytes_read[variant] / self.seconds[variant].median
        return speed / self.read_bytes_per_second


class LayerRead(BaseModel):
    layer: int
    fired_share: float
    touched_share: float

    @property
    def ideal(self) -> float:
        """Speed-up of the block if only the bytes read mattered."""
        return 1 / self.touched_share


class ModelPoint(BaseModel):
    """Timings of a whole model that decodes the same tokens densely and sparsely.

    Attributes:
        weights: Format of the feed-forward weights for the kernels: stored, int8 or int4.
        decode_seconds: Seconds per token, by variant.
        prompt_seconds: Seconds for the prompt, by variant. All variants compute prompts densely; the sparse ones with
            down_proj in the kernels' memory layout.
        without_llamacpp: Why llama.cpp was not measured; None if it was.
        captured: Variants whose steps were one CUDA graph each; the others ran as `generate()` runs them.
        parts: Seconds per token by part of the model, by variant. Native steps name all parts; `overhead` is Python and everything
            else between steps. Of others only `ffn` is known, of llama.cpp and on a GPU nothing.
        bytes_read: Bytes of weights read per token, by variant.
        read_bytes_per_second: Memory bandwidth, measured interleaved with the variants.
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
    without_llamacpp: str | None
    captured: list[str] = []
    parts: dict[str, dict[str, float]]
    bytes_read: dict[str, float]
    read_bytes_per_second: float
    reads: list[LayerRead]

    def ratio(self, variant: str, baseline: str = "torch") -> SpeedUp:
        return SpeedUp.of(self.decode_seconds[baseline], self.decode_seconds[variant])

    def read_share(self, variant: str) -> float:
        """Share of the memory bandwidth that a variant reads weights with."""
        return self.bytes_read[variant] / self.decode_seconds[variant].median / self.read_bytes_per_second


class SpeculationPoint(BaseModel):
    """A step of several tokens against a step of one.

    Attributes:
        variant: `dense` or `exact`.
        overlap: Share of the firing neurons that all tokens have in common.
        one: Timing of one token, in the same repeats.
    """

    variant: str
    tokens: int
    overlap: float
    seconds: Timing
    one: Timing

    @property
    def cost(self) -> SpeedUp:
        """Time of the step in steps of one token."""
        return SpeedUp.of(self.seconds, self.one)

    @property
    def break_even(self) -> float | None:
        """Share of the drafted tokens that must be accepted for drafts that cost nothing to pay; None if even all would not do.

        A step of n tokens verifies n - 1 drafts. If each is accepted with the same probability a, given those before it, it yields
        1 + a + ... + a^(n-1) tokens (arXiv 2211.17192, equation 1).
        """
        cost, low, high = self.cost.median, 0.0, 1.0
        if cost > self.tokens:
            return None
        for _ in range(40):
            middle = (low + high) / 2
            enough = sum(middle**power for power in range(self.tokens)) >= cost
            low, high = (low, middle) if enough else (middle, high)
        return high


class DecodeBench(BaseModel):
    """The result of the benchmark.

    Attributes:
        dtype: Dtype of hidden states, torch's dense block and predictors.
        weights: Format of the weights for the C++ kernels: stored (in `dtype`), int8 or int4.
        rank: Rank of predictors; None for a quarter of the hidden size.
    """

    hidden: int
    neurons: int
    rank: int | None
    dtype: str
    weights: str
    threads: int
    repeats: int
    device: str
    processor: str
    load_before: float
    ffn: list[FfnPoint]
    models: list[ModelPoint]
    speculation: list[SpeculationPoint] = []


def formats(dtype: str, weights: str) -> str:
    return dtype if weights == "stored" else f"{weights} weight blocks on {dtype}"


def crossover(points: Sequence[FfnPoint]) -> tuple[int | None, int | None]:
    """The largest batch up to which exact decoding is faster than torch's dense block, and the next larger measured batch.

    Uses the points with the shares and threads of the largest batch. The first is None if torch is faster even at the smallest
    batch, the second if exact decoding is faster at all of them.
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
