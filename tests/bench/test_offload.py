"""`sparsify bench offload` measures all ways on one model, and counts what the system read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsify.bench.offload import DENSE, MAPPED, WAYS, OffloadPlan, bench_offload
from sparsify.bench.offload_model import KINDS, Firing, perfect_predictors, write_model
from sparsify.bench.offload_report import offload_table, write_plot
from sparsify.errors import RecipeError
from sparsify.runtime.stored_weights import StoredModel


def test_all_ways_are_measured_on_one_file(native: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_NEURON_CACHE", "overwritten, and restored after the test")
    firing = Firing(active=0.1, skew=0.5)
    plan = OffloadPlan(tmp_path, "smollm2-135m", 8, firing, 0.25, 32, 2, 3, 1, 1)
    result = bench_offload(plan, lambda _: None)
    ways = {one.name: one for one in result.ways}
    mapped = {one.name for one in WAYS if one.mapped}
    assert ways.keys() == {one.name for one in WAYS} - (mapped if result.left_out else set())
    ffn = 8 * 3 * 1536 * 576 * 2
    assert result.ffn_gb == pytest.approx(ffn / 1e9)
    dense, exact, cached = ways[DENSE], ways["exact, no cache"], ways["predictor, LRU"]
    # A quarter of the neurons is in memory, and dense decoding reads all others. A unit of two rows of 1152 bytes takes 2560.
    rows, units = 8 * 1536 * 1152, 8 * 1536 * 2560
    held = 0.25 * ffn + 2 * 1536 * 1152 - 1536 * 2560
    assert dense.read_mb_per_token == pytest.approx((rows + units - held) / 1e6, rel=0.02)
    assert dense.to_dense == (1.0, 1.0, 1.0)
    assert exact.hit_rate == 0
    assert 0.05 * ffn < exact.read_mb_per_token * 1e6 < 0.3 * ffn
    assert cached.hit_rate is not None
    assert 0 < cached.hit_rate < 1
    assert cached.read_mb_per_token < ways["predictor, no cache"].read_mb_per_token
    # What is not read ahead is not read in vain.
    assert {one.over_fetch for one in ways.values() if one.hit_rate is not None and "prefetch" not in one.name} == {0}
    assert all(one.over_fetch is not None for one in ways.values() if "prefetch" in one.name)
    if not result.left_out:
        assert ways[MAPPED].read_mb_per_token == 0
        assert ways[MAPPED].peak_mb < result.limit_gb * 1e3 * 1.01
    table = offload_table(result).markdown()
    assert all(f"| {name} |" in table for name in ways)
    write_plot(result, tmp_path / "offload.svg")
    assert "tokens per second" in (tmp_path / "offload.svg").read_text()


def test_tokens_fire_the_neurons_that_were_drawn_for_them(tmp_path: Path) -> None:
    """The predictors are perfect, so exact decoding needs as many neurons as they predict."""
    uniform, skewed = Firing(0.1, 0.0), Firing(0.1, 0.9)
    for firing in (uniform, skewed):
        drawn = firing.drawn(1, 0, 1000)
        assert drawn.shape == (KINDS, 1000)
        assert drawn.sum(1).tolist() == [100] * KINDS
    often = [torch.sort(one.drawn(1, 0, 1000).sum(0), descending=True).values for one in (uniform, skewed)]
    assert often[1][:100].sum() > 2 * often[0][:100].sum()


def test_predictors_know_what_fires(native: str, tmp_path: Path) -> None:
    firing = Firing(0.2, 0.0)
    write_model(tmp_path, "smollm2-135m", 2, firing, lambda _: None)
    stored = StoredModel(tmp_path)
    gate, up, _ = (one.read() for one in stored.block(1, None))
    drawn = firing.drawn(1, 0, len(gate))
    (predictor,) = perfect_predictors(stored.config, firing, 40).layers[1]
    for kind in (0, KINDS - 1):
        x = torch.zeros(576)
        x[kind] = 24.0
        fires = (gate.float() @ x > 0) & (up.float() @ x > 0)
        assert torch.equal(fires, drawn[kind])
        scores = torch.relu(x @ predictor.a.float().T) @ predictor.b.float().T
        assert torch.equal(scores > predictor.threshold, drawn[kind])


def test_a_limit_on_everything_is_refused_if_what_stays_in_memory_exceeds_it(
    native: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_NEURON_CACHE", "overwritten, and restored after the test")
    plan = OffloadPlan(tmp_path, "smollm2-135m", 2, Firing(0.1, 0.0), 0.25, 32, 1, 1, 1, 1, (DENSE,), limit_share=0.25)
    with pytest.raises(RecipeError, match=r"leaves 0\.00 GB for neurons") as refused:
        bench_offload(plan, lambda _: None)
    assert "--limit" in str(refused.value.allowed)
