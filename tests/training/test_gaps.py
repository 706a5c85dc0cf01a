"""Steps that are in the weights and no longer in metrics.jsonl."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.recipe.compose import compose_recipe
from sparsify.runs.run_folder import RunFolder
from sparsify.training.telemetry import RunTelemetry, missing_steps


@given(st.integers(0, 30), st.sets(st.integers(1, 40)), st.sets(st.integers(1, 40)))
def test_every_step_is_told_or_missing(last_step: int, trained: set[int], bad: set[int]) -> None:
    records = [{"kind": "train", "step": step} for step in trained] + [
        {"kind": "bad_step", "step": step} for step in bad
    ]
    records += [{"kind": "validation", "step": step} for step in range(last_step + 1)]
    missing = missing_steps(records, last_step)
    found = {step for first, last in missing for step in range(first, last + 1)}
    assert found == set(range(1, last_step + 1)) - trained - bad
    gaps = [{"kind": "gap", "step": last_step, "first_step": first, "last_step": last} for first, last in missing]
    assert missing_steps([*records, *gaps], last_step) == []


def test_a_cut_off_file_is_named_once_when_the_run_resumes(
    recipe_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, recipe = RunFolder(tmp_path), compose_recipe(str(recipe_file), [])
    lines = [json.dumps({"kind": "train", "step": step, "tokens": step * 512}) for step in (1, 2, 3)]
    run.metrics.write_text("\n".join([*lines[:2], lines[2][:10]]))
    with caplog.at_level(logging.WARNING):
        RunTelemetry(recipe, run, 4).close()
        RunTelemetry(recipe, run, 4).close()
    (warning,) = caplog.messages
    assert warning == f"{run.metrics} has no lines of steps 3 to 4, which are in the weights."
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 4]
    assert records[2] == {"kind": "gap", "step": 4, "tokens": 2048, "first_step": 3, "last_step": 4}
