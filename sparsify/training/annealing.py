"""The annealed swap: the dense activation fades into the sparse one while the model trains.

Both factors of a feed-forward block are mixed, (1 - a) of the dense activation's and a of the sparse one's. From SwiGLU to dReLU
that leaves the positive sides nearly as they are and lowers the slope of the negative ones, 1 at the beginning and 0 at the end.
The share a is a pure function of the tokens seen, so that nothing needs to be saved for it. At 1 a block has the plain
activation itself, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparsify.conversion.folder import check_activation
from sparsify.models import FfnActivation, SparseConfig, SparseModel
from sparsify.recipe import Recipe


class AnnealedActivation(FfnActivation):
    """A block's activation on its way from `base` to `name`; only ever made of a finished FfnActivation.

    Its name says what it becomes. `check_activation` refuses it: what it applies is not that yet.
    """

    base: FfnActivation
    share: float

    def gate_factor(self, gate: torch.Tensor) -> torch.Tensor:
        """Left factor of the product, from gate pre-activations of any shape."""
        return torch.lerp(self.base.gate_factor(gate), super().gate_factor(gate), self.share)

    def up_factor(self, up: torch.Tensor) -> torch.Tensor:
        """Right factor of the product, from up pre-activations of any shape."""
        return torch.lerp(self.base.up_factor(up), super().up_factor(up), self.share)

    def extra_repr(self) -> str:
        return f"{self.base.name} to {super().extra_repr()}, {self.share:.0%} of the way"


def annealed_share(recipe: Recipe, seen_tokens: int) -> float:
    """How much of the sparse activation is in force after so many tokens: from 0 to 1 in a straight line, then 1."""
    anneal_tokens = recipe.swap.anneal_token_share * recipe.num_steps * recipe.step_tokens
    return min(1.0, seen_tokens / anneal_tokens) if anneal_tokens else 1.0


def anneal(model: SparseModel, recipe: Recipe, seen_tokens: int) -> float:
    """Gives every block the activation that is due after so many tokens, whatever it had before.

    Args:
        model: The model that trains, converted to the recipe's activation.
        recipe: The run's recipe.
        seen_tokens: Training tokens seen.

    Returns:
        `annealed_share`.

    Raises:
        RuntimeError: If a block that must have the plain activation applies something else.
    """
    share = annealed_share(recipe, seen_tokens)
    if share < 1:
        for block in model.ffn_blocks():
            _mix(block.ffn_activation, model.config, share)
    elif recipe.swap.anneal_token_share:
        for block in model.ffn_blocks():
            _become(block.ffn_activation, FfnActivation)
            for name in ("base", "share"):
                vars(block.ffn_activation).pop(name, None)
        check_activation(model, recipe.activation.ffn_activation)
    return share


@contextmanager
def plain(model: SparseModel) -> Iterator[None]:
    """Has every block apply its plain activation meanwhile: what a checkpoint saved now is loaded with."""
    activations: list[FfnActivation] = [block.ffn_activation for block in model.ffn_blocks()]
    mixed = [one for one in activations if type(one) is AnnealedActivation]
    for activation in mixed:
        _become(activation, FfnActivation)
    try:
        yield
    finally:
        for activation in mixed:
            _become(activation, AnnealedActivation)


def _become(activation: nn.Module, kind: type[FfnActivation]) -> None:
    # Re-classing keeps the module itself, with all that hangs on it: hooks, thresholds.
    activation.__class__ = kind


def _mix(activation: FfnActivation, config: SparseConfig, share: float) -> None:
    _become(activation, AnnealedActivation)
    assert isinstance(activation, AnnealedActivation)
    activation.share = share
    if "base" not in vars(activation):
        # Beside the module's own attributes, not among its children, which are part of the model.
        vars(activation)["base"] = FfnActivation(
            config.base_ffn_activation, config.base_ffn_gate_threshold
        )
