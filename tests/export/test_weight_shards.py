"""Shards hold the right tensors, and writing them needs the memory of one shard."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsify.conversion.source_checkpoint import INDEX
from sparsify.errors import RunError
from sparsify.export.weight_shards import write_shards
from sparsify.models import (
    SparseMistralConfig,
    SparseMistralForCausalLM,
    SparseMixtralConfig,
    SparseMixtralForCausalLM,
)
from tests.conftest import SHAPE

MB = 2**20


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_shards_load_as_the_model_that_was_written(kind: str, shard_bytes: int, tmp_path: Path) -> None:
    model_class, config = {
        "mistral": (SparseMistralForCausalLM, SparseMistralConfig(**SHAPE)),
        "mixtral": (SparseMixtralForCausalLM, SparseMixtralConfig(**SHAPE, num_local_experts=4)),
    }[kind]
    torch.manual_seed(0)
    model = model_class(config)
    write_shards(model.state_dict(), config, tmp_path, torch.float32, shard_bytes)
    config.save_pretrained(tmp_path)
    again, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if shard_bytes == 10**9:
        assert files == ["model.safetensors"]
        return
    index = json.loads((tmp_path / INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == files
    for file in files:
        tensors = load_file(tmp_path / file).values()
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors) <= shard_bytes


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    config = SparseMistralConfig(**SHAPE)
    weights = SparseMistralForCausalLM(config).state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(RunError, match=r"does not hold model\.layers\.1\.mlp\.up_proj"):
        write_shards(weights, config, tmp_path, torch.float32, 10**9)


def _own_bytes() -> int:
    """Memory of this process without file-backed pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak_own_bytes() -> Iterator[list[int]]:
    """A list whose last entry, after the block, is the largest growth of this process's memory."""
    start, over, peak = _own_bytes(), threading.Event(), [0]

    def watch() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], _own_bytes() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def test_peak_memory_is_one_shard(tmp_path: Path) -> None:
    config = SparseMixtralConfig(
        **SHAPE | {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 24},
        num_local_experts=8,
    )
    with torch.device("meta"):
        meta = SparseMixtralForCausalLM(config).state_dict()
    stored = {
        name: torch.zeros(tensor.shape, dtype=torch.bfloat16).fill_(index)
        for index, (name, tensor) in enumerate(meta.items())
    }
    model_bytes = sum(tensor.nbytes for tensor in stored.values())
    fused_bytes = max(tensor.nbytes for tensor in stored.values())
    torch.save({"module": stored}, tmp_path / "states.pt")
    del stored
    weights = torch.load(tmp_path / "states.pt", mmap=True)["module"]
    shard_bytes = 12 * MB
    with peak_own_bytes() as peak:
        write_shards(weights, config, tmp_path, torch.bfloat16, shard_bytes)
    assert model_bytes > 250 * MB
    # A shard, one layer's fused experts, and what allocators keep.
    assert peak[0] < shard_bytes + fused_bytes + 40 * MB, f"{peak[0] / MB:.0f} MB"
