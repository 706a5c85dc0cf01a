"""The benchmark of groups reads as many rows in each way, and refuses what means nothing."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sparsify.bench.group_speed import bench_groups, groups_table
from sparsify.cli.main import app
from sparsify.errors import UserError

SMALL = {"hidden": 64, "neurons": 96, "threads": 2, "repeats": 3, "on_progress": lambda _: None}


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int4"])
def test_whole_groups_and_scattered_neurons_are_as_many(weights: str) -> None:
    half = bench_groups(weights, active_share=0.5, group_size=8, **SMALL)
    assert half.read_share == 0.5
    assert half.speed.keys() == {"groups, by a router", "groups, known"}
    assert "times as fast" in groups_table(half).markdown()
    assert bench_groups(weights, active_share=1.0, group_size=8, **SMALL).read_share == 1.0


def test_the_command_prints_json() -> None:
    options = ["--hidden", "64", "--neurons", "96", "--repeats", "2", "--group-size", "16", "--json"]
    result = CliRunner().invoke(app, ["bench", "groups", *options])
    assert json.loads(result.stdout)["group_size"] == 16


@pytest.mark.parametrize(("weights", "active", "size"), [("fp8", 0.5, 8), ("bf16", 0.0, 8), ("bf16", 0.5, 7)])
def test_what_it_cannot_measure_is_refused(weights: str, active: float, size: int) -> None:
    with pytest.raises(UserError):
        bench_groups(weights, active_share=active, group_size=size, **SMALL)
