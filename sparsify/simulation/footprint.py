"""Bytes of a model's parts, as a device holds and reads them for one token of one sequence.

The counts are those of DIP's simulator (arXiv 2412.01380): matrices alone. The input embedding is not in it, since a token reads one
row of it, unless the output layer is the same matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from sparsify.models.masking import experts_per_token, head_size, num_experts, num_neurons


@dataclass(frozen=True)
class ModelShape:
    """Shape of a model with gated feed-forward blocks.

    Attributes:
        layers: Decoder layers.
        hidden: Hidden size.
        neurons: Of a feed-forward block, or of one expert.
        heads: Query heads.
        kv_heads: Key and value heads.
        head: Width of a head.
        vocabulary: Rows of the output layer.
        experts: Of a layer; 1 in a dense model.
        experts_per_token: Of them, those that a token is routed to.
    """

    layers: int
    hidden: int
    neurons: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    experts: int = 1
    experts_per_token: int = 1

    @classmethod
    def of(cls, config: Any) -> Self:
        """The shape of a model with that configuration."""
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            neurons=num_neurons(config),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head=head_size(config),
            vocabulary=config.vocab_size,
            experts=num_experts(config),
            experts_per_token=experts_per_token(config),
        )

    @property
    def slots(self) -> int:
        """Neurons of a layer, those of all experts."""
        return self.experts * self.neurons


@dataclass(frozen=True)
class Bits:
    """Bits of one number of each part, scales of blocks included."""

    attention: float = 16.0
    ffn: float = 16.0
    output_layer: float = 16.0
    keys_and_values: float = 16.0

    @classmethod
    def of_weights(cls, bits: float) -> Self:
        """The same for all weights; keys and values stay in 16 bits."""
        return cls(attention=bits, ffn=bits, output_layer=bits)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's parts.

    Attributes:
        attention: Its projections, all layers.
        ffn: Feed-forward blocks of all layers and experts.
        output_layer: The output layer.
        keys_and_values: Of one sequence.
    """

    attention: float
    ffn: float
    output_layer: float
    keys_and_values: float

    @property
    def static(self) -> float:
        """What is not fed forward: it always stays in memory, and each token reads it."""
        return self.attention + self.output_layer + self.keys_and_values


def footprint(shape: ModelShape, bits: Bits, tokens: int) -> Footprint:
    """Bytes of a model that holds the keys and values of so many tokens."""
    width, kv_width = shape.heads * shape.head, shape.kv_heads * shape.head
    return Footprint(
        attention=bits.attention / 8 * shape.hidden * 2 * (width + kv_width) * shape.layers,
        ffn=bits.ffn / 8 * 3 * shape.hidden * shape.slots * shape.layers,
        output_layer=bits.output_layer / 8 * shape.hidden * shape.vocabulary,
        keys_and_values=bits.keys_and_values / 8 * tokens * 2 * kv_width * shape.layers,
    )
