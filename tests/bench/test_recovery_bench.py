"""`sparsify bench recovery`: reading runs, choosing and comparing variants, and one small real benchmark."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from sparsify.bench.recovery import (
    Recovery,
    RecoveryPlan,
    RecoveryPoint,
    RecoveryRun,
    RecoveryVariant,
    bench_recovery,
    read_run,
    variant_names,
)
from sparsify.bench.recovery_report import recovery_table, write_recovery
from sparsify.cli.bounds import LEARNING_RATE
from sparsify.errors import RecipeError, RunError
from sparsify.recipe.compose import save_recipe
from sparsify.runs.run_folder import RunFolder
from tests.conftest import Setup


def point(tokens: int, loss: float, zeros: float, gate_zeros: float) -> RecoveryPoint:
    return RecoveryPoint(tokens=tokens, loss=loss, zeros=zeros, gate_zeros=gate_zeros, blended_share=1)


def variant(name: str, losses: list[float], dense: list[float], zeros: float) -> RecoveryVariant:
    runs = [
        RecoveryRun(
            variant=name,
            seed=seed,
            peak_learning_rate=1e-3,
            path="",
            points=[point(0, loss + 1, zeros, zeros / 2), point(100, loss, zeros, zeros / 2)],
        )
        for seed, loss in enumerate(losses, start=1)
    ]
    gaps = [loss - other for loss, other in zip(losses, dense, strict=True)]
    return RecoveryVariant(name=name, searched={3e-4: 9.0, 1e-3: losses[0]}, runs=runs, gaps=gaps)


def recovery() -> Recovery:
    dense = [3.0, 3.2]
    variants = [variant("dense", dense, dense, 0.0), variant("drelu", [3.5, 3.6], dense, 0.9)]
    return Recovery(budget_tokens=100, seeds=[1, 2], variants=variants)


def test_bytes_are_those_of_an_exact_kernel() -> None:
    # Of 30 rows of gate, up and down with 6 gates above zero and 3 products: 30 + 6 + 3 of 90.
    measured = point(0, 3.0, zeros=0.9, gate_zeros=0.8)
    assert measured.gate_first_bytes == pytest.approx(39 / 90)
    assert measured.predicted_bytes == pytest.approx(0.1)
    assert point(0, 3.0, zeros=0.0, gate_zeros=0.0).gate_first_bytes == 1


@pytest.mark.slow
def test_a_real_run_is_read_to_its_end(finished: Callable[[Setup], tuple[Path, dict]], tmp_path: Path) -> None:
    folder, _ = finished(Setup("mistral", 1, 1, "fp32"))
    run = RunFolder(folder)
    read = read_run(run, "drelu")
    recipe = run.load_recipe()
    assert [one.tokens for one in read.points] == [0, 2048, recipe.training.budget_tokens]
    assert 0.3 < read.last.gate_zeros < read.last.zeros < 0.95
    recipe.training.budget_tokens += 10 * recipe.step_tokens
    for name in ("metrics.jsonl", "sparsity.jsonl"):
        (tmp_path / name).write_text((folder / name).read_text())
    save_recipe(recipe, tmp_path / "recipe.yaml")
    with pytest.raises(RunError, match="not evaluated at the end"):
        read_run(RunFolder(tmp_path), "drelu")


def test_each_seed_is_compared_with_its_own_baseline(tmp_path: Path) -> None:
    result = recovery()
    assert result.variants[1].gap == pytest.approx((0.5 + 0.4) / 2)
    console = Console(width=140)
    with console.capture() as captured:
        console.print(recovery_table(result))
    row = next(line for line in captured.get().splitlines() if line.strip().startswith("drelu"))
    for cell in ("0.001*", "3.550", "+0.450 ± 0.050", "90.0%", "45.0%", "55.0%", "10.0%"):
        assert cell in row
    write_recovery(result, tmp_path)
    assert Recovery.model_validate_json(
        json.dumps(_without_computed(json.loads((tmp_path / "recovery.json").read_text())))
    )
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"tokens.png", "zeros.png", "gate_first.png", "predictor.png"}


def _without_computed(value: object) -> object:
    if isinstance(value, dict):
        computed = ("gap", "gate_first_bytes", "predicted_bytes")
        return {key: _without_computed(item) for key, item in value.items() if key not in computed}
    return [_without_computed(item) for item in value] if isinstance(value, list) else value


def test_every_recipe_in_its_folder_is_a_variant_and_the_baseline_comes_first() -> None:
    names = variant_names()
    assert names[0] == "dense"
    assert {"drelu", "reglu", "blended_drelu", "prosparse_reglu", "target_drelu"} <= set(names)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (RecoveryPlan(Path("r"), variants=["dralu"]), "Did you mean 'drelu'?"),
        (RecoveryPlan(Path("r"), rates=[]), "--rates is empty"),
        (RecoveryPlan(Path("r"), seeds=[1, 1]), "each once"),
        (RecoveryPlan(Path("r"), overrides=["training.seed=3"]), "sets training.seed itself"),
        (RecoveryPlan(Path("r"), overrides=["run_dir=x"]), "sets run_dir itself"),
    ],
)
def test_invalid_plans_are_refused_before_training(
    plan: RecoveryPlan, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sparsify")
    with pytest.raises(RecipeError) as error:
        bench_recovery(plan)
    assert message in str(error.value)
    assert not caplog.records
    with pytest.raises(RecipeError, match="--rates is '1e-3;1e-4'"):
        LEARNING_RATE.parse_list("--rates", "1e-3;1e-4")


@pytest.fixture
def small(stock: dict[str, Path], mixture_file: Path, tmp_path: Path) -> list[str]:
    """Overrides for a tiny model and short sequences."""
    return [
        f"model.source={stock['mistral']}",
        f"mixture={mixture_file}",
        f"cache_dir={tmp_path / 'cache'}",
        "training.sequence_length=64",
        "optimizer.warmup_tokens=512",
        "eval.validation_sequences_per_source=2",
        "launch.processes=1",
    ]


@pytest.mark.slow
def test_a_small_complete_benchmark(small: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides = [
        *small,
        "training.budget_tokens=4096",
        "eval.every_tokens=2048",
    ]
    plan = RecoveryPlan(tmp_path / "r", ["blended_drelu"], [1e-3, 3e-3], [1, 2], overrides)
    caplog.set_level(logging.INFO, "sparsify")
    result = bench_recovery(plan)
    assert [one.name for one in result.variants] == ["dense", "blended_drelu"]
    for one in result.variants:
        assert one.searched.keys() == {1e-3, 3e-3}
        assert one.peak_learning_rate == min(one.searched, key=lambda rate: one.searched[rate])
        assert [run.seed for run in one.runs] == [1, 2]
    points = result.variants[1].runs[0].points
    assert [one.blended_share for one in points] == [0.0, 1.0, 1.0]
    assert points[0].loss == pytest.approx(result.variants[0].runs[0].points[0].loss, abs=1e-5)
    again = bench_recovery(plan)
    assert again == result
    assert sum("Trained already" in line for line in caplog.messages) == 6


@pytest.mark.slow
def test_the_rates_of_a_search_share_one_calibration(
    small: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = [
        *small,
        "training.budget_tokens=1024",
        "checkpoint.every_tokens=1024",
        "eval.every_tokens=1024",
        "conversion.calibration_tokens=1024",
    ]
    plan = RecoveryPlan(tmp_path / "r", ["thresholded90_reglu"], [1e-4, 1e-3], [1], overrides, search_tokens=512)
    caplog.set_level(logging.INFO, "sparsify")
    result = bench_recovery(plan)
    assert sum(line.startswith("Calibrated on") for line in caplog.messages) == 1
    runs = list((tmp_path / "r/runs/thresholded90_reglu").iterdir())
    assert len(runs) == 3
    assert len({(run / "initial/model.safetensors").read_bytes() for run in runs}) == 1
    starts = {one.points[0].loss for one in (read_run(RunFolder(run), "thresholded90_reglu") for run in runs)}
    assert starts == {result.variants[1].runs[0].points[0].loss}
