"""Blending, penalty, target and distillation in real runs of two ranks: the same under every ZeRO stage, and after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsify.commands.report import blend_note
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.sparsification import DistillationSection, PenaltyStageSection
from sparsify.runs.load import load
from tests.conftest import Setup
from tests.ranks import prepare_run, records, replace_model, run_ranks

pytestmark = pytest.mark.xdist_group("gentle")

PROGRAM = Path(__file__).with_name("objective_program.py")
TARGET = 0.9
STAGES = ["mistral-1", "mistral-3", "mixtral-2", "mixtral-3"]
WHOLE = "mistral-whole-1"
OTHER_STAGES = ["mistral-0", "mistral-2", "mixtral-1"]
Runs = Callable[[list[str]], dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def runs(
    finished: Callable[[Setup], tuple[Path, dict]],
    stock: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    """Trains cases one after another in the same two processes; returns their metrics."""
    whole, _ = finished(Setup("mistral", 1, 1, "fp32"))

    def train(cases: list[str]) -> dict[str, list[dict[str, Any]]]:
        root = tmp_path_factory.mktemp("gentle")
        for case in cases:
            run = prepare_run(whole, root / case, partial(_change, case=case))
            if case.startswith("mixtral"):
                replace_model(run, stock["mixtral"])
        run_ranks(PROGRAM, [str(root / case) for case in cases])
        return {case: [*records(root / case), {"kind": "folder", "path": root / case}] for case in cases}

    return train


def _change(recipe: Recipe, case: str) -> None:
    recipe.checkpoint.every_tokens = 1_000_000
    recipe.blending.budget_share = 0.2 if "target" in case else 0.4
    recipe.distillation = DistillationSection(logits_weight=0.1, ffn_weight=0.1)
    if "target" in case:
        recipe.training.budget_tokens = 60 * recipe.step_tokens
        recipe.eval.every_tokens = recipe.training.budget_tokens
        recipe.penalty.target_zeros = TARGET
        return
    recipe.training.budget_tokens = 5 * recipe.step_tokens
    recipe.engine.zero_stage = int(case[-1])
    recipe.eval.every_tokens = recipe.step_tokens
    recipe.penalty.stages = [
        PenaltyStageSection(0.4, 1.0),
        PenaltyStageSection(1.0, 30.0),
    ]
    recipe.penalty.gate_share = 0.5
    if case == WHOLE:
        recipe.training.micro_batch_size *= recipe.accumulation_steps
        recipe.training.gradient_checkpointing = True


@pytest.fixture(scope="module")
def measured(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    return runs([*STAGES, WHOLE, "target", "target-cut"])


def lines(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def test_the_penalty_is_the_same_under_every_stage(measured: dict[str, Any]) -> None:
    _check_equal(measured["mistral-1"], measured["mistral-3"])
    _check_equal(measured["mixtral-2"], measured["mixtral-3"])


@pytest.mark.slow
def test_other_stages_do_the_same(measured: dict[str, Any], runs: Runs) -> None:
    others = runs(OTHER_STAGES)
    for case in OTHER_STAGES:
        _check_equal(measured[f"{case[:-1]}3"], others[case])


def _check_equal(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for a, b in zip(lines(one, "train"), lines(other, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["penalty"] == pytest.approx(b["penalty"], rel=2e-3)
        assert a["distillation"] == pytest.approx(b["distillation"], rel=2e-3)


def test_micro_batches_and_checkpointing_change_nothing(measured: dict[str, Any]) -> None:
    _check_equal(measured["mistral-1"], measured[WHOLE])


def test_the_first_step_of_an_blend_is_its_teacher_and_the_next_are_not(
    measured: dict[str, Any],
) -> None:
    for case in STAGES:
        distilled = [line["distillation"] for line in lines(measured[case], "train")]
        assert distilled[0] == pytest.approx({"logits": 0, "ffn": 0, "added": 0}, abs=1e-6)
        assert distilled[2]["logits"] > 0.01
        assert distilled[2]["ffn"] > 0.1
        added = 0.1 * (distilled[2]["logits"] + distilled[2]["ffn"])
        assert distilled[2]["added"] == pytest.approx(added)


def test_the_log_says_how_far_the_blend_is_and_what_was_measured(measured: dict[str, Any]) -> None:
    train, validation = (lines(measured["mistral-3"], kind) for kind in ("train", "validation"))
    assert [line.get("blended_share") for line in train[:3]] == [0.0, 0.5, None]
    labels = [(line["label"], line.get("blended_share")) for line in validation]
    assert labels[:4] == [
        ("base", None),
        ("after_replacement", None),
        ("blending", 0.5),
        ("training", None),
    ]
    assert validation[2]["zeros"] == 0
    assert validation[3]["zeros"] > 0.5
    weights = [line["penalty"]["weight"] for line in train]
    assert weights[:2] == [1.0, 1.0]
    assert weights == sorted(weights)


def test_a_run_ends_at_its_target(measured: dict[str, Any]) -> None:
    zeros = [line["penalty"]["zeros"] for line in lines(measured["target"], "train")]
    assert 0.5 < zeros[15] < TARGET - 0.1
    assert zeros[-1] == pytest.approx(TARGET, abs=0.015)
    assert max(zeros) < TARGET + 0.015
    # Held-out text has fewer zeros than that which the target was held on.
    assert lines(measured["target"], "validation")[-1]["zeros"] == pytest.approx(TARGET, abs=0.05)


def test_a_target_s_run_goes_on_after_an_interruption_as_if_there_had_been_none(
    measured: dict[str, Any],
) -> None:
    whole, cut = (lines(measured[case], "train") for case in ("target", "target-cut"))
    for key in ("step", "loss", "penalty", "distillation", "step_count"):
        assert [line[key] for line in whole] == [line[key] for line in cut]
    assert len(lines(measured["target-cut"], "checkpoint")) == 2


def test_a_method_that_the_loop_does_not_know_takes_part_in_every_step(
    measured: dict[str, Any],
) -> None:
    counted = [line["step_count"] for line in lines(measured["target-cut"], "train")]
    assert counted == [[step, counted[0][1]] for step in range(1, 61)]
    assert counted[0][1] >= 1


def test_a_checkpoint_saved_on_the_way_is_what_it_will_be_loaded_as(
    measured: dict[str, Any],
) -> None:
    (folder,) = lines(measured["target-cut"], "folder")
    checkpoint = folder["path"] / "checkpoints" / "step-00000010"
    loaded = load(str(checkpoint))
    reference = load_file(checkpoint / "reference.safetensors")
    with torch.no_grad():
        logits = loaded.model(reference["input_ids"], use_cache=False).logits
    torch.testing.assert_close(logits, reference["logits"])
    assert "saved 83% of the way to drelu, measured with drelu itself" in blend_note(loaded)
