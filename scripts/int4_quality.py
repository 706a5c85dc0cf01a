"""What int4 blocks cost in nats per token, next to llama.cpp's Q4_0 rounding of the same weights.

    python scripts/int4_quality.py MODEL --on TEXT [--sequences 64] [--tokens 512]

MODEL is a folder that `sparsify convert` wrote, or a bundle; TEXT a file. Every projection of the layers is rounded in the order in which
decoding reads it, the output layer to int8 blocks for both; hidden states are not rounded. Differences are paired by sequence.
"""

from __future__ import annotations

import argparse
import gzip
import math
from copy import deepcopy
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import nn
from transformers import AutoTokenizer

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.models import SparseModel
from sparsify.runtime import quantise


def q4_0(weight: torch.Tensor) -> torch.Tensor:
    """A matrix [rows, columns] as llama.cpp's Q4_0 stores it."""
    stored = quantize(weight.numpy(), GGMLQuantizationType.Q4_0)
    return torch.from_numpy(dequantize(stored, GGMLQuantizationType.Q4_0))


def int4(weight: torch.Tensor) -> torch.Tensor:
    return quantise(weight, "int4").dequantised()


@torch.no_grad()
def rounded(model: SparseModel, kind: str) -> tuple[SparseModel, float]:
    """A copy with rounded weights, and their squared error relative to the weights."""
    copy = deepcopy(model)
    if copy.config.tie_word_embeddings:
        copy.lm_head.weight = nn.Parameter(copy.lm_head.weight.clone())
    error = size = 0.0
    for name, module in copy.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight
        if name == "lm_head":
            weight.copy_(quantise(weight, "int8").dequantised())
            continue
        # Our kernels hold the down projection by columns.
        by_columns = kind == "int4 blocks" and name.endswith("down_proj")
        new = int4(weight.T.contiguous()).T if by_columns else (int4 if kind == "int4 blocks" else q4_0)(weight)
        error += float((new - weight).square().sum())
        size += float(weight.square().sum())
        weight.copy_(new)
    return copy, error / size


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--on", type=Path, required=True, help="text, or text compressed with gzip")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a sequence")
    options = parser.parse_args()
    model = load_sparse(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    read = gzip.open if options.on.suffix == ".gz" else open
    with read(options.on, "rt", encoding="utf-8") as file:
        ids = tokenizer(file.read(), return_tensors="pt")["input_ids"][0]
    sequences = ids[: options.sequences * options.tokens]
    sequences = sequences[: len(sequences) // options.tokens * options.tokens].view(-1, options.tokens)
    losses = {}
    for kind in ("stored", "int4 blocks", "Q4_0"):
        variant, error = (model, 0.0) if kind == "stored" else rounded(model, kind)
        losses[kind] = torch.tensor([variant(one[None], labels=one[None], use_cache=False).loss for one in sequences])
        print(f"{kind}: {losses[kind].mean():.4f} nats, relative squared error of the weights {error:.6f}", flush=True)
        del variant
    for first, second in (("int4 blocks", "stored"), ("Q4_0", "stored"), ("int4 blocks", "Q4_0")):
        difference = losses[first] - losses[second]
        interval = 1.96 * float(difference.std()) / math.sqrt(len(difference))
        print(f"{first} - {second}: {difference.mean():+.4f} ± {interval:.4f} over {len(difference)} sequences")


if __name__ == "__main__":
    main()
