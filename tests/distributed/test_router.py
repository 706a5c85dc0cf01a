"""Mixtral under ZeRO-3: ranks whose tokens go to disjoint experts do not hang; load is counted; underused experts are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify.errors import RecipeError
from sparsify.methods.router import check_router, underused_steps
from sparsify.models import SparseMistralConfig
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.training import StabilitySection
from sparsify.runs.run_folder import RunFolder
from tests.conftest import STEPS, Setup
from tests.ranks import prepare_run, records, run_ranks

pytestmark = pytest.mark.xdist_group("router")

PROGRAM = Path(__file__).with_name("router_program.py")
CASES = [("disjoint", "grouped_mm"), ("disjoint", "eager"), ("underused", "grouped_mm")]
EVEN = 1 / 4


def change(recipe: Recipe) -> None:
    recipe.training.router_aux_loss_coefficient = 0.5
    recipe.eval.every_tokens = recipe.checkpoint.every_tokens = STEPS * recipe.step_tokens
    recipe.stability.underused_expert_steps = 3


@pytest.fixture(scope="module")
def found(
    finished: Callable[[Setup], tuple[Path, dict]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Answers of both ranks and the lines of metrics.jsonl, by case."""
    whole, _ = finished(Setup("mixtral", 3, 2, "bf16"))
    root = tmp_path_factory.mktemp("router")
    arguments = []
    for case in CASES:
        run = prepare_run(whole, root / "-".join(case), change)
        arguments += [str(run.path), *case]
    answers = run_ranks(PROGRAM, arguments)
    return {case: (answer, records(root / "-".join(case))) for case, answer in zip(CASES, answers, strict=True)}


@pytest.mark.parametrize("case", CASES[:2])
def test_ranks_with_disjoint_experts_train_together(case: tuple[str, str], found: Any) -> None:
    ranks, lines = found[case]
    assert [rank["experts"] for rank in ranks] == [[0, 1], [2, 3]]
    assert [rank["steps"] for rank in ranks] == [STEPS, STEPS]
    steps = [line for line in lines if line["kind"] == "train"]
    for line in steps:
        router = line["router"]
        assert router["load"] == [[EVEN] * 4] * 2  # both ranks have as many tokens
        assert all(0 < entropy < 0.7 for entropy in router["entropy"])  # two experts: at most log 2
        assert router["aux_loss"] > 3  # each rank leaves half of its experts alone; 2 would be even
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert not [line for line in lines if line["kind"] == "underused_expert"]


def test_an_expert_that_starves_is_named_once(found: Any) -> None:
    _, lines = found["underused", "grouped_mm"]
    alarms = [line for line in lines if line["kind"] == "underused_expert"]
    assert [(a["step"], a["layer"], a["expert"], a["load"]) for a in alarms] == [
        (3, layer, expert, 0.0) for layer in (0, 1) for expert in (2, 3)
    ]


def test_every_mixtral_run_tells_where_its_tokens_went(
    finished: Callable[[Setup], tuple[Path, dict]],
) -> None:
    run, _ = finished(Setup("mixtral", 3, 2, "bf16"))
    config = json.loads((RunFolder(run).initial / "config.json").read_text())
    experts, of_each_token = config["num_local_experts"], config["num_experts_per_tok"]
    loads = [line["router"]["load"] for line in records(run) if line["kind"] == "train"]
    assert len(loads) == RunFolder(run).load_recipe().num_steps
    for layers in loads:
        assert [len(layer) for layer in layers] == [experts] * config["num_hidden_layers"]
        # A token goes to different experts, so that none can take more than its share of every token.
        assert all(0 <= share <= 1 / of_each_token + 1e-4 for layer in layers for share in layer)


def test_an_expert_may_starve_again_after_it_was_fed() -> None:
    settings, counts, told = StabilitySection(underused_expert_steps=2), [], []
    for step, share in enumerate([0.01, 0.01, 0.01, 0.3, 0.01, 0.01]):
        counts, alarms = underused_steps(settings, counts, [[share, 1 - share]])
        told += [(step, *alarm) for alarm in alarms]
    assert told == [(1, 0, 0), (5, 0, 0)]


def test_a_coefficient_without_a_router_is_refused(recipe_file: Path) -> None:
    recipe = compose_recipe(str(recipe_file), ["training.router_aux_loss_coefficient=0.1"])
    with pytest.raises(RecipeError, match="sparse_mistral has no router"):
        check_router(recipe, SparseMistralConfig())
