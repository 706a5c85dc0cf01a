"""How much to train, in which steps, and what is kept: `training`, `optimizer`, `stability`, `checkpoint`, `baseline`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from sparsify.models.activations import ACTIVATIONS
from sparsify.recipe.fields import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    one_of,
)

SEED = 1


@dataclass
class TrainingSection(Section):
    """How much to train, in which pieces."""

    budget_tokens: PositiveInt
    """Tokens to train on, rounded down to whole steps."""
    sequence_length: PositiveInt
    """Length of one packed training sequence; at most the model's context."""
    global_batch_size: PositiveInt
    """Sequences per optimiser step, over all processes."""
    micro_batch_size: PositiveInt
    """Sequences per forward pass and process."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """`bf16` (with fp32 master weights; needs ZeRO stage 1 or above) or `fp32`."""
    gradient_checkpointing: bool = False
    router_aux_loss_coefficient: (
        Annotated[float, Field(ge=0, description="0 or above; null takes the checkpoint's own.")]
        | None
    ) = None
    """Weight of a Mixtral's load-balancing loss; null takes the checkpoint's own."""
    seed: int = SEED
    fused_activation: Literal["auto", "triton", "inductor", "off"] = "auto"
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
class OptimizerSection(Section):
    """AdamW with linear warm-up and cosine decay, as functions of the tokens seen."""

    peak_learning_rate: PositiveFloat
    final_learning_rate: NonNegativeFloat
    warmup_tokens: NonNegativeInt
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices only, not to norms."""
    max_gradient_norm: PositiveFloat = 1.0


@dataclass
class StabilitySection(Section):
    """What to do about a bad step: one whose loss or gradient is NaN or infinite, or whose loss is a spike.

    A bad step never changes weights or Adam's moments. Its sequences count as seen; metrics.jsonl names them.
    """

    on_bad_step: Literal["skip", "rollback", "stop"] = "skip"
    """`skip` goes on with the next batch; `rollback` also takes back every step since the last checkpoint and leaves their
    sequences out; `stop` saves the state from before the step and ends the run with a report."""
    spike_deviations: PositiveFloat | None = 8.0
    """A loss is a spike when it lies this many robust standard deviations above what the recent losses of its sources let
    expect; null judges NaN and infinity only."""
    recent_steps: PositiveInt = 64
    """Steps that a loss is judged by. A source is judged from a quarter of them on."""
    max_bad_steps: PositiveInt = 8
    """More bad steps than this among the recent ones stop the run with a report."""
    underused_expert_load: PositiveFloat = 0.1
    """A Mixtral's expert starves when it gets less than this part of an even share of its layer's tokens …"""
    underused_expert_steps: PositiveInt = 100
    """… for so many steps in a row: then an alarm names it, once."""


@dataclass
class CheckpointSection(Section):
    """When to save, and how much of it to keep."""

    every_tokens: PositiveInt
    keep_last: PositiveInt = 2
    """The newest checkpoints. With 1 there is none to go back to when the newest is damaged."""
    keep_every_tokens: PositiveInt | None = None
    """Keep also the checkpoint at each multiple of so many tokens, for good: a multiple of `every_tokens`."""


@dataclass
class BaselineSection(Section):
    """A second run on the same tokens that differs in its activation only."""

    ffn_activation: Annotated[str, one_of(ACTIVATIONS)] | None = None
    """`swiglu` trains the dense baseline after the sparse run; null trains none. A run that has this activation itself
    (`activation=swiglu`) is the baseline: `validate` sets null."""
