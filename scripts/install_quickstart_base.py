"""Puts a finished `sparsify train quickstart_base` run into the package, as the stock Mistral that users start from.

Run: python scripts/install_quickstart_base.py runs/quickstart_base
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import MistralConfig, MistralForCausalLM

from sparsify.recipe.catalogue import PACKAGE
from sparsify.runs.load import find_trained, load_trained

STOCK_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "sliding_window",
    "tie_word_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
)


def main(run: Path) -> None:
    """Writes the run's newest weights in bf16 into sparsify/assets/quickstart_base/, next to the tokenizer."""
    trained = find_trained(run)
    if trained is None:
        sys.exit(f"{run} is not a run folder; `sparsify train quickstart_base` makes one")
    sparse = load_trained(trained)
    stock = MistralForCausalLM(MistralConfig(**{field: getattr(sparse.config, field) for field in STOCK_FIELDS}))
    stock.load_state_dict(sparse.state_dict(), strict=True)
    stock.to(dtype=torch.bfloat16).save_pretrained(PACKAGE / "assets" / "quickstart_base")  # pyright: ignore[reportCallIssue]
    print(f"{PACKAGE / 'assets' / 'quickstart_base'}: {stock.num_parameters():,} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
