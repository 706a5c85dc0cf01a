"""A tracker is optional: no key is said before the work, no network means offline, and no error of it ends a run."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from sparsify.errors import RecipeError
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.engine import TrackingSection
from sparsify.recipe.recipe import Recipe
from sparsify.runs.run_folder import RunFolder
from sparsify.training import tracker as module
from sparsify.training.tracker import Tracker, check_tracker

ONLINE = TrackingSection(wandb="online")


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return compose_recipe("quickstart", ["tracking.wandb=online", f"run_dir={tmp_path}"])


def test_a_missing_key_is_said_with_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"no API key for api\.wandb\.ai") as refused:
        check_tracker(ONLINE)
    assert "wandb login" in refused.value.next_step
    assert "tracking.wandb=offline" in refused.value.next_step
    check_tracker(TrackingSection(wandb="offline"))
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
    check_tracker(ONLINE)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    with pytest.raises(RecipeError, match=r"no API key for wandb\.example\.org"):
        check_tracker(ONLINE)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracker(ONLINE)


def test_a_key_that_cannot_be_one_is_said_without_printing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "my secret")
    with pytest.raises(RecipeError, match="WANDB_API_KEY has 9 characters") as refused:
        check_tracker(ONLINE)
    assert "my secret" not in str(refused.value)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    check_tracker(ONLINE)


def test_a_login_on_an_own_server_is_found_where_wandb_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "settings").write_text("[default]\nbase_url = http://own.example.org:8080\n")
    (tmp_path / "netrc").write_text(f"machine own.example.org login user password {'k' * 40}\n")
    check_tracker(ONLINE)


def test_an_unreachable_server_means_offline(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the port of discard: nothing listens
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(recipe, RunFolder(tmp_path))
        tracker.numbers({"kind": "train", "step": 1, "loss": 2.0})
        tracker.samples(1, [{"prompt": "a", "continuation": "b"}])
        tracker.heat_map(1, [[0.5, 0.9]])
        tracker.close()
    warnings = [record.getMessage() for record in caplog.records if "wandb" in record.getMessage()]
    assert len(warnings) == 1
    assert "cannot be reached" in warnings[0]
    assert f"offline in {tmp_path / 'wandb'}" in warnings[0]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


class Broken:
    """A run of a tracker that has broken down."""

    def log(self, *_: Any, **__: Any) -> None:
        raise SystemExit("the service died")

    def finish(self) -> None:
        threading.Event().wait()


def test_errors_in_the_middle_are_said_once_and_end_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Tracker(recipe, RunFolder(tmp_path))
    tracker._run = Broken()
    for step in (1, 2):
        tracker.numbers({"kind": "train", "step": step, "loss": 2.0})
    tracker.close()
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "wandb failed (the service died), and the run is tracked no longer. Training continues; metrics.jsonl has everything."
    ]


def test_a_finished_run_does_not_wait_for_the_network_for_ever(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(module, "FINISH_SECONDS", 0.1)
    tracker = Tracker(recipe, RunFolder(tmp_path))
    tracker._run = Broken()
    tracker.close()
    assert "`wandb sync` uploads the rest" in caplog.text
