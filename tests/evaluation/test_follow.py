"""Every checkpoint of a run is evaluated exactly once."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify.commands.evaluate import evaluate_model, follow
from sparsify.errors import EvaluationError
from sparsify.evaluation.request import EvalRequest
from sparsify.evaluation.results import read_results
from tests.conftest import Setup


def nothing(_task: str) -> Callable[[int, int], None]:
    return lambda _done, _all: None


@pytest.mark.slow
def test_every_checkpoint_of_a_run_is_evaluated_once(
    finished: Callable[[Setup], tuple[Path, dict]], tmp_path: Path
) -> None:
    trained, _ = finished(Setup("mistral", 1, 1, "fp32"))
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    suite = tmp_path / "own.yaml"
    suite.write_text("name: own\ntasks: {python_functions: {limit: 4}}\nheld_out_sequences_per_source: 1\n")
    saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert len(saved) > 1
    # The last one appears only while the others are measured, as in a run that still trains.
    last = run / "checkpoints" / saved[-1]
    last.rename(tmp_path / last.name)

    def save_the_last() -> None:
        while not (run / "evaluations.jsonl").is_file():
            time.sleep(0.05)
        (tmp_path / last.name).rename(last)

    training = threading.Thread(target=save_the_last)
    training.start()
    found = follow(str(run), EvalRequest(str(suite)), "", nothing, poll_seconds=0.1)
    training.join()

    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [line["checkpoint"] for line in lines] == saved
    assert [line["tokens"] for line in lines] == sorted({line["tokens"] for line in lines})
    assert len({results.model_hash for results in found}) == len(saved)
    assert all((run / line["folder"] / "results.json").is_file() for line in lines)
    assert "held-out/code" in lines[0]["tasks"]
    assert follow(str(run), EvalRequest(str(suite)), "", nothing) == []

    # Each result holds the provenance and the overlap with the run's instructions.
    results = read_results(run / lines[-1]["folder"])
    assert results.provenance is not None
    assert results.provenance.instruction_sources == ["questions"]
    (task,) = [one for one in results.tasks if one.name == "python_functions"]
    (overlap,) = task.overlaps
    assert (overlap.source, overlap.items, overlap.items_found) == ("questions", 4, 0)

    # An exported bundle is the same model with the same provenance.
    bundle, _ = evaluate_model(str(run / "export"), EvalRequest(str(suite), to=tmp_path / "out"), "", nothing)
    assert bundle.model_hash == results.model_hash
    assert bundle.provenance is not None
    assert bundle.provenance.identity == results.provenance.identity
    assert bundle.provenance.tokens == results.provenance.tokens


def test_only_a_run_can_be_followed(stock: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="not a run folder"):
        follow(str(stock["mistral"]), EvalRequest("quick"), "", nothing)
