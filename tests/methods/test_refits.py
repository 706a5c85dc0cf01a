"""Refits at milestones of the blending: what they are, that every ZeRO stage has them, and that an interruption changes no bit."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.errors import RecipeError
from sparsify.methods.refits import refit_sequences, refits_due
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.recipe import Recipe
from tests.conftest import Setup
from tests.ranks import prepare_run, records, replace_model, run_ranks

PROGRAM = Path(__file__).with_name("refit_program.py")
FITS = ["fit-mistral-1-fp32", "fit-mixtral-3-fp32"]
OTHER_FITS = [
    "fit-mistral-0-fp32", "fit-mistral-2-fp32", "fit-mistral-3-fp32", "fit-mixtral-2-fp32",
    "fit-mistral-1-bf16", "fit-mistral-2-bf16", "fit-mistral-3-bf16", "fit-mixtral-3-bf16",
]  # fmt: skip
OFFLOADED = ["fit-mistral-2-fp32-offload", "fit-mistral-3-bf16-offload"]
TRAINED = ["train-mistral-2-bf16", "train-mistral-2-bf16-cut"]
OTHERS_TRAINED = [
    "train-mixtral-3-bf16", "train-mixtral-3-bf16-cut", "train-mistral-1-fp32", "train-mistral-1-fp32-cut",
]  # fmt: skip
REFITS = ["blending.budget_share=0.5", "blending.refit_milestones=4", "blending.refit_tokens=8192"]
Runs = Callable[[list[str]], dict[str, Any]]


@cache
def quickstart() -> Recipe:
    return compose_recipe("recovery/drelu")


@pytest.fixture(scope="module")
def runs(
    finished: Callable[[Setup], tuple[Path, dict]],
    stock: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    """What every case found, and the lines that it logged."""
    whole, _ = finished(Setup("mistral", 1, 1, "fp32"))

    def run(cases: list[str]) -> dict[str, Any]:
        root = tmp_path_factory.mktemp("refits")
        for case in cases:
            prepared = prepare_run(whole, root / case, partial(_change, case=case))
            _, kind, _, precision = case.split("-")[:4]
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            replace_model(prepared, stock[kind], dtype)
        found = run_ranks(PROGRAM, [str(root / case) for case in cases])
        return {
            case: records(root / case) if case.startswith("train") else answers
            for case, answers in zip(cases, found, strict=True)
        }

    return run


def _change(recipe: Recipe, case: str) -> None:
    stage, precision = case.split("-")[2:4]
    recipe.engine.zero_stage, recipe.training.precision = int(stage), precision
    recipe.engine.offload_optimizer_to_cpu = "offload" in case
    recipe.training.budget_tokens = 6 * recipe.step_tokens
    recipe.checkpoint.every_tokens = recipe.eval.every_tokens = 2 * recipe.step_tokens
    recipe.blending.budget_share, recipe.blending.refit_milestones = 0.5, 3
    # No multiple of two ranks' micro-batches, and for an expert of four still enough.
    recipe.blending.refit_tokens = 25 * recipe.training.sequence_length


@pytest.fixture(scope="module")
def found(runs: Runs) -> dict[str, Any]:
    return runs([*FITS, *TRAINED])


def _check_fits(found: dict[str, Any], cases: list[str]) -> None:
    for case in cases:
        assert found[case][0] == found[case][1], case
        answer = found[case][0]
        # Under bf16 the live model routes and feeds the blocks, and nothing is rounded for the disk.
        assert answer["from_reference"] < (0.06 if "bf16" in case else 2e-3), case
        assert answer["live_is_master"], case
        assert answer["stays"], case
        assert answer["error_after"] < 0.9 * answer["error_before"], case
        assert answer["num_flipped"] > 0
        # Some experts of a router that nobody trained get hardly a token.
        assert bool(answer["kept"]) == ("mixtral" in case)
        assert all("calibration tokens were routed to it" in one["because"] for one in answer["kept"])


@pytest.mark.slow
def test_a_refit_in_the_engine_is_that_of_the_calibrated_swap(found: dict[str, Any]) -> None:
    _check_fits(found, FITS)


@pytest.mark.slow
def test_every_other_stage_refits_alike(runs: Runs) -> None:
    _check_fits(runs(OTHER_FITS), OTHER_FITS)


@pytest.mark.slow
def test_an_offloaded_optimizer_s_weights_are_refitted_too(runs: Runs) -> None:
    _check_fits(runs(OFFLOADED), OFFLOADED)


def _check_trained(found: dict[str, Any], whole: str, cut: str) -> None:
    lines = {case: [line for line in found[case] if line["kind"] == "train"] for case in (whole, cut)}
    for key in ("step", "loss", "gradient_norm"):
        assert [line[key] for line in lines[whole]] == [line[key] for line in lines[cut]]
    shares = [line.get("blended_share") for line in lines[whole]]
    assert shares == [pytest.approx(1 / 3), pytest.approx(2 / 3), None, None, None, None]
    for case in (whole, cut):
        refits = [line for line in found[case] if line["kind"] == "refit"]
        assert [(line["step"], line["tokens"]) for line in refits] == [(1, 0), (2, 512), (3, 1024)]
        assert [line["num_flipped"] > 0 for line in refits] == [True, False, False]
        assert all(line["error_after"] < line["error_before"] for line in refits)


@pytest.mark.slow
def test_an_interruption_at_a_milestone_changes_no_bit(found: dict[str, Any]) -> None:
    _check_trained(found, *TRAINED)
    labels = [
        (line["tokens"], line["label"], line.get("blended_share"))
        for line in found[TRAINED[0]]
        if line["kind"] == "validation"
    ]
    # A milestone belongs to the step after it: what is measured before that has the weights and the share from before.
    assert labels[2:4] == [(1024, "blending", pytest.approx(2 / 3)), (2048, "training", None)]


@pytest.mark.slow
def test_an_interruption_changes_no_bit_in_experts_and_other_stages(runs: Runs) -> None:
    found = runs(OTHERS_TRAINED)
    _check_trained(found, *OTHERS_TRAINED[:2])
    _check_trained(found, *OTHERS_TRAINED[2:])


@given(st.floats(0.05, 0.99), st.integers(2, 200))
def test_every_milestone_comes_before_a_step_of_its_own(share: float, milestones: int) -> None:
    recipe = deepcopy(quickstart())
    recipe.training.budget_tokens, recipe.training.global_batch_size = 200 * 2048, 8
    recipe.training.sequence_length, recipe.blending.budget_share = 256, share
    recipe.blending.refit_milestones = min(milestones, max(2, int(share * recipe.num_steps)))
    due = [refits_due(recipe, step * recipe.step_tokens) for step in range(recipe.num_steps)]
    assert due[0] == 1
    assert due[-1] == recipe.blending.refit_milestones
    assert all(0 <= later - now <= 1 for now, later in pairwise(due))


def test_a_refit_rests_on_what_comes_next_and_stays_inside_the_run() -> None:
    recipe = compose_recipe("recovery/drelu", REFITS)
    sequences, last = 8192 // recipe.training.sequence_length, recipe.num_steps
    assert refit_sequences(recipe, 5) == (5 * recipe.training.global_batch_size, sequences)
    first, count = refit_sequences(recipe, last - 1)
    assert first + count == last * recipe.training.global_batch_size


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["blending.refit_tokens=8192"], "blending.refit_tokens=8192 would be ignored"),
        (["blending.refit_milestones=4", "blending.refit_tokens=8192"], "nothing is blended"),
        (
            [*REFITS, "blending.refit_milestones=1"],
            "conversion.calibration_tokens, without a blending schedule",
        ),
        ([*REFITS, "blending.refit_milestones=26"], "2 to 25"),
        ([*REFITS, "blending.refit_tokens=0"], "2048 to 102400"),
        ([*REFITS, "blending.refit_tokens=1000000"], "2048 to 102400"),
        ([*REFITS, "conversion.ridge=0"], "conversion.ridge is 0"),
        ([*REFITS, "conversion.refit_target=own"], "refit_target=own would be ignored"),
        (["conversion.ridge=0.1"], "conversion.ridge=0.1 would be ignored"),
    ],
)
def test_what_would_be_ignored_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compose_recipe("recovery/drelu", overrides)
    assert words in str(caught.value)


def test_a_refit_s_ridge_may_be_set() -> None:
    assert compose_recipe("recovery/drelu", [*REFITS, "conversion.ridge=0.1"]).conversion.ridge == 0.1
