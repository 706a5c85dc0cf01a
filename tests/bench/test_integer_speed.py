"""The benchmark of integers measures every way for every number of tokens, beside the time of reading the weights."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sparsify.bench.integer_speed import bench_integers, integers_table
from sparsify.cli.main import app
from sparsify.reporting.tables import Table
from sparsify.runtime.build import find_compiler

WAYS = {"W4A4", "W4A4, smoothed by 128", "W4A16", "W8A8", "int4 blocks", "torch, bf16", "torch, fp32"}


@pytest.fixture(autouse=True)
def compiler() -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler")


def test_it_measures_every_way_and_the_bytes_of_its_weights() -> None:
    bench = bench_integers(64, [96, 32], [1, 20], 1, 3, lambda _: None)
    assert len(bench.timings) == 2 * 2 * len(WAYS)
    assert {one.way for one in bench.timings} == WAYS
    sizes = {one.way: one.bytes_read for one in bench.timings if one.neurons == 96}
    assert sizes["torch, bf16"] == 2 * 3 * 64 * 96
    assert sizes["W8A8"] == 3 * 64 * 96 + 4 * (96 + 96 + 64)
    assert sizes["W4A4"] == 3 * 64 * 96 // 2 + 4 * (96 + 96 + 64)
    assert all(one.speed.median == 1 for one in bench.timings if one.way == "torch, bf16")
    titles = [one.title for one in integers_table(bench).renderables if isinstance(one, Table)]
    assert titles[0] == "1 token, a block of 64×96, 1 threads"
    assert titles[3] == "20 tokens, a block of 64×32, 1 threads"


def test_the_command_prints_json() -> None:
    options = ["--hidden", "64", "--neurons", "64", "--tokens", "1", "--repeats", "2", "--json"]
    result = CliRunner().invoke(app, ["bench", "integers", *options])
    assert {one["way"] for one in json.loads(result.stdout)["timings"]} == WAYS
