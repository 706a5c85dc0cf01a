"""What `sparsify bench train` measures."""

from __future__ import annotations

from pydantic import BaseModel


class Ratio(BaseModel):
    """A ratio over the pairs of blocks: its median, and the half of them that lies in the middle."""

    median: float
    lower_quartile: float
    upper_quartile: float


class Loop(BaseModel):
    """One training loop."""

    tokens_per_second: float
    """Median over the blocks."""
    step_seconds: list[float]
    """Of one step, in each block."""
    losses: list[float]
    """Of the first steps; all loops start from the same weights and see the same windows."""


class Probe(BaseModel):
    """What the validation costs that reads the sparsity, and what the probe has in it."""

    every_tokens: int
    """Training tokens between two validations: eval.every_tokens."""
    held_out_tokens: int
    validation_seconds: float
    probe_seconds: float
    """Of it, what the same validation would save without the probe."""
    validation_share: float
    """Time of validations as a share of the training between them."""
    probe_share: float


class TrainBench(BaseModel):
    """Loops over the same data, model, precision and DeepSpeed configuration."""

    recipe: str
    parameters: int
    precision: str
    zero_stage: int
    device: str
    clock: str
    threads: int
    step_tokens: int
    window_tokens: int
    block_steps: int
    blocks: int
    bare: Loop
    ours: Loop
    trainer: Loop
    loop_overhead: Ratio
    """Seconds of our loop's step over those of the bare engine's, minus 1."""
    speed_against_trainer: Ratio
    """Tokens/s of our loop over the Trainer's."""
    probe: Probe
