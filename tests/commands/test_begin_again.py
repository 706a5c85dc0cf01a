"""A folder whose run stopped before its first step takes other settings; one that has trained does not."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from sparsify.commands.run import CHECKPOINT_MARK, _open_run, check_start
from sparsify.errors import RunError
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.recipe import Recipe
from sparsify.runs.run_folder import RunFolder


class Stopped:
    """A run that had its model converted and its data locked, and stopped as it measured the base."""

    def __init__(self, recipe_file: Path, stock: dict[str, Path], root: Path) -> None:
        self.run = RunFolder(root / "run")
        self.before, self.other = (self._recipe(recipe_file, stock[kind], root) for kind in ("mistral", "llama"))
        _open_run(self.before, self.run)
        self.run.initial.mkdir()
        (self.run.initial / CHECKPOINT_MARK).touch()
        self.run.mixture_lock.write_text("{}")
        base = {"kind": "validation", "step": 0, "label": "base", "loss": 3.0, "zeros": 0.0, "sources": {}}
        self.run.metrics.write_text(json.dumps(base) + "\n")

    def _recipe(self, file: Path, source: Path, root: Path) -> Recipe:
        places = [f"run_dir={self.run.path}", f"cache_dir={root / 'cache'}", "tracking.wandb=disabled"]
        return compose_recipe(str(file), [f"model.source={source}", *places])


@pytest.fixture
def stopped(recipe_file: Path, stock: dict[str, Path], tmp_path: Path) -> Stopped:
    return Stopped(recipe_file, stock, tmp_path)


def test_another_source_begins_again(stopped: Stopped, caplog: pytest.LogCaptureFixture) -> None:
    run = stopped.run
    check_start(stopped.other, run)
    assert run.mixture_lock.is_file()  # a check changes nothing
    with caplog.at_level(logging.INFO, "sparsify"):
        _open_run(stopped.other, run)
    assert "trained no step with them: it begins again" in caplog.text
    assert not run.initial.exists()
    assert not run.mixture_lock.exists()
    assert run.load_recipe().model.source == stopped.other.model.source


def test_the_same_settings_keep_what_was_converted(stopped: Stopped) -> None:
    check_start(stopped.before, stopped.run)
    _open_run(stopped.before, stopped.run)
    assert stopped.run.initial.is_dir()
    assert stopped.run.mixture_lock.is_file()


@pytest.mark.parametrize("trained", ["metrics", "checkpoint", "export"])
def test_what_has_trained_keeps_its_settings(trained: str, stopped: Stopped) -> None:
    run = stopped.run
    if trained == "metrics":
        run.metrics.write_text('{"kind": "train", "step": 1}\n')
    elif trained == "checkpoint":
        (run.checkpoints / "step-00000002").mkdir(parents=True)
    else:
        (run.export / "training").mkdir(parents=True)
        (run.export / "training" / "recorded.json").touch()
    with pytest.raises(RunError, match=r"was begun with model.source=\S*mistral"):
        check_start(stopped.other, run)
    assert run.mixture_lock.is_file()
