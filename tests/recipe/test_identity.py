"""The name of a run's folder, whether a resume is the same run, and what the documentation says about both."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.errors import RecipeError
from sparsify.recipe.compose import compose_recipe, sweep
from sparsify.recipe.fields import settings_of
from sparsify.recipe.identity import (
    DECIDING_SECTIONS,
    FREE_SETTINGS,
    MAX_NAME_CHARACTERS,
    decides,
    first_difference,
    run_name,
)
from sparsify.recipe.recipe import Recipe

DOCS = Path(__file__).parents[2] / "docs"
KEYS = [
    *(key for key in settings_of(Recipe) if decides(key)),
    "mixture.sources.code.token_share",
    "mixture.sources.prose.token_share",
    "mixture.phases.0.until_budget_share",
    "penalty.stages.0.until_budget_share",
    "+model.architecture.hidden_size",
    "activation",
    "mixture",
    "model",
]
VALUES = st.text("ab1.,=_-/:{}[] \"'", max_size=90)


def test_the_documentation_lists_what_decides() -> None:
    rows = [line for line in (DOCS / "resuming.md").read_text().splitlines() if line[:3] == "| `"]
    assert tuple(re.findall("`([^`]+)`", rows[0])) == DECIDING_SECTIONS
    assert tuple(re.findall("`([^`]+)`", rows[1])) == FREE_SETTINGS


def test_every_deciding_setting_is_one() -> None:
    known = {*settings_of(Recipe)}
    assert known.issuperset(FREE_SETTINGS)
    assert {key.partition(".")[0] for key in known}.issuperset(DECIDING_SECTIONS)


@given(st.sampled_from(KEYS), st.sampled_from(KEYS), VALUES, VALUES)
def test_different_overrides_have_different_names(a: str, b: str, left: str, right: str) -> None:
    def bare(value: str) -> str:
        return value.strip().strip("'\"")

    names = run_name([f"{a}={left}"]), run_name([f"{b}={right}"])
    assert (names[0] == names[1]) == ((a, bare(left)) == (b, bare(right)))
    assert all(name.count(",") == 0 and len(name) <= MAX_NAME_CHARACTERS for name in names)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["training.seed=2", "activation=reglu"], "seed=2,activation=reglu"),
        (["conversion.target_zeros=0.9"], "conversion.target_zeros=0.9"),
        (["penalty.target_zeros=0.9"], "penalty.target_zeros=0.9"),
        (["+mixture.phases.0.instruction_token_share=1"], "phases.0.instruction_token_share=1"),
        (["baseline.ffn_activation=null", "engine=zero2", "training.compile=true"], ""),
        (["launch.processes=2", "eval=quick", "name=x", "stability.on_bad_step=stop"], ""),
    ],
)
def test_what_overrides_add_to_the_name(overrides: list[str], name: str) -> None:
    assert run_name(overrides) == name


def test_a_value_never_reads_as_another_setting() -> None:
    assert run_name(["mixture.phases=[{a:1},seed=2]"]).count(",") == 0


def test_the_folder_of_a_run_is_given_without_quotes() -> None:
    made = compose_recipe("quickstart", ["activation=reglu", "training.seed=2"]).run_dir
    assert made == "runs/quickstart,activation=reglu,seed=2"
    again = compose_recipe("quickstart", ["activation=reglu", f"run_dir={made}"])
    assert again.run_dir == made
    assert sweep([f"run_dir={made}"]) == [[f"run_dir='{made}'"]]


def test_a_sweep_in_a_given_folder() -> None:
    runs = sweep(["run_dir=out", "launch.processes=1,2", "training.seed=1,2"])
    folders = {compose_recipe("quickstart", overrides).run_dir for overrides in runs}
    assert folders == {f"out/processes={p},seed={s}" for p in (1, 2) for s in (1, 2)}


def test_a_sweep_whose_runs_would_share_a_folder_is_refused() -> None:
    with pytest.raises(RecipeError, match="does not change what is trained") as caught:
        sweep(["launch.processes=1,2"])
    assert "run_dir=" in str(caught.value)


def test_a_resume_is_the_same_run_until_something_that_decides_differs() -> None:
    recipe = compose_recipe("quickstart")
    other = deepcopy(recipe)
    other.training.micro_batch_size, other.mixture.description = 1, "another"
    other.launch.processes, other.baseline.ffn_activation = 2, None
    assert first_difference(recipe, other) is None
    other.mixture.sources["code"].token_share = 0.1
    key, before, now = first_difference(recipe, other) or ("", 0, 0)
    assert key == "mixture.sources.code.token_share"
    assert (before, now) == (recipe.mixture.sources["code"].token_share, 0.1)
