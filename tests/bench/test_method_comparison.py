"""`sparsify bench methods` on a tiny model: two methods at two densities, interrupted and resumed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from rich.console import Console

from sparsify.bench.method_comparison import MethodsPlan, bench_methods
from sparsify.bench.method_comparison_report import methods_table, write_methods
from sparsify.errors import RecipeError, RunError
from tests.methods.conftest import killed_after


def plan_for(stock: dict[str, Path], mixture_file: Path, to: Path, **changed: object) -> MethodsPlan:
    settings = {
        "methods": ["percentile", "percentile:site=gate"],
        "densities": [0.85, 0.3],
        "refit": True,
        "calibration_tokens": 512,
        "tokens": 192,
        "sequence_length": 32,
        "decode_tokens": 4,
    }
    return MethodsPlan(str(stock["mistral"]), str(mixture_file), to, **settings | changed)  # pyright: ignore[reportArgumentType]


def test_an_interrupted_comparison_resumes_and_says_the_same(
    stock: dict[str, Path],
    mixture_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "sparsify")
    plan = plan_for(stock, mixture_file, tmp_path / "out", decode_tokens=0, keep=True)
    with killed_after("Variant 3 of 8"):
        bench_methods(plan)
    measured = json.loads((plan.to / "methods.json").read_text())["points"]
    assert len(measured) == 2
    caplog.clear()
    bench = bench_methods(plan)
    assert "2 of 8 variants are measured already" in caplog.text
    assert "Measuring the dense model" not in caplog.text
    assert [point.model_dump() for point in bench.points[:2]] == measured
    assert not (tmp_path / ".out.methods").exists()
    assert {path.name for path in (plan.to / "models").iterdir()} == {"percentile-0.85", "percentile-site-gate-0.85"}

    caplog.clear()
    untimed, bench = bench, bench_methods(plan_for(stock, mixture_file, plan.to))
    assert "Variant" not in caplog.text
    assert [point.difference for point in bench.points] == [point.difference for point in untimed.points]

    for name in plan.methods:
        plain, refitted = (bench.point(name, 0.85, refit) for refit in (False, True))
        assert plain is not None
        assert refitted is not None
        for point in (plain, refitted):
            assert point.difference is not None
            assert point.difference.num_sequences == bench.num_sequences
            assert point.loss == pytest.approx(bench.dense_loss + point.difference.value)
            assert point.weight_density == pytest.approx(0.85, abs=0.03)
        assert plain.target_zeros == refitted.target_zeros
        assert list(plain.zeros) == ["gate" if "gate" in name else "inter"]
        assert plain.decoding is not None
        before = untimed.point(name, 0.85, False)
        assert before is not None
        assert before.decoding is None
        assert plain.decoding.dense_tokens_per_second > 0
        impossible = bench.point(name, 0.3, False)
        assert impossible is not None
        assert "cannot read so little" in impossible.impossible

    write_methods(bench, plan.to)
    page = (plan.to / "methods.html").read_text()
    assert "percentile:site=gate" in page
    assert "data:image/svg+xml" in page
    assert (plan.to / "loss_against_weights_read.png").is_file()
    console = Console(width=200)
    with console.capture() as capture:
        console.print(methods_table(bench))
    rows = [line.split() for line in capture.get().splitlines() if "percentile" in line]
    assert [row[:2] for row in rows[2:4]] == [["0.3", "percentile"], ["0.3", "percentile:site=gate"]]
    assert all("impossible" in row for row in rows[2:4])
    assert not any("impossible" in row for row in rows[:2])

    with pytest.raises(RunError, match="another text and calibration_tokens"):
        bench_methods(plan_for(stock, mixture_file, plan.to, calibration_tokens=1024))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": ["percentil"]}, "Did you mean 'percentile'"),
        ({"methods": ["calibrated_replacement"]}, "not a mask"),
        ({"methods": ["percentile:site"]}, "NAME:KEY=VALUE"),
        ({"methods": ["percentile:site=up"]}, "'inter' or 'gate'"),
        ({"methods": ["percentile:conversion.remainder=some"]}, "none, constant"),
        ({"methods": ["percentile", "percentile"]}, "each once"),
        ({"densities": []}, "--densities is empty"),
    ],
)
def test_what_cannot_be_compared(
    stock: dict[str, Path], mixture_file: Path, tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        bench_methods(plan_for(stock, mixture_file, tmp_path / "out", **changed))
    assert not list(tmp_path.iterdir())
