"""Decodes a text whose neurons come from a file, in several ways: perplexity, hits, bytes and milliseconds of a token.

    python scripts/decode_from_file.py --text text.txt --to results.json my_model:share=0.5:dense my_model_dip:share=0.27:gamma=0.2

A case is a folder and, separated by colons, `share=` (of the feed-forward weights in memory), `policy=`, `gamma=`, `prefetch=` and
`dense`. Every case decodes the same tokens one after the other, after a prompt (`--prompt`; from empty caches without). Cases that the
results hold already are not repeated.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from sparsify.reporting.tables import Table
from sparsify.runtime import accelerate

COLUMNS = {
    "perplexity": ("perplexity", "{:.3f}"),
    "hits": ("hits", "{:.1%}"),
    "ahead": ("read ahead and needed, of misses", "{:.1%}"),
    "over_fetch": ("read ahead in vain, of needed", "{:.2f}"),
    "read_mb": ("MB", "{:.2f}"),
    "stall_mb": ("stall MB", "{:.2f}"),
    "wait_ms": ("waiting ms", "{:.1f}"),
    "ms": ("ms", "{:.1f}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens after it")
    parser.add_argument("--round", type=int, default=1, help="a number that is part of a result's name")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    os.environ.setdefault("SPARSIFY_NEURON_CACHE", str(given.to.parent / "neurons"))
    results: dict[str, dict[str, float]] = json.loads(given.to.read_text()) if given.to.is_file() else {}
    table = Table("", ["", *(title for title, _ in COLUMNS.values())])
    for case in given.cases:
        folder, *settings = case.split(":")
        key = f"{Path(folder).name} {' '.join(settings)} ({given.prompt} + {given.tokens} tokens, round {given.round})"
        if key not in results:
            fields = {name: value for name, _, value in (one.partition("=") for one in settings)}
            results[key] = decode(given, Path(folder), fields)
            given.to.write_text(json.dumps(results, indent=1))
            print(key, results[key], flush=True)
        table.add(key, *(form.format(results[key][name]) for name, (_, form) in COLUMNS.items()))
    print(table.markdown())


@torch.no_grad()
def decode(given: argparse.Namespace, folder: Path, fields: dict[str, str]) -> dict[str, float]:
    content = given.text.read_bytes()
    text = (gzip.decompress(content) if given.text.suffix == ".gz" else content).decode()
    text = text[: 20 * (given.prompt + given.tokens)]
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"][: given.prompt + given.tokens + 1])
    config = json.loads((folder / "config.json").read_text())
    ffn = config["num_hidden_layers"] * 3 * config["hidden_size"] * config["intermediate_size"] * 2
    prefetch: Any = fields.get("prefetch", "none")
    made: Any = accelerate(
        folder,
        memory=10**15,
        neuron_memory=round(float(fields["share"]) * ffn),
        policy=fields.get("policy", "no_cache" if "dense" in fields else "lfu"),
        prefetch=prefetch,
        gamma=float(fields.get("gamma", 1)),
        dense="dense" in fields,
        context_tokens=len(ids) + 8,
        threads=given.threads,
        tell=print,
    )
    past, loss = None, 0.0
    if given.prompt:
        past = made.model(ids[None, : given.prompt], use_cache=True).past_key_values
        past = made.model(ids[given.prompt].view(1, 1), past_key_values=past).past_key_values
        ids = ids[given.prompt + 1 :]  # the first step after a prompt reads what is held, and fits what guesses
        made.reset()
    begin = time.perf_counter()
    for token, label in pairwise(ids):
        output = made.model(token.view(1, 1), past_key_values=past, use_cache=True)
        past = output.past_key_values
        loss += float(torch.nn.functional.cross_entropy(output.logits[0, -1:].float(), label.view(1)))
    seconds, reads, count = time.perf_counter() - begin, made.neurons, len(ids) - 1
    return {
        "perplexity": math.exp(loss / count),
        "hits": reads.hit_rate,
        "ahead": reads.ahead / max(1, reads.needed - reads.hits),
        "over_fetch": reads.over_fetched / max(1, reads.needed),
        "read_mb": reads.bytes_read / count / 1e6,
        "stall_mb": reads.stall_bytes / count / 1e6,
        "wait_ms": 1e3 * reads.wait_seconds / count,
        "ms": 1e3 * seconds / count,
        "neuron_mb": made.offloaded.cache.neuron_bytes / 1e6,
    }


if __name__ == "__main__":
    main()
