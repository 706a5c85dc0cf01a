"""How a model becomes sparse: `activation`, `conversion`, `blending`, `penalty` and `distillation`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field

from sparsify.errors import RecipeError, check_choice
from sparsify.models.activations import ACTIVATIONS, activation_names
from sparsify.recipe.fields import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Section,
    Share,
    checked,
    one_of,
)

CALIBRATED_REPLACEMENT = "calibrated_replacement"
"""The method that a conversion has unless it names another."""
UPCYCLINGS = ("mohd",)
"""Methods that make another architecture, and no mask. What a recipe says about masks must be known without importing methods."""
REFIT_TARGETS = {"own": 0.0, "mix": 0.5, "residual": 1.0}
"""Part of the accumulated residual-stream error that a refit corrects, in addition to reproducing the block's output."""

BELOW_ONE = "0 (replace at once) or above, and below 1: the run must end with the activation itself."


@dataclass
class ActivationSection(Section):
    """The feed-forward activation to train with: a name of `models.ACTIVATIONS`."""

    ffn_activation: Annotated[str, one_of(ACTIVATIONS)]
    gate_threshold: NonNegativeFloat | None = None
    """What `shifted_relu` subtracts from the gate, and what `fatrelu` keeps it above; null takes the published value.
    No other activation has one."""

    @property
    def model_gate_threshold(self) -> float:
        if self.gate_threshold is not None:
            return self.gate_threshold
        return ACTIVATIONS[self.ffn_activation].gate_threshold


def check_activation(
    activation: ActivationSection,
    name_key: str = "activation.ffn_activation",
    threshold_key: str = "activation.gate_threshold",
) -> None:
    """Raises RecipeError for an unknown activation, and for a gate threshold that it would ignore; the keys name both."""
    name, threshold = activation.ffn_activation, activation.gate_threshold
    check_choice(name_key, name, tuple(ACTIVATIONS))
    if threshold is not None and not ACTIVATIONS[name].has_gate_threshold:
        with_one = activation_names(lambda row: row.has_gate_threshold)
        raise RecipeError(
            f"{threshold_key}={threshold:g} would be ignored: {name} has none.",
            allowed=f"Activations with a gate threshold: {', '.join(with_one)}.",
            next_step="Omit it, or choose one of them.",
        )
    if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
        raise RecipeError(f"{threshold_key} is {threshold}.", allowed="0 or above.")


@dataclass
class ConversionSection(Section):
    """Calibration of the model before training (`docs/calibration.md`)."""

    calibration_tokens: NonNegativeInt = 0
    """Training tokens of the mixture for the calibrated replacement: sign flips, thresholds and reconstruction of the down
    projections, layer by layer. 0 replaces the activation and changes no weights."""
    refit_target: Annotated[str, one_of(REFIT_TARGETS)] = "mix"
    """Output that a refitted block reproduces, one of REFIT_TARGETS: `own`, its dense output; `residual`, that plus the error of
    the layers before it; `mix`, that plus half of the error."""
    ridge: PositiveFloat = 0.01
    """Ridge penalty that keeps a refit (also those of `blending.refit_milestones`) near the old weights, as a share of the mean
    of its Gram matrix's diagonal."""
    target_zeros: (
        Annotated[
            float,
            Field(ge=0, lt=1, description="A share between 0 and 1, such as 0.9; null sets no mask."),
        ]
        | None
    ) = None
    """Share of exact zeros that the method's mask gives every layer on the calibration tokens; null sets none."""
    target_density: (
        Annotated[
            float,
            Field(gt=0, le=1, description="Above 0, up to 1, such as 0.5; null leaves it to target_zeros."),
        ]
        | None
    ) = None
    """Share of the weights of all linear projections that a token may read under the method's mask: `target_zeros` is solved for it
    from the model's shapes. null takes `target_zeros` as it is."""
    weight_sparsity: (
        Annotated[
            float,
            Field(gt=0, lt=1, description="Above 0 and below 1, such as 0.5; null leaves the weights dense."),
        ]
        | None
    ) = None
    """Share of the weights of every linear projection that a method of weight sparsity sets to zero (`magnitude`, `wanda`,
    `sparsegpt`); training keeps these zeros. null for none."""
    method: str = CALIBRATED_REPLACEMENT
    """Method that runs on the calibration tokens: a name of `docs/methods.md`. `calibrated_replacement` replaces the
    activation and sets thresholds if `target_zeros` is given; `mohd` makes another architecture; `magnitude`, `wanda` and
    `sparsegpt` make weights sparse; `rtn`, `gptq`, `smoothquant` and `rrs` make integers, which are not trained; the others are masks
    on the unchanged activation."""
    method_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the method other than `target_zeros`."""
    refit: bool | None = None
    """Whether to reconstruct the layer's output matrix under the mask; null takes the method's own default."""
    remainder: Annotated[str, one_of(("none", "constant"))] = "none"
    """What replaces the elements that a mask drops, in the output of the projections that read them: `constant`, their mean over
    the calibration tokens; `none`, nothing, or what the method itself says."""
    allocation: Annotated[str, one_of(("uniform", "sensitivity"))] = "uniform"
    """Zeros of each layer: `uniform`, `target_zeros` in all; `sensitivity`, that in the mean, and fewer where masking that layer alone
    raises the loss more. For that the mask is fitted twice more, and the whole model is held in memory."""
    drop_source_mask: bool = False
    """Whether to remove the mask that the source stores, with or without a calibration. The weights stay as they
    are, without the rotations of that mask."""

    @property
    def makes_mask(self) -> bool:
        """Whether the model that is trained stores a mask."""
        own = self.target_zeros is not None or self.method not in (CALIBRATED_REPLACEMENT, *UPCYCLINGS)
        return own and self.weight_sparsity is None and self.calibration_tokens > 0


def check_conversion(conversion: ConversionSection) -> None:
    """Refuses values out of range, for settings that do not come from a recipe; raises `RecipeError`."""
    checked(ConversionSection, asdict(conversion), key="conversion")


@dataclass
class BlendingSection(Section):
    """How the dense activation is blended into `activation.ffn_activation`."""

    budget_share: Annotated[float, Field(ge=0, lt=1, description=BELOW_ONE)] = 0.0
    """Share of the budget over which the dense activation is blended linearly into the sparse one: below 1, so that the run
    ends with the sparse one itself. 0 replaces it before the first step."""
    refit_milestones: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Number of equal steps of the blending, from the first token on. Each step refits every down projection, so that blocks
    reproduce their output under the blend before. 0 blends linearly, without refits."""
    refit_tokens: NonNegativeInt = 0
    """Training tokens of each of these refits: those that follow the milestone."""


@dataclass
class PenaltyStageSection(Section):
    """Weight of the activation penalty up to a point of the run."""

    until_budget_share: float
    """Where the stage ends, as a share of the training budget; 1 for the last stage."""
    weight: NonNegativeFloat
    """Weight at its end, reached from the previous stage's weight by half a sine wave; constant in the first stage."""


@dataclass
class PenaltySection(Section):
    """An L1 penalty on the activations, added to the loss, that drives neurons to exact zeros while the run trains."""

    stages: list[PenaltyStageSection] = field(default_factory=list)
    """ProSparse's progressive penalty (arXiv 2402.13516, section 3.2). Empty for none."""
    gate_share: Share = 0.0
    """Part of the penalty that lies on the gate's factor alone, 0 to 1; the rest lies on the product. An exact kernel that
    computes the gate first gains only from the gate's own zeros."""
    target_zeros: (
        Annotated[
            float,
            Field(gt=0, lt=1, description="Above 0 and below 1, such as 0.9; null sets no target."),
        ]
        | None
    ) = None
    """Share of exact zeros at the end of the run: a controller then sets the penalty's weight from the measured share at every
    step, instead of by stages."""


@dataclass
class GroupRoutingSection(Section):
    """How the routers of groups that a model stores are trained (`docs/routing.md`): softly first, then frozen."""

    soft_tokens: NonNegativeInt = 0
    """Training tokens of the first stage, in which neurons are multiplied by their group's sigmoid(score), and routers learn. After it
    groups are on or off, and routers are frozen. 0 trains under the routers as they are."""
    efficiency_weight: PositiveFloat | None = None
    """Weight of the mean square of sigmoid(score), over tokens, groups and layers: the larger, the fewer groups stay on."""
    active_share: (
        Annotated[
            float,
            Field(gt=0, lt=1, description="Above 0 and below 1, such as 0.5; null leaves it to efficiency_weight."),
        ]
        | None
    ) = None
    """Share of groups that are on at the end of the first stage, mean over layers: a controller sets the efficiency weight for it."""
    separability_weight: NonNegativeFloat = 0.001
    """Weight of the mean of 1 / (sigmoid(score) - threshold)² at the end of the first stage; 0 for the first 70% of it, then in a straight
    line. It pushes scores away from the threshold. The paper has 0.5, whose gradient outweighs that of the text here
    (docs/routing.md)."""
    learning_rate_factor: PositiveFloat = 1.0
    """What the learning rate of routers is, as a multiple of that of all other parameters."""


@dataclass
class DistillationSection(Section):
    """Distillation from the dense source: each term is added to the loss, times its weight."""

    logits_weight: NonNegativeFloat = 0.0
    """Weight of the Kullback-Leibler divergence of the model's next-token distribution from the source's, in nats per label.
    0: no such term."""
    ffn_weight: NonNegativeFloat = 0.0
    """Weight of the feed-forward blocks' error: squared distance of a block's output from the source's, relative to the
    square of the source's output, mean over labelled tokens and layers. An output of zero has error 1. 0: no such term."""

    squarehead_weight: NonNegativeFloat = 0.0
    """Weight of SquareHead (arXiv 2310.06927): squared distance of the residual stream after each layer from the source's, relative
    to the mean square of the source's over the sequence, mean over labelled tokens, summed over layers. 0: no such term."""

    @property
    def is_on(self) -> bool:
        return self.logits_weight > 0 or self.ffn_weight > 0 or self.squarehead_weight > 0


def check_group_routing(routing: GroupRoutingSection, budget_tokens: int) -> None:
    """Refuses settings of routers that would be ignored, or that contradict each other; raises `RecipeError`."""
    if not routing.soft_tokens:
        given, defaults = asdict(routing), asdict(GroupRoutingSection())
        for key in (key for key in given if given[key] != defaults[key]):
            raise RecipeError(
                f"group_routing.{key}={given[key]} would be ignored: group_routing.soft_tokens is 0, so routers learn nothing.",
                next_step="Set group_routing.soft_tokens too, or omit it.",
            )
        return
    if routing.soft_tokens > budget_tokens:
        raise RecipeError(
            f"group_routing.soft_tokens is {routing.soft_tokens}.",
            allowed=f"0 to {budget_tokens}, what the run trains on; the rest of it trains under frozen routers.",
        )
    if (routing.efficiency_weight is None) == (routing.active_share is None):
        both = routing.efficiency_weight is not None
        raise RecipeError(
            f"group_routing.soft_tokens is {routing.soft_tokens}, and group_routing.efficiency_weight and active_share are "
            f"{'both set' if both else 'both null'}.",
            allowed="One of them: the weight itself, or the share of groups that a controller sets it for.",
            next_step="Omit one of them." if both else "Set group_routing.active_share, such as 0.5.",
        )
