"""Recorded masks against what the blocks compute, and cache-aware decoding against plain decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import RunError
from sparsify.mixture.sequences.reader import PackedSequence
from sparsify.models import SparseModel
from sparsify.runtime.cache_policies import cache_policy
from sparsify.simulation.cache_aware_decode import check_cache_aware, decode_cache_aware
from sparsify.simulation.record import check_fetch, natural_fetch, record
from tests.methods.conftest import Calibrate

TOKENS = 48


@pytest.fixture(scope="module")
def dip(shared: Any, calibrate: Calibrate) -> Any:
    def load(kind: str) -> SparseModel:
        folder = shared(
            f"simulated-{kind}",
            lambda root: calibrate(kind, "swiglu", root / "dip", tokens=640, method="dip", target_zeros=0.5),
        )
        return load_sparse(folder / "dip")

    return load


@pytest.fixture(scope="module")
def calibrate(mixture_file: Path, stock: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Calibrate:
    return Calibrate(mixture_file, stock, tmp_path_factory.mktemp("calibration-cache"))


def ids() -> torch.Tensor:
    return torch.randint(5, 2000, (TOKENS,), generator=torch.Generator().manual_seed(1))


def sequence() -> PackedSequence:
    tokens = ids().numpy()
    return PackedSequence("text", tokens, np.arange(TOKENS), np.roll(tokens, -1))


def test_the_neurons_of_a_relu_model_are_those_of_a_decode_step_by_step(stock: dict[str, Path]) -> None:
    model = load_sparse(stock["mistral"], "drelu")
    seen: dict[str, list[torch.Tensor]] = {"gate": [], "product": []}

    def keep(activation: Any, args: Any, product: torch.Tensor) -> None:
        seen["gate"].append(activation.masked_gate(args[0])[0, -1] != 0)
        seen["product"].append(product[0, -1] != 0)

    for block in model.ffn_blocks():
        block.ffn_activation.register_forward_hook(keep)
    cache = None
    with torch.no_grad():
        for token in ids().tolist():
            cache = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
    for fetch, what in (("gate_first", "gate"), ("neurons", "product")):
        model = load_sparse(stock["mistral"], "drelu")
        (trace,) = record(model, [ids()], fetch)
        stepwise = torch.stack(seen[what]).view(TOKENS, 2, -1).numpy()
        found = np.stack([layer.masks[0] for layer in trace.layers()], 1)
        assert found.shape == (TOKENS, 2, 64)
        assert (found != stepwise).mean() < 0.002  # sums of another order round otherwise
        assert 0.2 < found.mean() < 0.8


def test_each_expert_has_slots_of_its_own(dip: Any) -> None:
    model = dip("mixtral")
    routed: list[torch.Tensor] = []
    for block in model.ffn_blocks():
        block.register_forward_pre_hook(
            lambda _, args, kwargs: routed.append(kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]),
            with_kwargs=True,
        )
    (trace,) = record(model, [ids()], "inputs")
    for layer, chosen in zip(trace.layers(), routed, strict=True):
        inputs, neurons = (masks.reshape(TOKENS, 4, -1) for masks in layer.masks)
        assert inputs.shape[2] == 32
        assert neurons.shape[2] == 64
        used = np.zeros((TOKENS, 4), np.bool_)
        np.put_along_axis(used, chosen.numpy(), True, 1)
        assert np.array_equal(inputs.any(2), used)
        assert set(inputs.sum(2)[used].tolist()) == {18}
        assert set(neurons.sum(2)[used].tolist()) == {22}
        # Experts of a token share the mask of its input.
        assert all(len({tuple(row) for row in inputs[token][used[token]]}) == 1 for token in range(TOKENS))
    (dense,) = record(model, [ids()], "dense")
    assert all((layer.masks[0].sum(1) == 2 * 64).all() for layer in dense.layers())


def test_plain_gamma_is_the_model_itself_and_smaller_ones_miss_less(dip: Any) -> None:
    model = dip("mistral")
    text = sequence()
    capacities = [20, 36]
    misses, losses = [], []
    for gamma in (1.0, 0.5, 0.1):
        (found,) = decode_cache_aware(model, [text], gamma=gamma, policy="lfu", capacities=capacities)
        layers = list(found.trace.layers())
        assert {int(count) for layer in layers for count in layer.masks[0].sum(1)} == {18}
        losses.append(found.loss / found.labels)
        misses.append(_misses(layers, capacities))
    assert misses[0] > misses[1] > misses[2]
    with torch.no_grad():
        logits = model(ids()[None]).logits[0]
    plain = torch.nn.functional.cross_entropy(logits, torch.from_numpy(text.labels)).item()
    assert losses[0] == pytest.approx(plain, abs=1e-4)
    (trace,) = record(model, [ids()], "inputs")
    (again,) = decode_cache_aware(model, [text], gamma=1.0, policy="lru", capacities=capacities)
    for recorded, decoded in zip(trace.layers(), again.trace.layers(), strict=True):
        assert all((one != other).mean() < 0.01 for one, other in zip(recorded.masks, decoded.masks, strict=True))
    assert not any(mask._forward_hooks for block in model.ffn_blocks() for mask in (block.input_mask,))


def _misses(layers: list[Any], capacities: list[int]) -> int:

    total = 0
    for layer in layers:
        for masks, capacity in zip(layer.masks, capacities, strict=True):
            cache = cache_policy("lfu", masks.shape[1], capacity)
            total += sum(len(cache.step(mask).misses) for mask in masks)
    return total


def test_what_a_model_cannot_skip_is_refused(stock: dict[str, Path], dip: Any) -> None:
    dense, relu = load_sparse(stock["mistral"]).config, load_sparse(stock["mistral"], "drelu").config
    assert natural_fetch(dense) == "dense"
    assert natural_fetch(relu) == "gate_first"
    assert natural_fetch(dip("mistral").config) == "inputs"
    with pytest.raises(RunError, match="makes no such zeros"):
        check_fetch("neurons", dense)
    with pytest.raises(RunError, match="--fetch inputs"):
        check_fetch("inputs", relu)
    check_fetch("neurons", relu)
    with pytest.raises(RunError, match="needs top-k masks"):
        check_cache_aware(relu)
    with pytest.raises(RunError, match="for dense models"):
        check_cache_aware(dip("mixtral").config)
