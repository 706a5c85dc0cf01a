"""How much to train, in which steps, and what is kept: `training`, `optimizer`, `stability`, `checkpoint`, `baseline`."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

FUSED_ACTIVATION = ("auto", "triton", "inductor", "off")
ON_BAD_STEP = ("skip", "rollback", "stop")
EXECUTION_SETTINGS = (
    "micro_batch_size",
    "gradient_checkpointing",
    "fused_activation",
    "liger_kernels",
    "compile",
    "count_zeros",
)
"""Settings of `training` that change how a step is computed, but not which one: a run may go on with others."""


@dataclass
class TrainingSection:
    """How much to train, in which pieces."""

    budget_tokens: int = MISSING
    """Tokens to train on, rounded down to whole steps."""
    sequence_length: int = MISSING
    """Length of one packed training sequence; at most the model's context."""
    global_batch_size: int = MISSING
    """Sequences per optimiser step, over all processes."""
    micro_batch_size: int = MISSING
    """Sequences per forward pass and process."""
    precision: str = "bf16"
    """`bf16` (with fp32 master weights; needs ZeRO stage 1 or above) or `fp32`."""
    gradient_checkpointing: bool = False
    router_aux_loss_coefficient: float | None = None
    """Weight of a Mixtral's load-balancing loss; null takes the checkpoint's own."""
    seed: int = 1
    fused_activation: str = "auto"
    """The activation in one pass forward and one back: `triton` (a GPU), `inductor` (a compiler builds it: a minute or less at
    the start), or `off` for the model's own code. `auto` is triton where it is, else off. Same values in each."""
    liger_kernels: bool = False
    """Liger's kernels for the norms, the rotary embedding and the loss of training steps, without whole logits; needs a GPU and
    liger-kernel. Never chosen for you: they round differently."""
    compile: bool = False
    """torch.compile on every decoder layer while it trains; ZeRO stage 0 to 2."""
    count_zeros: bool = False
    """Write the share of exact zeros of every step into metrics.jsonl, counted in the pass that makes them."""


@dataclass
class OptimizerSection:
    """AdamW with linear warm-up and cosine decay, as functions of the tokens seen."""

    peak_learning_rate: float = MISSING
    final_learning_rate: float = MISSING
    warmup_tokens: int = MISSING
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices only, not to norms."""
    max_gradient_norm: float = 1.0


@dataclass
class StabilitySection:
    """What to do about a bad step: one whose loss or gradient is NaN or infinite, or whose loss is a spike.

    A bad step never changes weights or Adam's moments. Its sequences count as seen; metrics.jsonl names them.
    """

    on_bad_step: str = "skip"
    """`skip` goes on with the next batch; `rollback` also takes back every step since the last checkpoint and leaves their
    sequences out; `stop` saves the state from before the step and ends the run with a report."""
    spike_deviations: float | None = 8.0
    """A loss is a spike when it lies this many robust standard deviations above what the recent losses of its sources let
    expect; null judges NaN and infinity only."""
    recent_steps: int = 64
    """Steps that a loss is judged by. A source is judged from a quarter of them on."""
    max_bad_steps: int = 8
    """More bad steps than this among the recent ones stop the run with a report."""
    underused_expert_load: float = 0.1
    """A Mixtral's expert starves when it gets less than this part of an even share of its layer's tokens …"""
    underused_expert_steps: int = 100
    """… for so many steps in a row: then an alarm names it, once."""


@dataclass
class CheckpointSection:
    """When to save, and how much of it to keep."""

    every_tokens: int = MISSING
    keep_last: int = 2
    """The newest checkpoints. With 1 there is none to go back to when the newest is damaged."""
    keep_every_tokens: int | None = None
    """Keep also the checkpoint at each multiple of so many tokens, for good: a multiple of `every_tokens`."""


@dataclass
class BaselineSection:
    """A second run on the same tokens that differs in its activation only."""

    ffn_activation: str | None = None
    """`swiglu` trains the dense baseline after the sparse run; null trains none. A run that has this activation itself
    (`activation=swiglu`) is the baseline: `validate` sets null."""
