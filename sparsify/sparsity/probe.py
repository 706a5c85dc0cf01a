"""Counts firing neurons during the forward passes of a sparse model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import nn

from sparsify.methods.base import TokenMask
from sparsify.models import FfnActivation, SparseModel
from sparsify.models.group_router import GroupRouter
from sparsify.models.masking import (
    COUNTED_SITES,
    GROUP,
    has_experts,
    is_fused,
    mask_name,
    num_experts,
    num_neurons,
    site_rules,
)
from sparsify.sparsity.statistics import MAX_BYTE, ActivationStatistics

CPU_PIECE_ROWS = MAX_BYTE
"""Rows counted at once on a CPU: intermediate results stay in the cache, and sums fit in bytes."""
PIECE_ROWS = 1024
"""Rows processed at once on other devices and by editors and observers; copies take a few hundred MB at 14,336 neurons."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of one forward pass.

    Attributes:
        counted: Which of them count, bool [batch, tokens].
        positions: Position in the document, [batch, tokens].
    """

    counted: torch.Tensor
    positions: torch.Tensor


class Observer(Protocol):
    """Receives the activations of every forward pass."""

    def begin(self, tokens: Tokens) -> None:
        """Called at the start of a forward pass."""

    def add(self, layer: int, expert: int, tokens: torch.Tensor, block: Any, product: torch.Tensor) -> None:
        """Called with the activations of one block, or of one expert of a block.

        Args:
            layer: Index of the layer.
            expert: Index of the expert, 0 in a dense model.
            tokens: Indices of the rows' tokens into [batch * tokens], [rows].
            block: The module that holds the activation and its down projection.
            product: Neuron activations, [rows, neurons].
        """


class SparsityProbe:
    """Context manager that counts which neurons fire in every forward pass of a model, and the zeros that its stored mask
    leaves at the inputs of projections.

    It reads activations only, so it works with partitioned weights (ZeRO-3). Recomputation by gradient checkpointing in the
    backward pass is not counted. Fused experts run in eager mode while the probe is active, because only then does each
    call of the activation belong to one expert.

    Args:
        model: A sparse model, or a module that wraps one.
        observers: Receive every counted activation.
        mask: Activations that it does not keep become zero before they are counted and passed on.

    Raises:
        ValueError: If `model` does not contain a sparse model.

    Example:
        with SparsityProbe(model) as probe:
            probe.count(input_ids != padding)
            model(input_ids)
        probe.statistics().zero_share()
    """

    def __init__(self, model: nn.Module, *observers: Observer, mask: TokenMask | None = None) -> None:
        self._model = _sparse_model(model)
        self._observers, self._mask = observers, mask
        self._blocks = self._model.ffn_blocks()
        self._layers: list[ActivationStatistics | None] = [None] * len(self._model.model.layers)
        self._num_tokens = 0
        self._token_mask: torch.Tensor | None = None
        self._positions = torch.empty(0)
        self._in_forward = False
        # Pending expert calls of the current block: (expert, its tokens in the order of rows).
        self._calls: deque[tuple[int, torch.Tensor]] = deque()
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        if has_experts(self._model.config):
            self._run_experts_eagerly()
        decoder = self._model.model
        self._hook(decoder.register_forward_pre_hook(self._begin_forward, with_kwargs=True))
        self._hook(decoder.register_forward_hook(self._end_forward, always_call=True))
        config = self._model.config
        masks = {site: mask_name(config, site, rule) for site, rule in site_rules(config).items()}
        for index, layer in enumerate(decoder.layers):
            for site in (site for site in COUNTED_SITES if site in masks):
                mask = layer.get_submodule(masks[site].rstrip("."))
                self._hook(mask.register_forward_hook(partial(self._count_site, index, site)))
            for module in layer.modules():
                if is_fused(module):
                    read = module.register_forward_pre_hook(self._read_routing, with_kwargs=True)
                    self._hook(read)
                elif isinstance(module, FfnActivation):
                    self._hook(module.register_forward_hook(partial(self._count_layer, index)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def count(self, token_mask: torch.Tensor | None) -> None:
        """Sets which tokens of the next forward pass count, bool [batch, tokens]; without a call all tokens count."""
        self._token_mask = None if token_mask is None else token_mask.bool().flatten()

    def statistics(self) -> ActivationStatistics:
        """Statistics of every token counted so far by this process, on the CPU."""
        config = self._model.config
        experts = num_experts(config)
        nothing = ActivationStatistics.empty(1, experts, num_neurons(config))
        layers = [nothing if layer is None else layer for layer in self._layers]

        def stack(name: str) -> torch.Tensor:
            return torch.cat([getattr(layer, name).cpu() for layer in layers])

        names = [field.name for field in fields(ActivationStatistics)]
        counts = {name: stack(name) for name in names if name != "num_tokens"}
        return ActivationStatistics(torch.tensor(self._num_tokens), **counts)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def layer_totals(self) -> torch.Tensor:
        """Number of values so far, and of non-zero values of gate, up and product, int64 [layers, 4] on the CPU."""
        totals = torch.zeros(len(self._layers), 4, dtype=torch.int64)
        for layer, counts in enumerate(self._layers):
            if counts is not None:
                values = counts.routed_tokens.sum() * counts.num_neurons
                fired = (counts.gate_fired, counts.up_fired, counts.product_fired)
                totals[layer] = torch.stack([values, *(count.sum() for count in fired)]).cpu()
        return totals

    def _hook(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._undo.append(handle.remove)

    def _run_experts_eagerly(self) -> None:
        config = self._model.config
        self._undo.append(partial(setattr, config, "_experts_implementation", config._experts_implementation))
        config._experts_implementation = "eager"

    def _begin_forward(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"][..., 0] if tokens is None else tokens
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        positions = positions.expand(tokens.shape)
        self._positions = positions.flatten()
        mask = self._token_mask
        counted = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask
        for observer in self._observers:
            observer.begin(Tokens(counted.reshape(positions.shape), positions))
        self._in_forward = True

    def _end_forward(self, decoder: nn.Module, args: Any, output: Any) -> None:
        # The output is None after an exception; the next pass must start clean.
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
            (expert, torch.where(top_k_index == expert)[0]) for expert in torch.unique(top_k_index).tolist()
        )

    def _count_layer(
        self,
        layer: int,
        activation: FfnActivation,
        pre_activations: tuple[torch.Tensor, torch.Tensor],
        product: torch.Tensor,
    ) -> torch.Tensor | None:
        if not self._in_forward:
            return None
        expert, tokens = 0, torch.arange(len(self._positions), device=product.device)
        if self._calls:
            expert, tokens = self._calls.popleft()
        gate, up = (factor.flatten(0, -2) for factor in pre_activations)
        shape = product.shape
        product = product.flatten(0, -2)
        edited = None
        if self._mask is not None:
            with torch.no_grad():
                product = product.mul_(self._mask.keep(layer, expert, product))
            edited = product.view(shape)
        with torch.no_grad():
            rows = self._counted_rows(tokens)
            factors = partial(activation.masked_gate, experts=expert), partial(activation.masked_up, experts=expert)
            self._add_rows(layer, expert, factors, (gate, up, product), tokens, rows)
            if rows is not None and self._observers:
                tokens, product = tokens[rows], product[rows]
            for observer in self._observers:
                observer.add(layer, expert, tokens, self._blocks[layer], product)
        return edited

    def _add_rows(
        self,
        layer: int,
        expert: int,
        factors: tuple[Callable[[torch.Tensor], torch.Tensor], ...],
        values: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        tokens: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        counts = self._counts_of(layer, tokens.device)
        positions = self._positions.to(tokens.device)[tokens]
        for piece in _pieces(tokens, rows):
            gate, up, product = (value[piece] for value in values)
            counts.add(0, expert, factors[0](gate), factors[1](up), product, positions=positions[piece])

    @torch.no_grad()
    def _count_site(self, layer: int, site: str, mask: nn.Module, args: Any, output: torch.Tensor) -> None:
        if not self._in_forward:
            return
        tokens = torch.arange(len(self._positions), device=output.device)
        if self._calls and (site == GROUP or site.startswith("ffn_in.")):
            tokens = self._calls[0][1]  # what one expert's projection or router reads, before that expert's activation
        if isinstance(mask, GroupRouter):
            output = mask.kept(output)
        counts, values = self._counts_of(layer, output.device), output.flatten(0, -2)
        for piece in _pieces(tokens, self._counted_rows(tokens)):
            counts.add_site(0, site, values[piece])

    def _counted_rows(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Which of some rows count, from the tokens that they belong to; None for all."""
        if self._token_mask is None:
            return None
        keep = self._token_mask.to(tokens.device)[tokens]
        return None if keep.all() else keep.nonzero().squeeze(1)

    def _counts_of(self, layer: int, device: torch.device) -> ActivationStatistics:
        counts = self._layers[layer]
        if counts is None:
            # Created here because the layer's device is known only now.
            config = self._model.config
            counts = ActivationStatistics.empty(1, num_experts(config), num_neurons(config), device)
            self._layers[layer] = counts
        return counts


def _pieces(tokens: torch.Tensor, rows: torch.Tensor | None) -> Iterator[slice | torch.Tensor]:
    total = len(tokens) if rows is None else len(rows)
    size = CPU_PIECE_ROWS if tokens.device.type == "cpu" else PIECE_ROWS
    for start in range(0, total, size):
        yield slice(start, start + size) if rows is None else rows[start : start + size]


def _sparse_model(model: nn.Module) -> SparseModel:
    for module in model.modules():
        if isinstance(module, SparseModel):
            return module
    raise ValueError(f"{type(model).__name__} does not contain a sparse model")
