"""What rounding predictors costs: the neurons that fire which they find, and those that they switch on, as stored and in blocks.

    python scripts/predictor_rounding.py MODEL --predictors PREDICTORS --on TEXT [--sequences 16] [--tokens 256]

MODEL is a folder or a bundle of a model without experts, PREDICTORS what `sparsify predictors train` wrote for it. In blocks the inputs of both matrices are
rounded, too, as decoding does. All at the predictors' own threshold.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import torch
from transformers import AutoTokenizer

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.models.quantised import product
from sparsify.predictors import read_predictors
from sparsify.predictors.inputs import BlockInputs
from sparsify.runtime import BlockMatrix, quantise

KINDS = ("bf16", "int8", "int4")


def _times(x: torch.Tensor, part: torch.Tensor | BlockMatrix) -> torch.Tensor:
    return product(x, part, by_columns=False) if isinstance(part, BlockMatrix) else x @ part.float().T


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--predictors", type=Path, required=True)
    parser.add_argument("--on", type=Path, required=True, help="text, or text compressed with gzip")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence")
    options = parser.parse_args()
    model = load_sparse(options.model, dtype=torch.float32).eval()
    predictors = read_predictors(options.predictors)
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    read = gzip.open if options.on.suffix == ".gz" else open
    with read(options.on, "rt", encoding="utf-8") as file:
        ids = tokenizer(file.read(), return_tensors="pt")["input_ids"][0]
    layers = {
        layer: {
            "bf16": [part.bfloat16() for part in pair],
            "int8": [quantise(part, "int8") for part in pair],
            "int4": [quantise(part, "int4") for part in pair],
        }
        for (layer, _), pair in predictors.blocks.items()
    }
    threshold, counts = predictors.facts.threshold, {kind: torch.zeros(4, dtype=torch.int64) for kind in KINDS}
    with BlockInputs(model, predictors.facts.input) as inputs:

        def add(layer: int, output: torch.Tensor) -> None:
            fired = output.flatten(0, -2) != 0
            for kind, (a, b) in layers[layer].items():
                on = _times(_times(inputs.rows(0), a).relu(), b) > threshold
                counts[kind] += torch.stack([fired.sum(), (fired & on).sum(), on.sum(), torch.tensor(on.numel())])

        for layer, block in enumerate(model.ffn_blocks()):
            block.ffn_activation.register_forward_hook(lambda _, __, output, layer=layer: add(layer, output))
        for one in ids[: options.sequences * options.tokens].view(-1, options.tokens):
            model(one[None], use_cache=False)
    for kind, (fired, hit, on, everything) in ((kind, values.tolist()) for kind, values in counts.items()):
        print(f"{kind}: recall {hit / fired:.2%}, on {on / everything:.2%}; {fired / everything:.2%} fire")


if __name__ == "__main__":
    main()
