"""Training keeps the zeros of sparse weights: under every ZeRO stage, on two ranks, after an interruption; and a violation is found."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.methods.weights.frozen import part_of, sparse_tensors
from sparsify.models import SparseModel
from sparsify.recipe.recipe import Recipe
from sparsify.runs.load import load
from sparsify.runs.state import checkpoint_names
from tests.conftest import Setup
from tests.methods.conftest import Calibrate
from tests.ranks import prepare_run, records, replace_model, run_ranks

PROGRAM = Path(__file__).with_name("frozen_program.py")
CASES = ["mistral-3", "mistral-3-cut", "mixtral-2", "mistral-1-planted"]
OTHERS = [
    "mistral-0",
    "mixtral-3",
    "mistral-1",
    "mistral-2",
    "mixtral-1",
    "mistral-1-bf16",
    "mistral-3-bf16",
    "mixtral-2-bf16",
    "mistral-2-offload",
]
Train = Callable[[list[str]], dict[str, tuple[str, Path]]]


@pytest.fixture(scope="module")
def runs(
    finished: Callable[[Setup], tuple[Path, dict]], calibrate: Calibrate, tmp_path_factory: pytest.TempPathFactory
) -> Train:
    """Trains cases one after another in the same two processes; returns what each ended with, and its folder."""
    whole, _ = finished(Setup("mistral", 1, 1, "fp32"))
    root = tmp_path_factory.mktemp("frozen")
    for kind in ("mistral", "mixtral"):
        calibrate(kind, "swiglu", root / kind, tokens=1024, method="wanda", weight_sparsity=0.5, measure=False)

    def train(cases: list[str]) -> dict[str, tuple[str, Path]]:
        for case in cases:
            run = prepare_run(whole, root / case, partial(_change, case=case))
            replace_model(run, root / case.partition("-")[0])
        said = run_ranks(PROGRAM, [str(root / case) for case in cases])
        return {case: (str(one[0]), root / case) for case, one in zip(cases, said, strict=True)}

    return train


def _change(recipe: Recipe, case: str) -> None:
    recipe.checkpoint.every_tokens = 1_000_000
    recipe.eval.every_tokens = 1_000_000
    recipe.training.budget_tokens = 5 * recipe.step_tokens
    recipe.engine.zero_stage = int(case.split("-")[1])
    recipe.optimizer.weight_decay = 0.5
    recipe.optimizer.warmup_tokens = 0
    recipe.training.precision = "bf16" if "bf16" in case else "fp32"
    recipe.engine.offload_optimizer_to_cpu = "offload" in case


@pytest.fixture(scope="module")
def trained(runs: Train) -> dict[str, tuple[str, Path]]:
    return runs(CASES)


def check_zeros(case: str, folder: Path) -> None:
    """The zeros of a run's newest checkpoint are those of its beginning, and all other weights were trained."""
    before, after = load_sparse(folder / "initial"), load(str(folder)).model
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    for name, parts in sparse_tensors(before.config).items():
        for _, place in parts:
            one, other = part_of(old[name], place), part_of(new[name], place)
            assert torch.equal(other == 0, one == 0), (case, name)
            assert 0.45 < float((one == 0).float().mean()) < 0.55
            kept = one != 0
            # bf16 rounds small steps away, but not all of them.
            assert float((one[kept] != other[kept]).float().mean()) > (0.1 if "bf16" in case else 0.9)


@pytest.mark.parametrize("case", [case for case in CASES if "planted" not in case])
def test_zeros_stay_zero_and_all_else_trains(case: str, trained: dict[str, tuple[str, Path]]) -> None:
    said, folder = trained[case]
    assert said == "done"
    check_zeros(case, folder)


@pytest.mark.slow
def test_other_stages_bf16_and_offload_keep_them_too(runs: Train) -> None:
    for case, (said, folder) in runs(OTHERS).items():
        assert said == "done"
        check_zeros(case, folder)


def state(folder: Path) -> dict[str, torch.Tensor]:
    model: SparseModel = load(str(folder)).model
    return model.state_dict()


def test_an_interrupted_run_ends_with_the_same_bits(trained: dict[str, tuple[str, Path]]) -> None:
    whole, cut = (trained[case][1] for case in ("mistral-3", "mistral-3-cut"))
    assert len([line for line in records(cut) if line["kind"] == "checkpoint"]) == 2
    one, other = state(whole), state(cut)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_zero_that_something_else_writes_to_stops_the_run_before_it_is_saved(
    trained: dict[str, tuple[str, Path]],
) -> None:
    said, folder = trained["mistral-1-planted"]
    assert said.startswith("step 3: 1 weights that were zero are not any more, at step 3, of them 1 in model.layers.1.")
    assert "self_attn.o_proj.weight" in said
    assert checkpoint_names(folder / "checkpoints") == []
