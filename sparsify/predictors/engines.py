"""What an engine computes of a model with predicted masks: predictors are evaluated for one engine's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch

from sparsify.models import SparseModel
from sparsify.models.ffn_activation import FfnActivation
from sparsify.predictors.format import BlockPredictor, Predictors, folded, norm_weight


@dataclass(frozen=True)
class Engine:
    """How an engine computes feed-forward blocks.

    Attributes:
        title: Name in messages.
        gate_first: Whether it has an exact kernel that reads the gate first and needs no predictor. Predictors must then read
            fewer bytes than it; without such a kernel, fewer than dense.
        keeps_thresholds: Whether it applies the thresholds that a model stores on its neurons.
        at_threshold: Whether a score equal to the predictors' threshold switches a neuron on.
    """

    title: str
    gate_first: bool
    keeps_thresholds: bool
    at_threshold: bool


OWN, POWERINFER = "sparsify", "powerinfer"
ENGINES = {
    OWN: Engine("sparsify", gate_first=True, keeps_thresholds=True, at_threshold=False),
    POWERINFER: Engine("PowerInfer", gate_first=False, keeps_thresholds=False, at_threshold=True),
}


def as_held(predictors: Predictors, model: SparseModel, engine: str) -> Predictors:
    """The predictors as an engine holds them. PowerInfer's take the residual before the norm, and are rounded to F16."""
    if engine != POWERINFER:
        return predictors
    blocks = predictors.blocks
    if predictors.facts.input == "normed":
        blocks = {key: folded(block, norm_weight(model, key[0]), 1.0) for key, block in blocks.items()}
    held = {key: BlockPredictor(*(matrix.half().float() for matrix in block)) for key, block in blocks.items()}
    return Predictors(predictors.facts.model_copy(update={"input": "residual"}), held)


class WithoutThresholds:
    """Context manager: a model computes without the thresholds that it stores on its neurons.

    Enter it before a SparsityProbe.
    """

    def __init__(self, model: SparseModel) -> None:
        self._model = model
        self._undo: list[Callable[[], None]] = []
        self._fired: torch.Tensor | None = None

    def __enter__(self) -> Self:
        for block in self._model.ffn_blocks():
            own: FfnActivation = block.ffn_activation
            if own.is_masked:
                bare = FfnActivation(own.name, own.gate_threshold)
                bare.register_forward_hook(partial(self._keep, own), with_kwargs=True)
                self._undo.append(partial(setattr, block, "ffn_activation", own))
                block.ffn_activation = bare
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def fired(self, product: torch.Tensor) -> torch.Tensor:
        """Which neurons of the running block fire with the thresholds, for their activations without, [rows, neurons]."""
        return product != 0 if self._fired is None else self._fired

    def _keep(self, own: FfnActivation, bare: Any, args: Any, kwargs: Any, product: torch.Tensor) -> None:
        self._fired = (own(*args, **kwargs) != 0).flatten(0, -2)
