"""NaN, infinity and spikes in real runs of two ranks: found by all, left out of the weights, named, survived or stopped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from sparsify.recipe.recipe import Recipe
from sparsify.training.stability import with_range
from tests.conftest import Setup
from tests.ranks import prepare_run, records, run_ranks

pytestmark = pytest.mark.xdist_group("bad_steps")

ENGINES = [(0, "fp32"), (3, "bf16")]
OTHER_ENGINES = [(1, "bf16"), (1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32")]
Found = dict[str, list[dict[str, Any]]]
PROGRAM = Path(__file__).with_name("bad_step_program.py")


@pytest.fixture(scope="module")
def meet(
    finished: Callable[[Setup], tuple[Path, dict]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[str]], Found]:
    """Runs cases one after another in the same two processes; returns what both ranks found, by case."""
    whole, _ = finished(Setup("mistral", 1, 1, "fp32"))
    return lambda cases: _meet(cases, whole, tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def found(meet: Callable[[list[str]], Found]) -> Found:
    skips = [f"skip-{stage}-{dtype}" for stage, dtype in ENGINES]
    return meet([*skips, "stop-1-fp32", "rollback-3-bf16", "never-1-fp32", "harder-1-fp32", "worse-1-fp32"])


def _meet(cases: list[str], whole: Path, root: Path) -> Found:
    for case in cases:
        prepare_run(whole, root / case, partial(_change, case=case))
    answers = run_ranks(PROGRAM, [str(root / case) for case in cases])
    for case, ranks in zip(cases, answers, strict=True):
        ranks[0]["metrics"] = records(root / case)
    return dict(zip(cases, answers, strict=True))


def _change(recipe: Recipe, case: str) -> None:
    policy, stage, dtype = case.split("-")
    recipe.engine.zero_stage, recipe.training.precision = int(stage), dtype
    recipe.stability.on_bad_step = policy if policy in ("stop", "rollback") else "skip"
    recipe.stability.recent_steps, recipe.stability.max_bad_steps = 8, 4
    recipe.checkpoint.keep_last = 9
    recipe.checkpoint.every_tokens = 3 * recipe.step_tokens
    recipe.eval.every_tokens = 8 * recipe.step_tokens


@pytest.mark.parametrize(("stage", "dtype"), ENGINES)
def test_a_skipped_step_leaves_every_bit_on_both_ranks(stage: int, dtype: str, found: Found) -> None:
    _check_skipped(found[f"skip-{stage}-{dtype}"])


@pytest.mark.slow
def test_other_engines_do_the_same(meet: Callable[[list[str]], Found]) -> None:
    cases = [f"skip-{stage}-{dtype}" for stage, dtype in OTHER_ENGINES]
    for case, ranks in meet([*cases, "rollback-2-bf16", "rollback-1-fp32"]).items():
        (_check_skipped if case.startswith("skip") else _check_rolled_back)(ranks)


def _check_skipped(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["same"] and rank["trains_on"] for rank in ranks)
    assert all(rank["state"] == [[24, 47]] for rank in ranks)
    lines = [record for record in ranks[0]["metrics"] if record["kind"] == "bad_step"]
    assert [record["step"] for record in lines] == [4, 5, 6]
    assert [record["reason"] for record in lines] == [
        "loss_not_finite",
        "gradient_not_finite",
        "spike",
    ]
    # Rank 1 holds sequences 2, 3, 6 and 7 of each batch of eight.
    assert sorted(chain(*lines[0]["suspects"].values())) == [26, 27, 30, 31]
    assert lines[1]["sequences"] == [32, 39]
    assert set(chain(*lines[2]["suspects"].values())) <= {42, 43, 46, 47}
    trained = [record["step"] for record in ranks[0]["metrics"] if record["kind"] == "train"]
    assert trained == [1, 2, 3, 7]


def test_stop_says_where_and_keeps_the_state_from_before(
    found: Found,
) -> None:
    for rank in found["stop-1-fp32"]:
        assert "step 4 is bad: the loss is NaN or infinite" in rank["error"]
        assert "on_bad_step=skip" in rank["error"]
        assert rank["latest"] == "step-00000003"


def test_rollback_goes_on_behind_the_bad_step_with_the_checkpoint_s_weights(found: Found) -> None:
    _check_rolled_back(found["rollback-3-bf16"])


def _check_rolled_back(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["state"] == [[24, 39]] and "error" not in rank for rank in ranks)
    assert all(rank["resumed"] for rank in ranks)
    lines = {record["kind"]: record for record in ranks[0]["metrics"]}
    assert lines["rollback"] | {"kind": ""} == {
        "kind": "",
        "step": 5,
        "tokens": 5 * 512,
        "to_step": 3,
        "sequences": [24, 39],
    }


def test_a_run_that_does_not_recover_stops_with_a_report(
    found: Found,
) -> None:
    for rank in found["never-1-fp32"]:
        assert "The run does not recover: step 7 is bad" in rank["error"]
        assert "bad step 5 of the last 7" in rank["error"]
        assert "sequences 16–55" in rank["error"]
        assert "on_bad_step=rollback" in rank["error"]


def test_text_that_became_harder_does_not_end_the_run(found: Found) -> None:
    ranks = found["harder-1-fp32"]
    assert all("error" not in rank and rank["latest"] == "step-00000008" for rank in ranks)
    lines = [record for record in ranks[0]["metrics"] if record["kind"] in ("bad_step", "harder_text")]
    assert [(line["kind"], line["step"]) for line in lines[-2:]] == [("bad_step", 8), ("harder_text", 8)]
    assert [line["reason"] for line in lines[:-1]] == ["spike"] * 5
    assert lines[-1]["held_out_loss"] == pytest.approx(lines[-1]["held_out_loss_before"], rel=0.25)


def test_a_model_that_became_worse_ends_it_with_both_held_out_losses(found: Found) -> None:
    for rank in found["worse-1-fp32"]:
        assert "The run does not recover: step 8 is bad: the loss jumped to" in rank["error"]
        assert "The held-out loss rose from" in rank["error"]


def test_ranges_that_touch_are_one() -> None:
    assert with_range([], 8, 15) == [[8, 15]]
    assert with_range([[8, 15]], 16, 23) == [[8, 23]]
    assert with_range([[8, 15]], 24, 31) == [[8, 15], [24, 31]]
    assert with_range([[8, 15]], 0, 23) == [[0, 23]]
