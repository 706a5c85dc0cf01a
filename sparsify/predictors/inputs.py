"""Inputs of predictors: the input of every feed-forward block while a model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from sparsify.errors import ModelError
from sparsify.models import SparseModel, family_of
from sparsify.models.masking import is_fused
from sparsify.predictors.format import PredictorInput


class BlockInputs:
    """Context manager that holds the input of the layer that is running, and of no other.

    Enter it before a SparsityProbe; its mask and observers can then read rows.

    Args:
        model: A sparse model.
        kind: `normed` for the input of the block, `residual` for the input of its RMS norm.

    Raises:
        ModelError: If something else is between that norm and the block.
    """

    def __init__(self, model: SparseModel, kind: PredictorInput) -> None:
        if difference := family_of(model.config).layer_difference:
            raise ModelError(
                f"The model is a {model.config.model_type}, which has {difference}: its blocks do not read what predictors read.",
                allowed="Predictors are of models whose blocks read the output of a norm, or the residual stream.",
                next_step="Decode it without predictors.",
            )
        self._model, self._kind = model, kind
        self._rows = torch.empty(0)
        self._routing: torch.Tensor | None = None
        self._undo: list[Callable[[], None]] = []
        self.rms = torch.empty(0)
        """RMS of the running layer's residual, [rows]."""

    def __enter__(self) -> Self:
        for layer in self._model.model.layers:
            name = family_of(self._model.config).ffn_norm
            if name is None:
                self._undo.append(layer.mlp.register_forward_pre_hook(self._keep_input).remove)
            else:
                self._undo.append(getattr(layer, name).register_forward_hook(self._keep).remove)
            for module in layer.modules():
                if is_fused(module):
                    hook = module.register_forward_pre_hook(self._route, with_kwargs=True)
                    self._undo.append(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def rows(self, expert: int) -> torch.Tensor:
        """Inputs of the tokens that an expert of the running layer computes, [rows, hidden], in its order of rows."""
        return self.of_expert(self._rows, expert)

    def of_expert(self, per_token: torch.Tensor, expert: int) -> torch.Tensor:
        """Selects an expert's rows from one value per token, [tokens, ...] -> [rows, ...], in the expert's order."""
        if self._routing is None:
            return per_token
        return per_token[torch.where(self._routing == expert)[0]]

    def _keep(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        residual = args[0].detach().flatten(0, -2).float()
        normed = output.detach().flatten(0, -2).float()
        self.rms = residual.pow(2).mean(-1).sqrt()
        self._rows = normed if self._kind == "normed" else residual
        self._routing = None

    def _keep_input(self, block: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._keep(block, args, args[0])

    def _route(self, experts: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        self._routing = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
