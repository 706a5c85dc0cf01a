"""`train -m`: every point is composed and checked before the first one trains."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparsify.cli import main
from sparsify.commands.run import environment
from sparsify.commands.train import check_sweep
from sparsify.errors import UserError
from sparsify.files import write_json
from sparsify.recipe.compose import compose_recipe, save_recipe, sweep


@pytest.fixture
def overrides(mixture_file: Path, tmp_path: Path) -> list[str]:
    return [f"mixture={mixture_file}", f"run_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"]


@pytest.mark.parametrize(
    ("axes", "names", "says"),
    [
        (
            ["training.global_batch_size=8,9", "training.seed=1,2"],
            "training.global_batch_size=9 training.seed=1",
            "cannot share evenly",
        ),
        (["training.sequence_length=64,256"], "training.sequence_length=256", "longer than the model's context"),
        (
            ["training.seed=1,2", "mixture.sources.code.files=[/nowhere/a.jsonl],[/b.jsonl]"],
            "/nowhere/a.jsonl",
            "'code'",
        ),
        (["training.seed=1,x"], "training.seed=x", "training.seed"),
        (["tracking.wandb=disabled,online"], "tracking.wandb=online", "there is no API key for api.wandb.ai"),
        (["model.source=package:sparsify/assets/quickstart_base,/nowhere"], "model.source=/nowhere", "no checkpoint"),
    ],
)
def test_nothing_trains_if_one_point_is_impossible(
    axes: list[str],
    names: str,
    says: str,
    recipe_file: Path,
    overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "argv", ["sparsify", "train", str(recipe_file), "-m", *overrides, *axes])
    with pytest.raises(SystemExit) as end:
        main.main()
    said = " ".join(capsys.readouterr().err.split())
    assert end.value.code == 2, said
    assert names in said
    assert says in said
    assert "runs was started" in said
    assert not (tmp_path / "runs").exists()


def test_a_point_whose_folder_holds_another_run_is_found_first(recipe_file: Path, overrides: list[str]) -> None:
    points = sweep([*overrides, "training.seed=1,2"])
    check_sweep(str(recipe_file), points)  # all of them can be trained
    other = compose_recipe(str(recipe_file), [*points[1], "optimizer.peak_learning_rate=0.01"])
    second = Path(other.run_dir)
    second.mkdir(parents=True)
    save_recipe(other, second / "recipe.yaml")
    (second / "mixture.lock.json").write_text("{}")
    write_json(second / "environment.json", environment(other))
    check_sweep(str(recipe_file), points)  # it has trained nothing
    (second / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    with pytest.raises(UserError, match=r"training\.seed=2 .*was begun with optimizer\.peak_learning_rate=0\.01"):
        check_sweep(str(recipe_file), points)
