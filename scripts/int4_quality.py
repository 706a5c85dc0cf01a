"""What int4 blocks cost in nats per token, next to llama.cpp's Q4_0 rounding of the same weights.

    python scripts/int4_quality.py MODEL --on TEXT [--sequences 64] [--tokens 512] [--undo-grid]

MODEL is a folder that `sparsify convert` wrote, or a bundle; TEXT a file. Every projection of the layers is rounded in the order in which
decoding reads it, the output layer to int8 blocks for both; hidden states are not rounded. Printed are the rise of the loss and the
divergence of the predicted distributions from those of the stored weights, which varies less between texts. Differences are paired by
sequence. --undo-grid is for weights that come from a file in 4 bits: they lie on a grid of its blocks of rows, which favours roundings
by rows. Each is moved by a random part of its block's step first, up to a half.
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


def int4(weight: torch.Tensor, *, by_columns: bool) -> torch.Tensor:
    if by_columns:
        return quantise(weight.T, "int4", by_columns=True).dequantised().T
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
        new = q4_0(weight) if kind == "Q4_0" else int4(weight, by_columns=name.endswith("down_proj"))
        error += float((new - weight).square().sum())
        size += float(weight.square().sum())
        weight.copy_(new)
    return copy, error / size


@torch.no_grad()
def undo_grid(model: SparseModel) -> None:
    """Moves every weight of the layers by up to half of the step of its block of 32 in a row, if that has 16 levels."""
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            blocks = module.weight.view(len(module.weight), -1, 32)
            step = (blocks.amax(2, keepdim=True) - blocks.amin(2, keepdim=True)) / 15
            blocks += (torch.rand(blocks.shape, generator=generator) - 0.5) * step


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--on", type=Path, required=True, help="text, or text compressed with gzip")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--undo-grid", action="store_true")
    options = parser.parse_args()
    model = load_sparse(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    read = gzip.open if options.on.suffix == ".gz" else open
    with read(options.on, "rt", encoding="utf-8") as file:
        ids = tokenizer(file.read(), return_tensors="pt")["input_ids"][0]
    sequences = ids[: options.sequences * options.tokens]
    sequences = sequences[: len(sequences) // options.tokens * options.tokens].view(-1, options.tokens)
    if options.undo_grid:
        undo_grid(model)
    variants, errors = {"stored": model}, {"stored": 0.0}
    for kind in ("int4 blocks", "Q4_0"):
        variants[kind], errors[kind] = rounded(model, kind)
    measured = {kind: [] for kind in variants}
    for one in sequences:
        expected = None
        for kind, variant in variants.items():
            shares = variant(one[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            expected = shares if expected is None else expected
            loss = -shares.gather(1, one[1:, None]).mean()
            measured[kind].append(torch.stack([loss, (expected.exp() * (expected - shares)).sum(1).mean()]))
    table = {kind: torch.stack(values) for kind, values in measured.items()}
    for kind, values in table.items():
        print(f"{kind}: {values[:, 0].mean():.4f} nats, relative squared error of the weights {errors[kind]:.6f}")
    for first, second in (("int4 blocks", "stored"), ("Q4_0", "stored"), ("int4 blocks", "Q4_0")):
        difference = table[first] - table[second]
        loss, divergence = difference.mean(0).tolist()
        own, other = (1.96 * difference.std(0) / math.sqrt(len(difference))).tolist()
        print(
            f"{first} - {second}: loss {loss:+.4f} ± {own:.4f}, divergence {divergence:+.4f} ± {other:.4f} "
            f"over {len(difference)} sequences"
        )


if __name__ == "__main__":
    main()
