"""A run that is given a longer budget continues from its weights, on the next tokens of its stream."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sparsify.commands.run import check_resumable
from sparsify.errors import RunError
from sparsify.mixture.sequences.reader import SequenceReader, read_sequence
from sparsify.mixture.sequences.schedule import SourceSchedule
from sparsify.recipe.compose import compose_recipe
from sparsify.runs.data import ingests_of, open_sources, shares_of
from sparsify.runs.run_folder import RunFolder
from tests.conftest import STEPS, Command, Setup
from tests.ranks import records

SETUP = Setup("mistral", 1, 1, "fp32")


def ids_of(run: Path, count: int) -> list[list[int]]:
    """The first sequences of a run's stream."""
    recipe, folder = RunFolder(run).load_recipe(), RunFolder(run)
    sources = open_sources(ingests_of(recipe, folder))
    schedule = SourceSchedule(shares_of(recipe, sources))
    reader = SequenceReader(sources, schedule, recipe.training.sequence_length, recipe.training.seed)
    found = []
    for index in range(count):
        name, rank = schedule.locate(index)
        found.append(read_sequence(reader.streams[name], rank)[0].input_ids.tolist())
    return found


@pytest.mark.slow
def test_a_finished_run_is_extended(
    command: Command, finished: Callable[[Setup], tuple[Path, dict]], tmp_path: Path
) -> None:
    straight, _ = finished(SETUP)
    run = tmp_path / "run"
    shutil.copytree(straight, run, ignore=shutil.ignore_patterns("wandb"))
    before, old = ids_of(run, STEPS * 8), records(run)
    longer = [*command(SETUP, run), f"training.budget_tokens={(STEPS + 4) * 512}"]
    result = subprocess.run(longer, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Extended at step {STEPS} from 4,096 to 6,144 tokens" in result.stdout
    after = ids_of(run, (STEPS + 4) * 8)
    assert after[: STEPS * 8] == before
    assert not {tuple(ids) for ids in after[STEPS * 8 :]} & {tuple(ids) for ids in before}
    lines = [record for record in records(run) if record["kind"] == "train"]
    assert lines[:STEPS] == [record for record in old if record["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 5))
    assert lines[STEPS]["loss"] < lines[0]["loss"]
    assert lines[STEPS]["learning_rate"] > lines[STEPS - 1]["learning_rate"]
    lock = json.loads((run / "mixture.lock.json").read_text())
    assert lock["extensions"] == [{"step": STEPS, "from_budget_tokens": 4096, "to_budget_tokens": 6144}]
    again = subprocess.run(longer, capture_output=True, text=True, check=False)
    assert "Trained already" in again.stdout, again.stderr


def test_what_a_budget_may_become() -> None:
    before = compose_recipe("quickstart", [])
    run = RunFolder(Path("/nowhere"))
    longer, shorter = (
        compose_recipe("quickstart", [f"training.budget_tokens={tokens}", "run_dir=x"]) for tokens in (409_600, 51_200)
    )
    check_resumable(before, longer, run)
    with pytest.raises(RunError, match="A run can be extended, not shortened: 102400 or more"):
        check_resumable(before, shorter, run)
    longer.training.seed = 2
    with pytest.raises(RunError, match=r"training\.seed=1; this command says 2"):
        check_resumable(before, longer, run)
    longer.training.seed = 1
    blended = replace(before.blending, budget_share=0.5)
    before.blending = longer.blending = blended
    with pytest.raises(RunError, match=r"blending\.budget_share is laid out over the budget"):
        check_resumable(before, longer, run)
