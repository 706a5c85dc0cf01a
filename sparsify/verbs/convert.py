"""`sparsify convert`: a dense checkpoint as a sparse-activated one, and what the swap did to its loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sparsify.conversion.convert import Converted, convert
from sparsify.conversion.folder import load_sparse
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.mixture.heldout import check_text_or_mixture, windows_from
from sparsify.mixture.windows import collate
from sparsify.recipe import ActivationSection, ModelSection, Recipe
from sparsify.recipe_rules import check_activation
from sparsify.sparsity.report import measure


@dataclass(frozen=True)
class Swap:
    """What a conversion wrote, and what it did to the loss."""

    converted: Converted
    text: str
    num_tokens: int
    loss_before: float
    loss_after: float
    zeros_before: float
    zeros_after: float


def convert_model(
    source: str, activation: ActivationSection, to: Path, on: str, num_tokens: int
) -> Swap:
    """Converts a checkpoint and measures the swap on a text.

    Args:
        source: Checkpoint folder, Hub id, GGUF file or package:NAME/PATH.
        activation: The activation to give it.
        to: Folder to write.
        on: Text file, mixture name or mixture path.
        num_tokens: Tokens to measure on.
    """
    check_activation(activation, "--activation", "--gate-threshold")
    check_text_or_mixture(on)
    model = ModelSection(source=source)
    converted = convert(model, activation, to, seed=0, dtype=torch.bfloat16)  # nothing is drawn
    tokenizer = load_tokenizer(to)
    windows, text = windows_from(
        on,
        tokenizer,
        num_tokens=num_tokens,
        window_tokens=min(512, converted.config.max_position_embeddings),
        cache_dir=Path(Recipe().cache_dir).expanduser(),
    )
    config = converted.config
    reports = [
        measure(
            load_sparse(to, name, gate_threshold=threshold),
            (collate([w]) for w in windows),
            name=str(to),
            text=text,
        )[0]
        for name, threshold in (
            (config.base_ffn_activation, config.base_ffn_gate_threshold),
            (config.ffn_activation, config.ffn_gate_threshold),
        )
    ]
    return Swap(
        converted,
        text,
        reports[1].num_tokens,
        reports[0].loss,
        reports[1].loss,
        reports[0].product_zeros,
        reports[1].product_zeros,
    )
