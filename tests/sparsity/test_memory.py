"""The memory that the probe and the report add does not grow with the text or the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

MIB = 2**20
BOUND_MIB = 100

# A layer of a 7B model with tiny hidden states, so that activations dominate. The peak is the one that the kernel records
# for a separate process, since torch does not record CPU memory.
PROGRAM = """
import json, sys
from importlib import import_module
from pathlib import Path
import torch
from sparsify.methods.token_masks import TopKMask
from sparsify.models import SparseMistralConfig, SparseMistralForCausalLM
from sparsify.sparsity.curves import MagnitudeObserver
from sparsify.sparsity.probe import SparsityProbe

what, batch, tokens, passes = sys.argv[1], *map(int, sys.argv[2:])
measuring = import_module("sparsify.sparsity.measure")
torch.manual_seed(0)
config = SparseMistralConfig(vocab_size=64, hidden_size=8, intermediate_size=14336, num_hidden_layers=4,
    num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=tokens, ffn_activation="drelu")
model = SparseMistralForCausalLM(config).eval()
ids = torch.randint(0, 64, (batch, tokens))
one = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(tokens).expand(batch, tokens)}
mask = torch.arange(tokens).expand(batch, tokens) % 7 > 0
with torch.no_grad():
    if what == "report":
        measuring.measure(model, [one] * passes, name="m", text="t")
    elif what == "off":
        for _ in range(passes):
            measuring.summed_loss(model, one)
    else:
        with SparsityProbe(model) as probe:
            for _ in range(passes):
                probe.count(mask)
                measuring.summed_loss(model, one)
    if what == "curves":
        with SparsityProbe(model, MagnitudeObserver(model), mask=TopKMask(0.5)):
            for _ in range(passes):
                measuring.summed_loss(model, one)
print(json.dumps([int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines()
    if line.startswith("VmHWM")][0]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]


def peak_mib(what: str, *, batch: int, tokens: int = 1024, passes: int = 1) -> float:
    arguments = [what, str(batch), str(tokens), str(passes)]
    # A fixed threshold: glibc otherwise raises its own, and keeps freed pieces, which moved the peak by 200 MiB.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout) / MIB


@pytest.mark.parametrize("what", ["probe", "report", "curves"])
def test_added_memory_is_fixed(what: str) -> None:
    """8,192 tokens at once: each copy of their activations would take 470 MB."""
    model_alone = peak_mib("off", batch=4, tokens=2048)
    assert peak_mib(what, batch=4, tokens=2048) - model_alone < BOUND_MIB


def test_a_longer_text_needs_no_more_memory() -> None:
    once, thrice = (peak_mib("report", batch=1, passes=passes) for passes in (1, 3))
    assert thrice - once < 50
