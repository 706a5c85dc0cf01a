"""A run goes on with the data it began with, or at its user's word, which is on record."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import SPARSIFY, Setup


@pytest.mark.slow
def test_changed_text_is_refused_by_name_and_accepted_on_record(
    mixture_file: Path, recipe_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixture"
    shutil.copytree(mixture_file.parent, folder)
    mixture = yaml.safe_load(mixture_file.read_text())
    for source in mixture["sources"].values():
        source["files"] = [str(folder / Path(source["files"][0]).name)]
    (folder / "own.yaml").write_text(yaml.safe_dump(mixture))
    run = tmp_path / "run"
    overrides = [f"mixture={folder / 'own.yaml'}", f"run_dir={run}", f"cache_dir={tmp_path / 'c'}"]

    def train(*more: str) -> subprocess.CompletedProcess[str]:
        command = [*SPARSIFY, "train", str(recipe_file), *overrides, *more]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    first = train()
    assert first.returncode == 0, first.stdout + first.stderr
    lock = json.loads((run / "mixture.lock.json").read_text())
    delivered = {name: source["delivered_tokens"] for name, source in lock["sources"].items()}
    assert delivered == {"code": 1536, "prose": 768, "questions": 768}
    assert lock["accepted_changes"] == []

    shutil.rmtree(run / "checkpoints")  # go back to the beginning
    with (folder / "code.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": "one more document"}))
    refused = train()
    assert refused.returncode == 2, refused.stdout + refused.stderr
    old = lock["sources"]["code"]["fingerprint"]
    assert f"source code: fingerprint was {old}, is " in refused.stderr
    assert "source prose" not in refused.stderr
    assert "launch.accept_changed_data=true" in refused.stderr
    assert json.loads((run / "mixture.lock.json").read_text()) == lock

    accepted = train("launch.accept_changed_data=true")
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    assert (run / "checkpoints" / "latest").read_text() == "step-00000006\n"
    changes = json.loads((run / "mixture.lock.json").read_text())["accepted_changes"]
    assert changes[0].startswith(f"source code: fingerprint was {old}, is ")


def test_every_step_records_its_sources(finished: Callable[[Setup], tuple[Path, dict]]) -> None:
    run, _ = finished(Setup("mistral", 1, 1, "fp32"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    labels: dict[str, int] = {}
    for line in steps:
        labels = line["source_labels"]
        total = sum(labels[name] * loss for name, loss in line["sources"].items())
        assert line["loss"] == pytest.approx(total / sum(labels.values()))
    drawn = {name: sum(line["source_labels"][name] > 0 for line in steps) for name in labels}
    assert drawn == dict.fromkeys(("code", "prose", "questions"), len(steps))
    validations = [line for line in lines if line["kind"] == "validation"]
    assert all(set(line["source_zeros"]) == set(line["sources"]) for line in validations)
