"""The sections `training`, `optimizer`, `stability`, `checkpoint` and `baseline`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from sparsify.models.activations import ACTIVATIONS
from sparsify.recipe.fields import (
    LearningRate,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    one_of,
)

SEED = 1


@dataclass
class TrainingSection(Section):
    """Budget, batches and precision of training, and the kernels that compute it."""

    budget_tokens: PositiveInt
    """Tokens to train on, rounded down to whole steps."""
    sequence_length: Annotated[int, Field(ge=1, le=1 << 24)]
    """Length of one packed training sequence; at most the model's context."""
    global_batch_size: Annotated[int, Field(ge=1, le=10_000_000)]
    """Sequences per optimiser step, over all processes."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65_536)]
    """Sequences per forward pass and process."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """`bf16` (with fp32 master weights; needs ZeRO stage 1 or above) or `fp32`."""
    gradient_checkpointing: bool = False
    router_aux_loss_coefficient: (
        Annotated[float, Field(ge=0, le=1000, description="0 to 1000; null takes the checkpoint's own.")] | None
    ) = None
    """Weight of the load-balancing loss of a Mixtral or a MoHD; null takes the checkpoint's own."""
    seed: Seed = SEED
    fused_activation: Literal["auto", "triton", "inductor", "off"] = "auto"
    """Kernel of the activation's forward and backward pass: `triton` (needs a GPU), `inductor` (compiled in up to a minute at
    the start), or `off` for the model's own code. `auto` is triton where it is available, and off otherwise. The values
    are the same."""
    liger_kernels: bool = False
    """Liger's kernels for the norms, the rotary embedding and the loss of training steps, without whole logits; needs a GPU and
    liger-kernel. Never chosen automatically: they round differently."""
    compile: bool = False
    """torch.compile on every decoder layer while it trains; ZeRO stage 0 to 2."""
    count_zeros: bool = False
    """Write the share of exact zeros of every step into metrics.jsonl, counted in the pass that makes them."""


@dataclass
class OptimizerSection(Section):
    """AdamW with linear warm-up and cosine decay, as functions of the tokens seen."""

    peak_learning_rate: LearningRate
    final_learning_rate: NonNegativeFloat
    warmup_tokens: NonNegativeInt
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    epsilon: Annotated[float, Field(ge=1e-20, le=1)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Applied to matrices only, not to norms."""
    max_gradient_norm: PositiveFloat = 1.0


@dataclass
class StabilitySection(Section):
    """What to do about a bad step: one whose loss or gradient is NaN or infinite, or whose loss is a spike.

    A bad step never changes weights or Adam's moments. Its sequences count as seen; metrics.jsonl names them.
    """

    on_bad_step: Literal["skip", "rollback", "stop"] = "skip"
    """`skip` continues with the next batch; `rollback` also reverts every step since the last checkpoint and skips their
    sequences; `stop` saves the state from before the step and ends the run with a report."""
    spike_deviations: PositiveFloat | None = 8.0
    """A loss is a spike if the mean of it and the steps before it is this many standard deviations of such means above the value
    expected from its sources' recent losses, and above what a few odd sequences could add; null detects only NaN and infinity."""
    recent_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Recent steps from which the expected loss and its deviation are computed."""
    max_bad_steps: PositiveInt = 8
    """Bad steps allowed among the recent ones. With more the run stops with a report, unless they were spikes and the held-out
    loss shows that the text became harder, not the model worse."""
    underused_expert_load: PositiveFloat = 0.1
    """A Mixtral's expert is under-utilised below this fraction of an even share of its layer's tokens; a MoHD's sub-dimension
    below this fraction of an even share of its router's choices."""
    underused_expert_steps: PositiveInt = 100
    """Consecutive steps of under-utilisation after which a warning names the expert, once."""


@dataclass
class CheckpointSection(Section):
    """When to save checkpoints, and which to keep."""

    every_tokens: PositiveInt
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep. With 1 there is no fallback if the newest is damaged."""
    keep_every_tokens: PositiveInt | None = None
    """Interval of checkpoints that are never removed; a multiple of `every_tokens`."""


@dataclass
class BaselineSection(Section):
    """A second run on the same tokens that differs in its activation only."""

    ffn_activation: Annotated[str, one_of(ACTIVATIONS)] | None = None
    """`swiglu` (of Gemma, `geglu`) trains the dense baseline, without any mask, after the sparse run; null trains none. A run that has this
    activation itself (`activation=swiglu`) and no mask is the baseline and trains no other."""
