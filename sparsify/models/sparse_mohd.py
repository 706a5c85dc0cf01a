"""Sparse MoHD: a Mistral whose tokens each use a part of the hidden size (Mixture of Hidden-Dimensions, arXiv 2412.05644).

The hidden size is divided into sub-dimensions, consecutive channels of equal number. The first are shared: every token uses them. Of
the others a router in front of every attention and every feed-forward block chooses the same number for each token. Dropped
sub-dimensions are exact zeros in what a block reads, and a block writes the chosen ones alone, so that each of its seven matrices has one
side of which only the chosen part counts. A fusion behind the block spreads what it wrote over all sub-dimensions.

Embedding, head, norms and the residual stream have the whole hidden size. Products are torch's of whole matrices with zeros in them.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from .family import Family, SparseCausalLM, SparseConfig, SparseDecoder, register

GATE_SCALES = ("sum", "mean")


@strict
class SparseMohdConfig(SparseConfig, MistralConfig):
    model_type = "sparse_mohd"

    sliding_window: int | None = None
    sub_dimensions: int = 16
    """Equal parts of the hidden size."""
    shared_sub_dimensions: int = 6
    """Of these, the first so many are used by every token."""
    active_sub_dimensions: int = 8
    """How many a token uses, the shared ones included."""
    gate_scale: str = "sum"
    """What gates are multiplied by, one of GATE_SCALES: see `HiddenRouter`."""
    router_aux_loss_coef: float = 0.01
    """Weight of the load-balancing loss unless a recipe says another."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        parts, shared, active = self.sub_dimensions, self.shared_sub_dimensions, self.active_sub_dimensions
        if parts < 1 or self.hidden_size % parts:
            raise ValueError(f"sub_dimensions is {parts}, which does not divide hidden_size {self.hidden_size}")
        if self.gate_scale not in GATE_SCALES:
            raise ValueError(f"gate_scale is {self.gate_scale!r}, not one of {', '.join(GATE_SCALES)}")
        if active < 1 or not 0 <= shared <= active <= parts:
            raise ValueError(
                f"shared_sub_dimensions is {shared} and active_sub_dimensions {active}, of {parts}: no more can be shared than are "
                "active, and no more active than there are"
            )

    @property
    def chooses(self) -> bool:
        """Whether tokens differ in which sub-dimensions they use, so that there is a load to balance."""
        return self.shared_sub_dimensions < self.active_sub_dimensions < self.sub_dimensions


class HiddenRouter(nn.Module):
    """Chooses a token's sub-dimensions, and multiplies each by its gate.

    With s = softmax(x Cᵀ) over all N sub-dimensions, in fp32, the shared ones and the largest s of the others are on. A channel of
    sub-dimension i is multiplied by

        sum:   s_i · N · Σ_on s             the magnitude-preserving scale of the paper; 1 where all are on and s is uniform
        mean:  s_i / mean_on s              the same there; the mean gate of every token is 1 however many are on

    where i is on, otherwise by 0.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.sub_dimensions: int = config.sub_dimensions
        self.shared: int = config.shared_sub_dimensions
        self.active: int = config.active_sub_dimensions
        self.gate_scale: str = config.gate_scale
        self.centroids = nn.Linear(config.hidden_size, config.sub_dimensions, bias=False)

    def chosen(self, logits: torch.Tensor) -> torch.Tensor:
        """Which sub-dimensions are on, bool [..., sub-dimensions], from logits of that shape."""
        on = torch.zeros_like(logits, dtype=torch.bool)
        on[..., : self.shared] = True
        best = logits[..., self.shared :].topk(self.active - self.shared, dim=-1).indices
        return on.scatter(-1, self.shared + best, True)

    def gates(self, logits: torch.Tensor, on: torch.Tensor) -> torch.Tensor:
        """What each sub-dimension is multiplied by, fp32 [..., sub-dimensions]."""
        shares = logits.float().softmax(-1) * on
        total = shares.sum(-1, keepdim=True)
        scale = self.sub_dimensions * total if self.gate_scale == "sum" else self.active / total
        return shares * scale

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states [..., hidden] with gates; which sub-dimensions are on, bool [..., sub-dimensions]; and the logits."""
        logits = self.centroids(x)
        on = self.chosen(logits)
        gates = self.gates(logits, on).to(x.dtype)
        return (x.unflatten(-1, (self.sub_dimensions, -1)) * gates[..., None]).flatten(-2), on, logits


class GroupFusion(nn.Module):
    """Writes a block's output to the residual stream: a Monarch matrix over the sub-dimensions that are on, the identity at first.

    One matrix mixes the channels within each sub-dimension, then one mixes the sub-dimensions at each channel of them (two block-diagonal
    factors with a transposition between them, arXiv 2204.00595). Of both, only the parts that read a sub-dimension that is on count.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        parts, width = config.sub_dimensions, config.hidden_size // config.sub_dimensions
        self.within = nn.Parameter(torch.eye(width).repeat(parts, 1, 1))
        """[sub-dimensions, channels, channels]: inputs, outputs."""
        self.across = nn.Parameter(torch.eye(parts).repeat(width, 1, 1))
        """[channels, sub-dimensions, sub-dimensions]: inputs, outputs."""

    def forward(self, y: torch.Tensor, on: torch.Tensor) -> torch.Tensor:
        """[..., hidden] from a block's output of that shape and which sub-dimensions are on."""
        parts = y.unflatten(-1, (*on.shape[-1:], -1)) * on[..., None]
        mixed = torch.einsum("...nc,ncd->...nd", parts, self.within)
        return torch.einsum("...nc,cnm->...mc", mixed, self.across).flatten(-2)


class SparseMohdLayer(MistralDecoderLayer):
    """Mistral's layer with a router in front of both of its blocks and a fusion behind them."""

    attention_router: HiddenRouter
    attention_fusion: GroupFusion
    ffn_router: HiddenRouter
    ffn_fusion: GroupFusion

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, on, _ = self.attention_router(self.input_layernorm(hidden_states))
        attended, _ = self.self_attn(hidden_states=x, **kwargs)
        hidden_states = hidden_states + self.attention_fusion(attended, on)
        x, on, _ = self.ffn_router(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.ffn_fusion(self.mlp(x), on)


class SparseMohdModel(SparseDecoder, MistralModel):
    config_class = SparseMohdConfig

    @classmethod
    def install(cls, model: Any) -> None:
        for layer in model.layers:
            layer.__class__ = SparseMohdLayer
            for block in ("attention", "ffn"):
                router = HiddenRouter(model.config)
                model._init_weights(router.centroids)
                setattr(layer, f"{block}_router", router)
                setattr(layer, f"{block}_fusion", GroupFusion(model.config))
        super().install(model)


class SparseMohdForCausalLM(SparseCausalLM, MistralForCausalLM):
    config_class = SparseMohdConfig
    decoder_class = SparseMohdModel


FAMILY = register(
    Family(
        SparseMohdForCausalLM,
        {},
        layer_difference="hidden-dimension routing around every block",
    )
)

__all__ = ["SparseMohdConfig", "SparseMohdForCausalLM", "SparseMohdModel"]
