"""What families of models have in common, and what the rest of the package asks of one.

A family is one file, `sparse_NAME.py`: a configuration, a model with and without its head, and a `Family` that says where things are.
Its classes are transformers' own with the classes of this file in front, so attention, norms and caches stay theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

from .activations import STOCK_ACTIVATION
from .ffn_activation import FfnActivation
from .group_router import GroupRouter
from .integer_linear import check_quantisation, install_integers
from .masking import SiteMask, read_mask
from .projection_masks import install_masks


@strict
class SparseConfig(PreTrainedConfig):
    """Fields of a configuration whose feed-forward activation is named by `ffn_activation`.

    Model types are never stock ones: `hidden_act="relu"` on a stock Mistral is ReGLU, a different function from dReLU, and would
    load without an error.
    """

    ffn_activation: str = STOCK_ACTIVATION
    ffn_gate_threshold: float = 0.0
    """What `shifted_relu` subtracts from the gate, and what `fatrelu` keeps it above; 0 for every other activation."""
    sparsification: dict[str, Any] | None = None
    """The mask that the model stores (`masking.py`): the method that fitted it, and the rule of each site; None for none."""
    weight_sparsity: dict[str, Any] | None = None
    """Of weights that were set to zero: the method, the pattern and the share; None for dense weights. It changes nothing here."""
    quantisation: dict[str, Any] | None = None
    """Of weights that are stored as integers (`integer_linear.py`): the method, bits, and what is done to inputs; None for numbers."""
    base_ffn_activation: str = STOCK_ACTIVATION
    """Activation of the checkpoint that this one was converted from."""
    base_ffn_gate_threshold: float = 0.0

    if TYPE_CHECKING:  # fields that the stock class has
        vocab_size: int
        hidden_size: int
        intermediate_size: int
        num_hidden_layers: int
        num_attention_heads: int
        num_key_value_heads: Any
        num_local_experts: int
        num_experts_per_tok: int
        max_position_embeddings: int
        rms_norm_eps: float
        rope_parameters: Any
        tie_word_embeddings: bool

    def __post_init__(self, **kwargs: Any) -> None:
        read_mask(self, kwargs)
        super().__post_init__(**kwargs)
        check_quantisation(self)


class SparseMLP(nn.Module):
    """down_proj(ffn_activation(gate_proj(x), up_proj(x)))."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    ffn_activation: FfnActivation
    input_mask: SiteMask | None
    group_router: GroupRouter | None
    by_proxy: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps hidden states [batch, tokens, hidden] to the same shape."""
        router = self.group_router
        options = {} if router is None else {"groups": router.factors(router(x))}
        x = x if self.input_mask is None else self.input_mask(x)
        factors = self.gate_proj(x), self.up_proj(x)
        # Through the projections' own forwards: under ZeRO-3 their weights are whole only there.
        proxies = (self.gate_proj(x, by_proxy=True), self.up_proj(x, by_proxy=True)) if self.by_proxy else None
        return self.down_proj(self.ffn_activation(*factors, proxies=proxies, **options))


def ffn_block(layer: Any) -> Any:
    """The module of a layer that holds its feed-forward weights: the block itself, or its fused experts."""
    return getattr(layer.mlp, "experts", layer.mlp)


class SparseDecoder(PreTrainedModel):
    """In front of a stock model without its head: `config.ffn_activation` and the masks in every feed-forward block."""

    block_class: type[nn.Module] = SparseMLP

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.install(self)

    @classmethod
    def install(cls, model: Any) -> None:
        """Gives every layer of a finished stock model the activation and the masks of its configuration."""
        for layer in model.layers:
            # Re-classing the finished module keeps its parameters, their names and their initialisation,
            # under meta-device loading and ZeRO-3 partitioned construction alike.
            block = ffn_block(layer)
            block.__class__ = cls.block_class
            block.ffn_activation = FfnActivation.from_config(model.config)
            for stock in ("act_fn", "activation_fn"):
                if hasattr(block, stock):
                    delattr(block, stock)
            install_masks(layer, block, model.config)
        install_integers(model)


class SparseCausalLM(PreTrainedModel, GenerationMixin):
    """In front of a stock model for causal language modelling; its `decoder_class` says what is done to the stock decoder."""

    decoder_class: type[SparseDecoder]

    if TYPE_CHECKING:
        config: Any
        model: Any
        lm_head: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.decoder_class.install(self.model)

    def ffn_blocks(self) -> list[Any]:
        """The module of every layer that holds `ffn_activation`, in order."""
        return [ffn_block(layer) for layer in self.model.layers]

    def set_ffn_activation(self, name: str, gate_threshold: float = 0.0) -> None:
        """Replaces the activation of every layer in place; weights and masks stay as they are."""
        self.config.ffn_activation, self.config.ffn_gate_threshold = name, gate_threshold
        for block in self.ffn_blocks():
            activation = FfnActivation.from_config(self.config)
            block.ffn_activation = activation.with_masks_of(block.ffn_activation)


@dataclass(frozen=True)
class Family:
    """A family of models: its classes, and where things are.

    Attributes:
        model: Its class for causal language modelling; that of configurations and the decoder follow.
        stock: Model types of the checkpoints that are held as this family, with the classes whose defaults apply to them.
        base_activation: What stock checkpoints compute.
        attention_norm: Name of the norm in a layer whose output the attention reads; None if it reads the residual stream.
        ffn_norm: Name of the norm in a layer whose output the feed-forward block reads; None if it reads the residual stream.
        unit_offset: Whether norms multiply by 1 and their weight.
        rounds_before_factors: Whether norms round to the model's dtype before they multiply by their weights, too.
        ffn_output_norm: Name of a norm between the block's output and the residual stream; None for none.
        attention_output_norm: The same of the attention.
        blocks_on_disk: What checkpoints call `mlp` where a layer has experts.
        expert_block: Name of the class of such a layer's `mlp`: the router and the experts.
        expert_projections: What checkpoints call the projections of an expert.
        fused: Projections that stock checkpoints store as one, by its name in a layer, in the order of rows. They are apart here.
        holders: Model types of stock checkpoints that hold this model next to others, such as one of images: its config.json is
            there under `text_config`, and names of its tensors begin with `language_model`.
        embedding_scale: Number by which a model of some configuration multiplies its embeddings; None for 1.
        layer_difference: What its layers compute besides norms, attention and feed-forward block, in words; empty for nothing. What
            computes a layer from its parts refuses such a family.
        obstacles: Fields of config.json for which a checkpoint is refused, each with the value that can be held and the reason.
    """

    model: type[SparseCausalLM]
    stock: Mapping[str, type[PreTrainedConfig]]
    base_activation: str = STOCK_ACTIVATION
    attention_norm: str | None = "input_layernorm"
    ffn_norm: str | None = "post_attention_layernorm"
    unit_offset: bool = False
    rounds_before_factors: bool = True
    ffn_output_norm: str | None = None
    attention_output_norm: str | None = None
    blocks_on_disk: str = "mlp"
    expert_block: str | None = None
    expert_projections: Mapping[str, str] = field(
        default_factory=lambda: {name: name for name in ("gate_proj", "up_proj", "down_proj")}
    )
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    holders: tuple[str, ...] = ()
    embedding_scale: Callable[[Any], float] | None = None
    layer_difference: str = ""
    obstacles: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    @property
    def decoder(self) -> type[SparseDecoder]:
        """The model without its head, which inference engines build their own on."""
        return self.model.decoder_class

    @property
    def config(self) -> type[SparseConfig]:
        return self.model.config_class  # pyright: ignore[reportReturnType]

    @property
    def model_type(self) -> str:
        return self.config.model_type

    @property
    def module(self) -> str:
        """The module that defines it."""
        return self.model.__module__


def register(family: Family) -> Family:
    """Makes transformers' Auto classes know a family; returns it."""
    AutoConfig.register(family.model_type, family.config, exist_ok=True)
    AutoModel.register(family.config, family.decoder, exist_ok=True)
    AutoModelForCausalLM.register(family.config, family.model, exist_ok=True)
    FAMILIES[family.model_type] = family
    return family


FAMILIES: dict[str, Family] = {}
"""Families by model type."""
