"""`train` overwrites and removes only what it wrote, and a finished run with a damaged result is not passed as finished."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify.commands.run import refuse_foreign_run
from sparsify.commands.train import _kept_report, _kept_samples, train
from sparsify.errors import RunError, StorageError
from sparsify.export.weight_shards import write_sums
from sparsify.runs.run_folder import RunFolder

FOREIGN = ("initial/model.safetensors", "export/config.json", "teacher/x", "checkpoints/step-5000/w.bin", "recipe.yaml")


def files_of(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


@pytest.mark.parametrize("name", [*FOREIGN, "report/report.html", "baseline/initial/model.safetensors"])
def test_a_folder_of_somebody_else_is_refused_and_stays_as_it_is(name: str, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text("mine")
    (run / "environment.json").write_text('{"python": "3.12"}')
    before = files_of(run)
    with pytest.raises(RunError, match=r"that says that `sparsify train` wrote it(.|\n)*Choose another folder"):
        train(str(recipe_file), [f"run_dir={run}", f"cache_dir={tmp_path / 'cache'}"])
    assert files_of(run) == before


@pytest.mark.parametrize("name", ["initial", "teacher", "report", "export"])
def test_somebody_elses_folder_within_a_run_stays(name: str, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"packages": {}}))
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_text("mine")
    with pytest.raises(StorageError, match=f"{tmp_path / name} exists and is not a"):
        train(str(recipe_file), [f"run_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}"])
    assert (tmp_path / name / "model.safetensors").read_text() == "mine"


def test_a_run_with_one_damaged_record_is_still_ours(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{")
    (tmp_path / "mixture.lock.json").write_text('{"tokenizer_fingerprint": "x"}')
    (tmp_path / "recipe.yaml").write_text("")
    refuse_foreign_run(RunFolder(tmp_path))


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda run: flip(run / "export/model.safetensors"), "changed model.safetensors"),
    "a missing file": (lambda run: (run / "export/config.json").unlink(), "missing config.json"),
    "damaged sums": (lambda run: (run / "export/SHA256SUMS").write_bytes(b"\xff\xfe"), "there is no SHA256SUMS"),
    "damaged samples": (lambda run: (run / "samples.json").write_text('{"samples": 1}'), "samples.json is not as"),
    "half the samples": (lambda run: (run / "samples.json").write_text("{"), "samples.json cannot be"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_export_is_named_and_not_kept(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(tmp_path)
    run.export.mkdir()
    for name in ("model.safetensors", "config.json"):
        (run.export / name).write_text(name)
    write_sums(run.export)
    samples = {"checked": "its logits equal the trained model's", "samples": ["a"]}
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    assert _kept_samples(run, tmp_path / "samples.json") == samples
    assert caplog.messages == []
    harm, said = DAMAGES[what]
    harm(tmp_path)
    assert _kept_samples(run, tmp_path / "samples.json") is None
    (message,) = caplog.messages
    assert said in message
    assert "written again" in message


def test_a_damaged_report_is_named_and_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(tmp_path)
    assert _kept_report(run) is None
    run.report.mkdir()
    (run.report / "report.json").write_text("{")
    assert _kept_report(run) is None
    (message,) = caplog.messages
    assert "The report is written again." in message
