"""A stranger's bundle or run folder is read, verified and exported without running what is in it, or publishing what is not."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparsify.cli.main import app
from sparsify.conversion.manifest import record_folder
from sparsify.errors import ExportError, RunError
from sparsify.export.bundle import export
from sparsify.export.check import foreign_code, verify
from sparsify.export.weight_shards import write_sums
from sparsify.runs.load import find_trained
from sparsify.runs.state import consolidated_weights
from sparsify.trust import TRUST
from tests.conftest import Command, Setup
from tests.test_security import Payload

pytestmark = pytest.mark.xdist_group("runs")
Finished = Callable[[Setup], tuple[Path, dict]]
SETUP = Setup("mistral", 2, 2, "bf16")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What a planted payload creates when it runs."""
    return tmp_path / "ran"


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> Path:
    return shutil.copytree(finished(SETUP)[0], tmp_path / "run")


@pytest.fixture
def bundle(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(TRUST, "")
    return shutil.copytree(finished(SETUP)[0] / "export", tmp_path / "bundle")


def plant(bundle: Path, mark: Path) -> None:
    """Code in a modeling file: it says which tokens it sees, and ends the process."""
    path = bundle / "sparse_mistral.py"
    seen = "os.environ.get('HF_TOKEN', '') + os.environ.get('WANDB_API_KEY', '') + os.environ.get('AWS_SECRET', '')"
    code = f"import os\nopen({str(mark)!r}, 'w').write({seen})\nos._exit(3)\n"
    path.write_text(path.read_text() + code)


@pytest.mark.parametrize("sums", ["old", "written again"])
def test_verify_does_not_run_changed_code(sums: str, bundle: Path, mark: Path) -> None:
    plant(bundle, mark)
    if sums == "written again":
        write_sums(bundle)
    found = {check.name: check for check in verify(bundle)}
    assert found["hashes"].holds == (sums == "written again")
    assert "sparse_mistral.py" in found["code"].found
    assert found["logits"].found == "not computed, since that would run this code"
    assert not mark.exists()
    result = CliRunner().invoke(app, ["export", "verify", str(bundle)])
    assert isinstance(result.exception, ExportError)
    assert "--trust-code" in str(result.exception)
    assert not mark.exists()


def test_with_the_users_word_it_runs_without_tokens(bundle: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(bundle, mark)
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET"):
        monkeypatch.setenv(name, "planted_secret")
    result = CliRunner().invoke(app, ["export", "verify", str(bundle), "--trust-code"])
    assert "run because of --trust-code" in result.output
    assert mark.read_text() == ""


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


PLANTS: dict[str, Callable[[Path], object]] = {
    "auto_map in config.json": lambda bundle: _edit(bundle / "config.json", auto_map={"AutoConfig": "else--where.C"}),
    "auto_map in tokenizer_config.json": lambda bundle: _edit(
        bundle / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.T"]}
    ),
    "attn_implementation in config.json": lambda bundle: _edit(bundle / "config.json", attn_implementation="a/kernel"),
    "custom_generate": lambda bundle: (bundle / "custom_generate").mkdir(),
    "adapter_config.json": lambda bundle: (bundle / "adapter_config.json").write_text("{}"),
    "evil.py": lambda bundle: (bundle / "evil.py").write_text(""),
    "predictors/evil.py": lambda bundle: _write(bundle / "predictors" / "evil.py"),
    "pytorch_model.bin": lambda bundle: (bundle / "pytorch_model.bin").write_bytes(b""),
    "masking.py": lambda bundle: (bundle / "masking.py").write_bytes((bundle / "masking.py").read_bytes() + b"\n"),
    "activations.py": lambda bundle: _link(bundle / "activations.py"),
}


def _write(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("")


def _link(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


@pytest.mark.parametrize("what", PLANTS)
def test_whatever_transformers_could_run_is_found(what: str, bundle: Path) -> None:
    assert foreign_code(bundle) == []
    PLANTS[what](bundle)
    assert foreign_code(bundle) == [what]


def test_the_shorter_auto_map_of_an_older_bundle_is_known(bundle: Path) -> None:
    places = json.loads((bundle / "config.json").read_text())["auto_map"]
    assert places.pop("AutoModel") == "sparse_mistral.SparseMistralModel"
    _edit(bundle / "config.json", auto_map=places)
    assert foreign_code(bundle) == []


def plant_pickle(run: Path, mark: Path, zero_stage: int = 1) -> Path:
    """Puts code into the newest checkpoint's shards, with a manifest that says that they are as they were written."""
    trained = find_trained(run)
    assert trained is not None
    checkpoint = trained.checkpoint
    _edit(checkpoint / "state.json", zero_stage=zero_stage)
    for shard in checkpoint.glob("*model_states.pt"):
        content = torch.load(shard, weights_only=True)
        shard.unlink()
        name = f"zero_pp_rank_0_{shard.name}" if zero_stage == 3 else shard.name
        torch.save(content | {"planted": Payload(mark)}, checkpoint / name)
    record_folder(checkpoint)
    return checkpoint


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_reading_weights_of_a_run_runs_nothing(zero_stage: int, run: Path, mark: Path) -> None:
    checkpoint = plant_pickle(run, mark, zero_stage)
    with pytest.raises(RunError, match="could run code") as refused:
        consolidated_weights(checkpoint)
    assert "mkdir" in str(refused.value)
    assert not mark.exists()


VERBS = {
    "report": ["report", "RUN", "--on", "TEXT"],
    "generate": ["generate", "RUN", "Once"],
    "evaluate": ["evaluate", "RUN", "--suite", "quick", "--limit", "1"],
    "predictors": ["predictors", "train", "RUN", "--on", "TEXT"],
    "export": ["export", "write", "RUN", "--to", "OUT"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_that_reads_a_run_runs_its_pickles(
    verb: str, run: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plant_pickle(run, mark)
    (tmp_path / "text.txt").write_text("some words " * 2000)
    given = {"RUN": str(run), "TEXT": str(tmp_path / "text.txt"), "OUT": str(tmp_path / "out")}
    result = CliRunner().invoke(app, [given.get(word, word) for word in VERBS[verb]])
    assert isinstance(result.exception, RunError), result.output
    assert "could run code" in str(result.exception)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
def test_resuming_a_run_runs_no_pickles(processes: int, run: Path, mark: Path, command: Command) -> None:
    """With one process instead of two, the shards are converted first."""
    trained = find_trained(run)
    assert trained is not None
    _edit(trained.checkpoint / "state.json", step=6, seen_tokens=6 * 512)  # so that there is something left to train
    plant_pickle(run, mark)
    arguments = [word for word in command(SETUP._replace(processes=processes), run) if "count_zeros" not in word]
    result = subprocess.run(
        [*arguments, "training.count_zeros=true", "tracking.wandb=disabled"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stdout + result.stderr
    assert "could run code" in result.stderr
    assert "Traceback" not in result.stderr
    assert not mark.exists()


LINKS = (
    "metrics.jsonl",
    "initial/generation_config.json",
    "report/index.html",
    "report/added",
    "report",
    "mixture.lock.json",
)


@pytest.mark.parametrize("name", LINKS)
def test_export_does_not_follow_links_out_of_the_run(name: str, run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "private"
    path = run / name
    path.rename(outside) if path.exists() else outside.write_text("a key")
    path.symlink_to(outside)
    with pytest.raises(ExportError, match=r"is a link to .*private, which is not in the run's folder"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_inside_a_run_and_checkpoints_on_another_disk_are_exported(run: Path, tmp_path: Path) -> None:
    shutil.move(run / "checkpoints", tmp_path / "scratch")
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    (run / "report" / "same").symlink_to("index.html")
    result = CliRunner().invoke(app, ["export", "write", str(run), "--to", str(tmp_path / "out"), "--unchecked"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "sparsity" / "same").is_file()
    assert not (tmp_path / "out" / "sparsity" / "same").is_symlink()
