"""The paper's tables of a run and its baseline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsify.commands.paper import paper_tables
from sparsify.errors import RecipeError


@pytest.mark.slow
def test_both_arms_stand_beside_the_papers(
    recipe_file: Path, mixture_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    overrides = [
        f"mixture={mixture_file}",
        "baseline.ffn_activation=swiglu",
        f"run_dir={run}",
        f"cache_dir={tmp_path / 'cache'}",
    ]
    rows, tables, to = paper_tables(str(recipe_file), overrides, None, 1024)
    sparse, dense = tables.variants
    assert (sparse.ffn_activation, dense.ffn_activation) == ("drelu", "swiglu")
    assert dense.zeros < 0.01 < 0.5 < sparse.zeros
    assert [point.left_out for point in sparse.curve] == [0.0, 0.5, 0.8, 0.85, 0.9]
    # What is zero already can be left out for nothing.
    whole, half = (point.perplexity.value for point in sparse.curve[:2])
    assert half == pytest.approx(whole, rel=1e-5)
    text = (to / "tables.md").read_text()
    assert "drelu, ours" in text
    assert "112.36" in text
    assert [row[0] for row in rows[0].rows[2:]] == ["drelu, published", "swiglu, published"]
    assert json.loads((to / "tables.json").read_text())["variants"][0]["zeros"] == sparse.zeros


def test_a_recipe_without_a_control_is_refused(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match="trains no baseline"):
        paper_tables(str(recipe_file), [], None, 1024)
