"""Activation blending: the dense activation turns into the sparse one while the model trains.

Both factors of a feed-forward block are mixed, (1 - a) of the dense activation's and a of the sparse one's. From SwiGLU to dReLU
that leaves the positive sides nearly as they are and lowers the slope of the negative ones, 1 at the beginning and 0 at the end.
The share a is a pure function of the tokens seen, so that nothing needs to be saved for it; with refits at milestones
(`sparsify.methods.refits`) it follows from how many of them are done. At 1 a block has the plain activation itself, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import nn

from sparsify.conversion.sparse_folder import check_activation
from sparsify.methods.objective import Objective, TrainingRun, objective
from sparsify.models import FfnActivation, SparseConfig, SparseModel
from sparsify.recipe.recipe import Recipe


class BlendedActivation(FfnActivation):
    """A block's activation on its way from `base` to `name`; only ever made of a finished FfnActivation.

    Its name says what it becomes. `check_activation` refuses it: what it applies is not that yet.
    """

    base: FfnActivation
    share: float

    def gate_factor(self, gate: torch.Tensor) -> torch.Tensor:
        return torch.lerp(self.base.gate_factor(gate), super().gate_factor(gate), self.share)

    def up_factor(self, up: torch.Tensor) -> torch.Tensor:
        return torch.lerp(self.base.up_factor(up), super().up_factor(up), self.share)

    def extra_repr(self) -> str:
        return f"{self.base.name} to {super().extra_repr()}, {self.share:.0%} of the way"


def blended_share(recipe: Recipe, seen_tokens: int, refits: int = 0) -> float:
    """How much of the sparse activation is in force.

    From 0 to 1 in a straight line over the tokens seen, then 1; with refits in equal steps, one for each that is done.
    """
    if recipe.blending.refit_milestones:
        return refits / recipe.blending.refit_milestones
    tokens = blend_tokens(recipe)
    return min(1.0, seen_tokens / tokens) if tokens else 1.0


def blend_tokens(recipe: Recipe) -> float:
    return recipe.blending.budget_share * recipe.num_steps * recipe.step_tokens


def blend(model: SparseModel, recipe: Recipe, seen_tokens: int, refits: int = 0) -> float:
    """Gives every block the activation that is in force, whatever it had before.

    Returns:
        `blended_share`.

    Raises:
        RuntimeError: If a block that must have the plain activation applies another one.
    """
    share = blended_share(recipe, seen_tokens, refits)
    if recipe.blending.budget_share:
        for block in model.ffn_blocks():
            set_share(block.ffn_activation, model.config, share)
        if share == 1:
            check_activation(model, recipe.activation.ffn_activation)
    return share


def set_share(activation: FfnActivation, config: SparseConfig, share: float) -> None:
    """Gives one block the mixture with so much of the sparse activation; at 1 its plain one."""
    if share < 1:
        _mix(activation, config, share)
        return
    _become(activation, FfnActivation)
    for name in ("base", "share"):
        vars(activation).pop(name, None)


def activation_at(activation: FfnActivation, config: SparseConfig, share: float, expert: int | None) -> FfnActivation:
    """A copy of a block's activation, or of that of one of its experts, with so much of the sparse one; see `set_share`."""
    copy = FfnActivation(activation.name, activation.gate_threshold)
    copy.with_masks_of(activation, expert)
    set_share(copy, config, share)
    return copy


@contextmanager
def plain(model: SparseModel) -> Iterator[None]:
    """Makes every block apply its plain activation: the one that a checkpoint saved now is loaded with."""
    activations: list[FfnActivation] = [block.ffn_activation for block in model.ffn_blocks()]
    mixed = [one for one in activations if type(one) is BlendedActivation]
    for activation in mixed:
        _become(activation, FfnActivation)
    try:
        yield
    finally:
        for activation in mixed:
            _become(activation, BlendedActivation)


def _become(activation: nn.Module, kind: type[FfnActivation]) -> None:
    # Re-classing keeps the module itself, with all that hangs on it: hooks, thresholds.
    activation.__class__ = kind


def _mix(activation: FfnActivation, config: SparseConfig, share: float) -> None:
    _become(activation, BlendedActivation)
    assert isinstance(activation, BlendedActivation)
    activation.share = share
    if "base" not in vars(activation):
        # Next to the module's own attributes, not among its children, which are part of the model.
        vars(activation)["base"] = FfnActivation(config.base_ffn_activation, config.base_ffn_gate_threshold)


def is_blended(model: SparseModel) -> bool:
    return any(type(block.ffn_activation) is BlendedActivation for block in model.ffn_blocks())


@objective
class Blending(Objective):
    name: ClassVar[str] = "blending"

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._share = 0.0

    @classmethod
    def of(cls, run: TrainingRun) -> Self | None:
        blending = run.recipe.blending
        return cls(run) if blending.budget_share and not blending.refit_milestones else None

    def blend(self) -> float:
        return blend(self._run.engine.module, self._run.recipe, self._run.state.seen_tokens)

    @contextmanager
    def step(self) -> Iterator[None]:
        self._share = self.blend()
        yield

    def after_step(self, loss: float) -> dict[str, Any]:
        return {} if self._share == 1 else {"blended_share": self._share}

    def before_validation(self) -> dict[str, Any]:
        share = self.blend()
        return {} if share == 1 else {"label": "blending", "blended_share": share}

    def as_saved(self) -> AbstractContextManager[object]:
        return plain(self._run.engine.module)
