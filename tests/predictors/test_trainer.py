"""Training reaches the wanted recall with few neurons on, goes on where it stopped, and keeps to its budget."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.errors import ModelError, RunError
from sparsify.models import SparseModel
from sparsify.predictors import Predictors, read_predictors, write_predictors
from sparsify.predictors.candidate import RankCost, choose_ranks
from sparsify.predictors.scores import FiringScores
from sparsify.predictors.trainer import Settings, train_predictors
from tests.predictors.conftest import random_batches, sparse_model

SETTINGS = Settings(wanted_recall=0.9, budget_share=0.5, ranks=(12, 24), passes=3)
BATCHES, VALIDATION = random_batches(40, seed=2), random_batches(6, seed=3)


def trained(model: SparseModel, state: Path, settings: Settings = SETTINGS, **more: object) -> Predictors:
    return train_predictors(model, BATCHES, VALIDATION, settings, text="random", state_path=state, **more)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_the_wanted_recall_is_reached_with_few_neurons_on(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    predictors = trained(request.getfixturevalue(kind), tmp_path / "state")
    assert len(predictors.blocks) == (8 if kind == "mixtral" else 2)
    blocks = list(predictors.facts.blocks.values())
    recall, on_share, firing_share = (
        sum(getattr(block, name) for block in blocks) / len(blocks) for name in ("recall", "on_share", "firing_share")
    )
    assert recall == pytest.approx(0.9, abs=0.04)
    # Neurons taken at random would have a recall of what is on.
    assert firing_share < on_share < recall - 0.3


@pytest.mark.parametrize("stop_after", [20, 90])
def test_an_interrupted_training_goes_on_to_the_same_predictors(
    stop_after: int, mistral: SparseModel, tmp_path: Path
) -> None:
    def interrupt(step: int, *_: object) -> None:
        if step == stop_after:
            raise KeyboardInterrupt

    whole = trained(mistral, tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        trained(mistral, tmp_path / "state", on_step=interrupt, save_seconds=0)
    steps: list[int] = []
    resumed = trained(mistral, tmp_path / "state", on_step=lambda step, *_: steps.append(step))
    assert steps[0] == stop_after
    assert resumed.facts == whole.facts
    for block, predictor in whole.blocks.items():
        for one, other in zip(predictor, resumed.blocks[block], strict=True):
            assert torch.equal(one, other)


def test_a_state_of_other_settings_is_refused(mistral: SparseModel, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(
            mistral,
            tmp_path / "state",
            on_step=lambda step, *_: interrupt() if step > 1 else None,
            save_seconds=0,
        )
    other = Settings(wanted_recall=0.8, budget_share=0.5, ranks=(12, 24), passes=3)
    with pytest.raises(RunError, match="another wanted_recall"):
        trained(mistral, tmp_path / "state", other)


def test_a_dense_model_has_nothing_to_predict(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is nothing to predict"):
        trained(sparse_model("mistral", "swiglu"), tmp_path / "state")


def test_predictors_of_other_weights_and_damaged_ones_are_refused(mistral: SparseModel, tmp_path: Path) -> None:
    predictors = trained(mistral, tmp_path / "state", Settings(ranks=(8,), passes=1, budget_share=1))
    write_predictors(predictors, tmp_path / "predictors")
    again = read_predictors(tmp_path / "predictors")
    again.check_model(mistral, "predictors")
    other = sparse_model("mistral")
    with torch.no_grad():
        other.model.layers[1].mlp.gate_proj.weight.mul_(1.5)
    with pytest.raises(ModelError, match="trained for other weights"):
        again.check_model(other, "predictors")
    again.blocks[0, 0] = again.blocks[0, 0]._replace(A=torch.zeros(7, 32))
    write_predictors(again, tmp_path / "predictors")
    with pytest.raises(ModelError, match=r"damaged: layers.0"):
        read_predictors(tmp_path / "predictors")


OPTIONS = st.lists(st.tuples(st.integers(1, 50), st.floats(1, 1000)), min_size=1, max_size=4)


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(1, 200))
def test_ranks_keep_to_the_budget_and_are_the_best_without_one(
    options: list[list[tuple[int, float]]], budget: int
) -> None:
    choices = {
        (layer, 0): [RankCost(size, size, read) for size, read in dict(pairs).items()]
        for layer, pairs in enumerate(options)
    }
    best = choose_ranks(choices, 10**9)
    for block, found in choices.items():
        read = {choice.rank: choice.read for choice in found}
        assert read[best[block]] == min(read.values())
    if sum(min(choice.predictor for choice in found) for found in choices.values()) > budget:
        with pytest.raises(RunError, match="more than the budget"):
            choose_ranks(choices, budget)
    else:
        assert sum(choose_ranks(choices, budget).values()) <= budget


@given(st.integers(0, 10_000), st.floats(0.01, 1.0))
def test_a_threshold_from_the_histogram_has_the_recall_asked_for(seed: int, recall: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 4 * torch.randn(200, generator=generator)
    fired = torch.rand(200, generator=generator) < 0.3
    histogram = FiringScores()
    histogram.add(scores, fired)
    threshold = histogram.threshold(recall)
    hit = (scores[fired] > threshold).double().mean().item()
    assert hit >= recall - 1e-9
    counted, on_share = histogram.at(threshold)
    assert math.isclose(counted, hit)
    assert math.isclose(on_share, (scores > threshold).double().mean().item())
