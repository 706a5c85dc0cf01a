"""`sparsify mixture tune`, from the command line to the mixture that it writes."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from sparsify.errors import RecipeError
from sparsify.recipe.compose import load_mixture
from sparsify.tuning.record import TuneRecord
from sparsify.tuning.tune import FIRST_WORDS, TuneRequest, check_target, tune, write_mixture
from tests.conftest import SPARSIFY

INSTRUCTION_SHARE = "mixture.instruction_token_share=0:0.6"
START_SECONDS = 240


def test_the_written_mixture_loads_and_keeps_the_other_settings(
    mixture_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a relative path, which is relative to where commands are run, wherever the YAML file lies."""
    monkeypatch.chdir(mixture_file.parent)
    before = load_mixture(str(mixture_file))
    before.sources["code"].files = ["code.jsonl"]
    before.instruction_token_share = 0.9
    shares = {"code": 0.3334, "prose": 0.0, "questions": 0.6666}
    to = tmp_path / "deep" / "tuned.yaml"
    write_mixture(before, shares, to, "command\nverdict: 'x'", "own_tuned")
    assert to.read_text().startswith(f"{FIRST_WORDS}: command\n# verdict: 'x'\n")
    after = load_mixture(str(to))
    assert {name: one.token_share for name, one in after.sources.items()} == shares
    assert after.instruction_token_share is None
    assert after.sources["questions"].group == "instruction"
    assert after.sources["code"].files == ["code.jsonl"]
    assert (after.name, after.validation_fraction) == ("own_tuned", before.validation_fraction)


def test_only_its_own_files_are_overwritten(tmp_path: Path) -> None:
    check_target(tmp_path / "new.yaml")
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    (tmp_path / "tuned.yaml").write_text(f"{FIRST_WORDS}: …\n")
    check_target(tmp_path / "tuned.yaml")
    for name, message in (("mine.yaml", "was not written by this command"), ("new.txt", ".yaml")):
        with pytest.raises(RecipeError, match=message):
            check_target(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_trials": 3}, "At least 4"),
        ({"num_trials": 4, "over": ["token_shares"]}, "At least 5"),
        ({"trial_tokens": 100}, "less than one step of 512"),
        ({"confirm": True, "confirm_tokens": 100}, "less than one step of 512"),
        ({"to": Path("tuned.txt")}, ".yaml"),
        ({"weights": ["cod=2"]}, "Did you mean 'code'"),
    ],
)
def test_mistakes_are_refused_before_any_trial(
    change: dict, message: str, recipe_file: Path, mixture_file: Path, tmp_path: Path
) -> None:
    overrides = [f"mixture={mixture_file}", f"run_dir={tmp_path / 'run'}"]
    asked = {
        "over": [INSTRUCTION_SHARE],
        "weights": [],
        "num_trials": 4,
        "trial_tokens": 1024,
    } | change
    with pytest.raises(RecipeError) as error:
        tune(TuneRequest(str(recipe_file), overrides, **asked))
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def arguments(recipe_file: Path, mixture_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("tune")
    return [
        *(*SPARSIFY, "mixture", "tune", str(recipe_file)),
        *(f"mixture={mixture_file}", f"run_dir={root / 'run'}", f"cache_dir={root / 'cache'}"),
        *("--over", INSTRUCTION_SHARE, "--trial-tokens", "1024", "--force", "--json"),
    ]


def folder_of(arguments: list[str]) -> Path:
    run_dir = next(one for one in arguments if one.startswith("run_dir="))
    return Path(run_dir.removeprefix("run_dir=") + "-tune")


def printed(result: subprocess.CompletedProcess[str]) -> TuneRecord:
    assert result.returncode == 0, result.stdout + result.stderr
    return TuneRecord.model_validate_json(result.stdout[result.stdout.index("\n{") :])


@pytest.mark.slow
def test_it_resumes_after_an_interruption_and_adds_trials(
    arguments: list[str],
) -> None:
    folder = folder_of(arguments)
    command = [*arguments, "--trials", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + START_SECONDS
    while not (folder / "trial-01" / "initial").is_dir() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=START_SECONDS)
    assert process.returncode == 130
    first = folder / "trial-00" / "trial.json"
    finished = first.stat().st_mtime_ns

    record = printed(subprocess.run(command, capture_output=True, text=True, check=False))
    assert first.stat().st_mtime_ns == finished, "a finished trial is not run again"
    assert record.trials[0].shares["questions"] == 0.25
    assert len({trial.shares["questions"] for trial in record.trials}) > 2
    assert all(trial.losses.keys() == {"code", "prose", "questions"} for trial in record.trials)
    assert not (folder / "trial-01" / "checkpoints").exists()
    for name in (
        "tune.json",
        "index.html",
        "loss_against_share.png",
        "observed_against_predicted.png",
    ):
        assert (folder / name).stat().st_size > 1000, name
    page = (folder / "index.html").read_text()
    assert 'src="http' not in page

    mixture = load_mixture(str(record.mixture_file))
    content = yaml.safe_load(Path(str(record.mixture_file)).read_text())
    assert sum(one["token_share"] for one in content["sources"].values()) == pytest.approx(1)
    assert mixture.sources["questions"].token_share <= 0.6

    more = [*arguments, "--trials", "5", "--confirm"]
    record = printed(subprocess.run(more, capture_output=True, text=True, check=False))
    assert len(record.trials) == 5
    assert first.stat().st_mtime_ns == finished
    found = record.confirmation
    assert found is not None
    assert found.default_losses.keys() == found.tuned_losses.keys()
    assert found.seed == 2
    assert json.loads((folder / "tune.json").read_text())["confirmation"]["seed"] == 2


@pytest.mark.slow
def test_other_settings_in_the_same_folder_are_refused(arguments: list[str]) -> None:
    command = [one if one != "1024" else "1536" for one in arguments]
    result = subprocess.run([*command, "--trials", "4"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "training.budget_tokens=1024" in result.stderr
    assert "run_dir=" in result.stderr
