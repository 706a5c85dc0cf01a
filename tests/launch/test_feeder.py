"""Tokenising ahead of training, in processes of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsify.conversion.convert import convert
from sparsify.errors import MixtureError
from sparsify.launch.feeder import Feeder, can_start
from sparsify.recipe.compose import compose_recipe, save_recipe
from sparsify.runs.data import ingests_of
from sparsify.runs.run_folder import RunFolder


def test_what_is_wrong_with_a_source_is_the_same_error_here(tmp_path: Path) -> None:
    rows, mixture, run = tmp_path / "rows.jsonl", tmp_path / "own.yaml", RunFolder(tmp_path / "run")
    rows.write_text('{"text": "some words"}\n{"broken\n' * 50)
    source = f"{{files: [{rows}], token_share: 1.0}}"
    mixture.write_text(f"name: own\nsources: {{rows: {source}}}\n")
    overrides = [f"run_dir={run.path}", f"cache_dir={tmp_path / 'cache'}", f"mixture={mixture}"]
    recipe = compose_recipe("quickstart_base", overrides)
    save_recipe(recipe, run.recipe)
    convert(recipe.model, recipe.activation, run.initial, seed=1, dtype=torch.float32)
    feeder = Feeder(run, ingests_of(recipe, run), 1, lambda *_: None)
    with pytest.raises(MixtureError) as raised, feeder:
        feeder.wait_until(can_start)
    error = raised.value
    assert error.given.startswith("Source 'rows': 50 of its first 100 rows are bad")
    assert error.allowed == "Allowed: mixture.max_bad_fraction=0.01 of the rows."
    assert error.next_step.startswith("Fix these rows")
