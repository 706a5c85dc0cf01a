"""Fused experts with a named activation, for every mixture of experts.

transformers dispatches experts by `config._experts_implementation`. Three implementations are allowed here:
eager (the loop below), batched_mm and grouped_mm (both call `_apply_gate`). Any other would compute its own
activation, so it is refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .activations import STOCK_ACTIVATION
from .family import SparseCausalLM, SparseDecoder
from .ffn_activation import FfnActivation
from .group_router import GroupRouter
from .masking import SiteMask
from .projection_masks import ProjectionMask, proxy_product
from .quantised import KeptBlocks

EXPERTS_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


class SparseExperts(nn.Module):
    """All experts of a layer.

    Parameters: gate_up_proj [experts, 2 * neurons, hidden], gate rows first; down_proj [experts, hidden, neurons].
    """

    config: Any
    ffn_activation: FfnActivation
    input_mask: SiteMask | None
    gate_proj_mask: ProjectionMask | None
    up_proj_mask: ProjectionMask | None
    down_proj_mask: ProjectionMask | None
    group_router: GroupRouter | None
    by_proxy: bool
    proxies: KeptBlocks
    _row_experts: int | torch.Tensor | None = None
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Routes each token through its experts.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: Expert of each slot, [tokens, experts per token].
            top_k_weights: Router weight of each slot, [tokens, experts per token].

        Returns:
            [tokens, hidden].

        Raises:
            ValueError: If the experts implementation would not apply `ffn_activation`.
        """
        implementation = self.config._experts_implementation
        if implementation not in EXPERTS_IMPLEMENTATIONS:
            raise ValueError(
                f"experts_implementation is {implementation!r}, which would not apply ffn_activation="
                f"{self.ffn_activation.name!r}; allowed: {', '.join(EXPERTS_IMPLEMENTATIONS)}"
            )
        seen = hidden_states
        if self.input_mask is not None:
            hidden_states = self.input_mask(hidden_states)
        # The other implementations multiply by gate and up at once, and have no place for what is masked for one of them, nor for
        # proxies or routers of groups.
        routed = self.group_router is not None
        if implementation == "eager" or any(self.projection_masks) or self.by_proxy or routed:
            return self._loop_over_experts(hidden_states, top_k_index, top_k_weights, seen)
        if self.ffn_activation.is_masked:
            # Only masks need it: an attribute set inside a checkpointed layer keeps torch.compile from compiling the layer.
            # Both keep one row for each slot: batched_mm in the order of slots, grouped_mm sorted by expert.
            slots = top_k_index.reshape(-1)
            self._row_experts = slots if implementation == "batched_mm" else slots.sort().values
        forward = ALL_EXPERTS_FUNCTIONS[implementation]
        return forward(self, hidden_states, top_k_index, top_k_weights)

    def _loop_over_experts(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """One matrix product per expert that has tokens, in ascending order of experts: the order that probes rely on. `seen` are the
        states before their mask, for routers of groups.
        """
        output = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            token, slot = torch.where(top_k_index == expert)
            if self.ffn_activation.is_masked:
                self._row_experts = expert
            groups = None
            if self.group_router is not None:
                groups = self.group_router.factors(self.group_router(seen[token], expert))
            answer = self._compute(expert, hidden_states[token], groups)
            output.index_add_(0, token, (answer * top_k_weights[token, slot, None]).to(output.dtype))
        return output

    @property
    def projection_masks(self) -> tuple[ProjectionMask | None, ...]:
        return self.gate_proj_mask, self.up_proj_mask, self.down_proj_mask

    def _compute(self, expert: int, x: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
        """One expert's output [rows, hidden] for its inputs of that shape, under what its router says of its groups."""
        gate_up, down = self.gate_up_proj[expert], self.down_proj[expert]
        proxies = proxy_product(self, x, gate_up, expert) if self.by_proxy else None
        if not any(self.projection_masks):
            return nn.functional.linear(self._apply_gate(nn.functional.linear(x, gate_up), proxies, groups), down)

        def multiply(mask: ProjectionMask | None, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            if mask is None:
                return nn.functional.linear(states, weight)
            return mask(states, partial(nn.functional.linear, weight=weight), expert)

        gate, up = gate_up.chunk(2)
        factors = [multiply(self.gate_proj_mask, x, gate), multiply(self.up_proj_mask, x, up)]
        return multiply(self.down_proj_mask, self._apply_gate(torch.cat(factors, dim=-1), proxies, groups), down)

    def _apply_gate(
        self, gate_up: torch.Tensor, proxies: torch.Tensor | None = None, groups: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[slots, 2 * neurons], by proxy too where neurons are ranked so, to [slots, neurons]."""
        gate, up = gate_up.chunk(2, dim=-1)
        pair = None if proxies is None else proxies.chunk(2, dim=-1)
        options = {} if groups is None else {"groups": groups}
        return self.ffn_activation(gate, up, experts=self._row_experts, proxies=pair, **options)


class SparseExpertsDecoder(SparseDecoder):
    """In front of a stock mixture of experts without its head."""

    block_class = SparseExperts

    @classmethod
    def install(cls, model: Any) -> None:
        super().install(model)
        model.register_forward_pre_hook(_refuse_other_experts)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its own decorator in the file of the class


class SparseExpertsForCausalLM(SparseCausalLM):
    """In front of a stock mixture of experts for causal language modelling."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True


def _refuse_other_experts(model: Any, args: tuple[Any, ...]) -> None:
    """Inference engines replace a module called `experts` by one of their own, which computes silu whatever the activation."""
    if model.config.ffn_activation == STOCK_ACTIVATION and not model.config.sparsification:
        return
    for layer in model.layers:
        if not hasattr(layer.mlp.experts, "ffn_activation"):
            raise ValueError(
                f"The experts were replaced by {type(layer.mlp.experts).__name__}, which does not apply ffn_activation="
                f"{model.config.ffn_activation!r}"
            )


def keep_layout(model_type: str, stock: str) -> None:
    """Lets checkpoints of a model type keep the layout of a stock one, which holds experts one by one.

    Without it a renamed model type would read none of them and leave random experts behind with only a warning.
    """
    mapping = get_checkpoint_conversion_mapping(stock) or []
    register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)
