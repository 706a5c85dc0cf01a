"""A model whose masks choose inputs decodes from a file of columns: as in memory, or with masks that prefer what is in memory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify.errors import ModelError
from sparsify.mixture.sequences.reader import PackedSequence
from sparsify.runtime import accelerate
from sparsify.runtime.column_cache import ColumnCache
from sparsify.runtime.file_reads import NeuronReads
from sparsify.simulation.cache_aware_decode import decode_cache_aware
from tests.runtime.test_offload import MEMORY, NEURONS, PROMPT, SMALLEST, decoded, load, saved

WIDE = 128
"""Hidden size of rows without padding."""
DIP = {"method": "dip", "sites": {"ffn_in": {"rule": "top_k"}, "inter": {"rule": "top_k"}}}
INPUTS_ALONE = {"method": "teal", "sites": {"ffn_in": {"rule": "threshold"}}}


@pytest.fixture(autouse=True)
def _own_files(native: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_NEURON_CACHE", str(tmp_path_factory.getbasetemp() / "neurons"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("columns")
    of = {"sparsification": DIP, "ffn_activation": "swiglu"}
    return {
        "dip": saved(root / "dip", **of),
        "fp32": saved(root / "fp32", dtype=torch.float32, tie_word_embeddings=True, **of),
        "wide": saved(root / "wide", dtype=torch.float32, hidden_size=WIDE, **of),
        "inputs": saved(root / "inputs", sparsification=INPUTS_ALONE, ffn_activation="swiglu"),
    }


def of_file(folder: Path, **changed: Any) -> Any:
    return accelerate(folder, memory=MEMORY, **{"neuron_memory": SMALLEST} | changed)


@pytest.mark.parametrize("kind", ["dip", "fp32", "inputs"])
@pytest.mark.parametrize(("policy", "memory"), [("lru", SMALLEST), ("no_cache", SMALLEST), ("lfu", "1GB")])
def test_it_decodes_as_in_memory_to_the_bit(folders: dict[str, Path], kind: str, policy: str, memory: Any) -> None:
    model = load(folders[kind])
    accelerate(model)
    made = of_file(folders[kind], policy=policy, neuron_memory=memory)
    wanted = decoded(model)
    assert wanted.isfinite().all()
    for _ in range(2):  # the second time after what a prompt left in memory
        assert torch.equal(decoded(made.model), wanted)
    reads = made.neurons
    assert (reads.hits == 0) == (policy == "no_cache")


def test_threads_wait_for_each_other(folders: dict[str, Path]) -> None:
    wanted = decoded(of_file(folders["dip"], gamma=0.3, threads=1).model, 6)
    assert torch.equal(decoded(of_file(folders["dip"], gamma=0.3, threads=3).model, 6), wanted)


@torch.no_grad()
def text_loss(made: Any, ids: torch.Tensor) -> float:
    """Nats per token of a text that is decoded token by token from nothing."""
    past, total = None, 0.0
    for token, label in pairwise(ids):
        output = made.model(token.view(1, 1), past_key_values=past, use_cache=True)
        past = output.past_key_values
        total += float(torch.nn.functional.cross_entropy(output.logits[0, -1:].float(), label.view(1)))
    return total / (len(ids) - 1)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.1])
def test_masks_prefer_what_is_in_memory_as_the_simulator_says(folders: dict[str, Path], gamma: float) -> None:
    """The same losses and hits as those of masks that torch's operators choose by the same policy."""
    ids = torch.from_numpy(np.random.default_rng(3).integers(3, 90, 24))
    # As much as a token of the masks at hand never exceeds, and less than all.
    memory = round(0.85 * 3 * 3 * WIDE * NEURONS * 4)
    made, plain = (of_file(folders["wide"], policy="lfu", gamma=one, neuron_memory=memory) for one in (gamma, 1.0))
    cache: ColumnCache = made.offloaded.cache
    capacities = [one._capacity() for one in (cache.inputs, cache.down)]
    assert 0.8 * WIDE < capacities[0] < WIDE
    found = text_loss(made, ids)
    sequence = PackedSequence("text", ids[:-1].numpy(), np.arange(23), ids[1:].numpy())
    (wanted,) = decode_cache_aware(load(folders["wide"]), [sequence], gamma=gamma, policy="lfu", capacities=capacities)
    assert found == pytest.approx(wanted.loss / wanted.labels, rel=2e-4)
    text_loss(plain, ids)
    rates: list[NeuronReads] = [one.neurons for one in (made, plain)]
    assert rates[0].hit_rate > rates[1].hit_rate or gamma == 1


def test_reads_are_counted(folders: dict[str, Path]) -> None:
    made = of_file(folders["dip"], policy="no_cache")
    decoded(made.model, 4)
    made.reset()
    with torch.no_grad():
        output = made.model(PROMPT[:, :1], use_cache=True)
        made.model(PROMPT[:, 1:2], past_key_values=output.past_key_values)
    cache: ColumnCache = made.offloaded.cache
    inputs, down = cache.inputs.counts, cache.down.counts
    assert inputs.unit_bytes == inputs.needed * 2 * NEURONS * 2
    assert down.unit_bytes == down.needed * 512  # rows of 128 bytes, aligned
    assert made.neurons == inputs + down


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": "int8"}, "Every row of gate and up"),
        ({"prefetch": "persistence"}, "choose inputs"),
        ({"policy": "static"}, "holds neurons"),
        ({"gamma": 1.5}, "gamma is 1.5"),
    ],
)
def test_what_columns_cannot_do_is_refused(folders: dict[str, Path], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        of_file(folders["dip"], **changed)


def test_gamma_of_masks_that_choose_no_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="do not depend on what is in memory"):
        of_file(saved(tmp_path / "relu"), gamma=0.5)
