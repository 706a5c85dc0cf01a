"""`bench activation` times all implementations on the same tensors; its ratios follow from the times."""

from __future__ import annotations

import pytest

from sparsify.bench.activation_speed import activation_table, bench_activation
from sparsify.cli import main
from sparsify.errors import RecipeError
from sparsify.training.kernels.activation import fastest_implementation

SIZE = {"tokens": 64, "neurons": 512, "dtype": "fp32"}


def test_the_fused_kernel_is_measured_against_eager() -> None:
    bench = bench_activation("drelu", **SIZE, repeats=1, on_progress=lambda _: None)
    eager, fused = bench.implementations
    assert (eager.name, fused.name) == ("eager", fastest_implementation())
    assert fused.both_speed is not None
    assert fused.both_speed.median == pytest.approx(eager.both_seconds / fused.both_seconds)
    moved_bytes = 3 * 64 * 512 * 4 / eager.forward_seconds
    assert eager.forward_bandwidth_share == pytest.approx(moved_bytes / bench.copy_bytes_per_second)
    assert fused.both_bandwidth_share / fused.forward_bandwidth_share == pytest.approx(
        8 / 3 * fused.forward_seconds / fused.both_seconds
    )
    with main.console.capture() as shown:
        main.console.print(activation_table(bench))
    assert f"{fused.name}, with backward" in shown.get()


def test_invalid_options_are_refused() -> None:
    with pytest.raises(RecipeError, match="--activation"):
        bench_activation("gelu", **SIZE, repeats=1, on_progress=lambda _: None)
    with pytest.raises(RecipeError, match="--repeats"):
        bench_activation("drelu", **SIZE, repeats=0, on_progress=lambda _: None)
