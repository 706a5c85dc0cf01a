"""The benchmark of columns counts what was read, and refuses shares that mean nothing."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sparsify.bench.column_speed import bench_columns, columns_table
from sparsify.cli.main import app
from sparsify.errors import UserError

SMALL = {"hidden": 64, "neurons": 96, "threads": 2, "repeats": 3, "on_progress": lambda _: None}


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_it_reads_what_is_kept(weights: str) -> None:
    half = bench_columns(weights, kept_share=0.5, **SMALL)
    assert half.read_share == pytest.approx(0.5, abs=0.1)
    assert half.speed.lower_quartile <= half.speed.median <= half.speed.upper_quartile
    assert "bytes allow" in columns_table(half).markdown()
    assert bench_columns(weights, kept_share=1.0, **SMALL).read_share == 1.0


def test_the_command_prints_json() -> None:
    options = ["--hidden", "64", "--neurons", "96", "--repeats", "2", "--json"]
    result = CliRunner().invoke(app, ["bench", "columns", *options])
    assert json.loads(result.stdout)["weights"] == "bf16"


@pytest.mark.parametrize(("weights", "kept"), [("fp8", 0.5), ("bf16", 0.0), ("bf16", 1.5)])
def test_what_it_cannot_measure_is_refused(weights: str, kept: float) -> None:
    with pytest.raises(UserError):
        bench_columns(weights, kept_share=kept, **SMALL)
