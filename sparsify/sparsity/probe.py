"""Counts firing neurons during the forward passes of a sparse model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from sparsify.models import (
    FfnActivation,
    SparseMistralForCausalLM,
    SparseMixtralForCausalLM,
    SparseModel,
)
from sparsify.models.modeling_sparse_mixtral import SparseMixtralExperts
from sparsify.sparsity.statistics import ActivationStatistics


class SparsityProbe:
    """Context manager that counts which neurons fire in every forward pass of a model.

    It looks at activations, never at weights, so partitioned weights (ZeRO-3) do not matter to it. Only forward passes
    count: what gradient checkpointing computes again during the backward pass does not. Mixtral's experts run in eager
    mode while the probe is on, as only there each call of the activation belongs to one expert.

    Args:
        model: A sparse model, or a module that wraps one.

    Raises:
        ValueError: If there is no sparse model in `model`.

    Example:
        with SparsityProbe(model) as probe:
            probe.count(input_ids != padding)
            model(input_ids)
        probe.statistics().zero_share()
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = _sparse_model(model)
        self._layers: list[ActivationStatistics | None] = [None] * len(self._model.model.layers)
        self._num_tokens = 0
        self._token_mask: torch.Tensor | None = None
        self._in_forward = False
        # Of the expert calls that are still to come in the current block: expert, its tokens in the order of rows.
        self._calls: deque[tuple[int, torch.Tensor]] = deque()
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        if isinstance(self._model, SparseMixtralForCausalLM):
            self._run_experts_eagerly()
        decoder = self._model.model
        self._hook(decoder.register_forward_pre_hook(self._begin_forward))
        self._hook(decoder.register_forward_hook(self._end_forward, always_call=True))
        for index, layer in enumerate(decoder.layers):
            for module in layer.modules():
                if isinstance(module, SparseMixtralExperts):
                    read = module.register_forward_pre_hook(self._read_routing, with_kwargs=True)
                    self._hook(read)
                elif isinstance(module, FfnActivation):
                    self._hook(module.register_forward_hook(partial(self._count_layer, index)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def count(self, token_mask: torch.Tensor | None) -> None:
        """Says which tokens of the next forward pass count; without a call all of them do.

        Args:
            token_mask: Bool [batch, tokens], True where a token counts (padding does not); None for all.
        """
        self._token_mask = None if token_mask is None else token_mask.bool().flatten()

    def statistics(self) -> ActivationStatistics:
        """Statistics of every token counted so far by this process, on the CPU."""
        config = self._model.config
        experts = getattr(config, "num_local_experts", 1)
        nothing = ActivationStatistics.empty(1, experts, config.intermediate_size)
        layers = [nothing if layer is None else layer for layer in self._layers]

        def stack(name: str) -> torch.Tensor:
            return torch.cat([getattr(layer, name).cpu() for layer in layers])

        return ActivationStatistics(
            num_tokens=torch.tensor(self._num_tokens),
            routed_tokens=stack("routed_tokens"),
            gate_fired=stack("gate_fired"),
            up_fired=stack("up_fired"),
            product_fired=stack("product_fired"),
            tokens_by_zeros=stack("tokens_by_zeros"),
        )

    def _hook(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._undo.append(handle.remove)

    def _run_experts_eagerly(self) -> None:
        config = self._model.config
        self._undo.append(
            partial(setattr, config, "_experts_implementation", config._experts_implementation)
        )
        config._experts_implementation = "eager"

    def _begin_forward(self, decoder: nn.Module, args: Any) -> None:
        self._in_forward = True

    def _end_forward(self, decoder: nn.Module, args: Any, output: Any) -> None:
        # None after an exception: the pass is over all the same, and the next one must start clean.
        if output is not None:
            mask = self._token_mask
            hidden = output[0]
            self._num_tokens += hidden[..., 0].numel() if mask is None else int(mask.sum())
        self._in_forward = False
        self._token_mask = None
        self._calls.clear()

    def _read_routing(self, experts: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        if not self._in_forward:
            return
        top_k_index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        self._calls = deque(
            (expert, torch.where(top_k_index == expert)[0])
            for expert in torch.unique(top_k_index).tolist()
        )

    def _count_layer(
        self,
        layer: int,
        activation: FfnActivation,
        pre_activations: tuple[torch.Tensor, torch.Tensor],
        product: torch.Tensor,
    ) -> None:
        if not self._in_forward:
            return
        expert, mask = 0, self._token_mask
        if self._calls:
            expert, tokens = self._calls.popleft()
            mask = None if mask is None else mask.to(tokens.device)[tokens]
        gate, up = pre_activations
        with torch.no_grad():
            self._add(
                layer, expert, mask, activation.gate_factor(gate), activation.up_factor(up), product
            )

    def _add(
        self, layer: int, expert: int, mask: torch.Tensor | None, *factors: torch.Tensor
    ) -> None:
        rows = [factor.flatten(0, -2) for factor in factors]
        if mask is not None:
            rows = [factor[mask.to(factor.device)] for factor in rows]
        counts = self._layers[layer]
        if counts is None:
            # Made here, because only now the device of this layer is known for certain.
            experts = getattr(self._model.config, "num_local_experts", 1)
            counts = ActivationStatistics.empty(1, experts, rows[0].shape[-1], rows[0].device)
            self._layers[layer] = counts
        counts.add(0, expert, *rows)


def _sparse_model(model: nn.Module) -> SparseModel:
    for module in model.modules():
        if isinstance(module, SparseMistralForCausalLM | SparseMixtralForCausalLM):
            return module
    raise ValueError(
        f"{type(model).__name__} holds no SparseMistralForCausalLM or SparseMixtralForCausalLM"
    )
