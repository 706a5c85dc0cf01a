"""How many bytes of weights a token's decoding reads when everything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of weights by where they are read.

    Args:
        ffn_per_token: Feed-forward blocks; of a mixture, the experts that one token is sent to.
        other: Attention, norms, routers and the output layer. Of the input embedding a token reads one row, which is left out.
    """

    ffn_per_token: float
    other: int

    @property
    def total(self) -> float:
        """What a dense token reads."""
        return self.ffn_per_token + self.other


def model_bytes(model: Any) -> ModelBytes:
    """Counts a Sparse Mistral's or Sparse Mixtral's weights."""
    ffn = sum(_bytes(block) for block in model.ffn_blocks())
    embedding = model.get_input_embeddings()
    tied = model.get_output_embeddings().weight is embedding.weight
    other = _bytes(model) - ffn - (0 if tied else _bytes(embedding))
    config = model.config
    experts = getattr(config, "num_local_experts", 1)
    return ModelBytes(ffn * getattr(config, "num_experts_per_tok", 1) / experts, other)


def _bytes(module: Any) -> int:
    return sum(one.numel() * one.element_size() for one in module.parameters())
