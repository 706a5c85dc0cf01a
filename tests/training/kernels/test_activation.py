"""The fused activation has the formula's values, gradients and zeros, in whichever way it is computed, and stays in place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sparsify.conversion.sparse_folder import check_activation, load_sparse
from sparsify.errors import RecipeError, RunError
from sparsify.models import FfnActivation
from sparsify.models.activations import activation_names
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.recipe import Recipe
from sparsify.sparsity.probe import SparsityProbe
from sparsify.training.deepspeed_engine import check_machine
from sparsify.training.kernels import activation
from sparsify.training.kernels.activation import (
    KERNELS,
    FusedFfnActivation,
    ZeroMeter,
    fuse_activation,
)
from tests.training.kernels.activation_checks import TOLERANCES, check_kernel

CHECKS = Path(__file__).with_name("activation_checks.py")
WITH_KERNEL = activation_names(lambda row: row.has_training_kernel)
NO_COMPILER = not activation.has_compiler()


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    yield
    activation.checked_kernel.cache_clear()


def recipe_with(**training: object) -> Recipe:
    return compose_recipe("recovery/drelu", [f"training.{k}={v}" for k, v in training.items()])


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_plain_kernel_has_the_formulas_values_gradients_and_zeros(name: str) -> None:
    kernel = KERNELS["plain"](name)
    check_kernel(name, kernel.forward, kernel.backward, 50, tuple(TOLERANCES))


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize("name", WITH_KERNEL)
def test_compiled_kernel_does_too(name: str) -> None:
    kernel = KERNELS["inductor"](name)

    def forward(gate: torch.Tensor, up: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        return kernel.forward(gate, up, zeros).view(gate.shape)

    check_kernel(name, forward, kernel.backward, 50, tuple(TOLERANCES))


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
def test_triton_kernels_do_too_in_its_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, str(CHECKS)], check=True, env=environment)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_training_step_is_the_same_bit_for_bit_and_guard_and_probe_see_the_activation(
    kind: str, stock: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KERNELS, "inductor", KERNELS["plain"])
    ids = torch.randint(0, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
    results = []
    for setting in ("off", "inductor"):
        model = load_sparse(stock[kind], "drelu", torch.float32)
        fuse_activation(model, recipe_with(fused_activation=setting))
        check_activation(model, "drelu")
        with SparsityProbe(model) as probe:
            model(ids)
        model(ids, labels=ids).loss.backward()
        grads = [parameter.grad for parameter in model.parameters()]
        results.append((grads, probe.statistics().zero_share("product"), model))
    (plain, zeros, _), (fused, fused_zeros, model) = results
    assert all(map(torch.equal, plain, fused))
    assert zeros == fused_zeros > 0.5
    assert {type(m) for m in model.modules() if isinstance(m, FfnActivation)} == {FusedFfnActivation}
    assert set(model.state_dict()) == set(results[0][2].state_dict())


@pytest.mark.usefixtures("one_rank")
def test_meter_counts_the_steps_zeros_and_nothing_else(stock: dict[str, Path]) -> None:
    model = load_sparse(stock["mistral"], "drelu", torch.float32)
    fuse_activation(model, recipe_with(count_zeros=True))
    ids = torch.randint(0, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
    with SparsityProbe(model) as probe, torch.no_grad():
        model(ids)
    for _ in range(2):
        meter = ZeroMeter(model, torch.device("cpu"))
        model(ids, labels=ids).loss.backward()
        assert meter.share() == pytest.approx(probe.statistics().zero_share("product"))
        with torch.no_grad():
            model(ids + 1)  # as a validation between steps: not counted


def test_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "triton", lambda _: KERNELS["plain"]("reglu"))
    with pytest.raises(RunError, match="other values than drelu"):
        activation.checked_kernel("triton", "drelu")


def test_settings_that_would_be_ignored_are_refused(stock: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="nothing counts them"):
        recipe_with(fused_activation="off", count_zeros=True)
    with pytest.raises(RecipeError, match=r"blending.budget_share, and there is no kernel"):
        compose_recipe("recovery/drelu", ["training.fused_activation=inductor", "blending.budget_share=0.1"])
    with pytest.raises(RecipeError, match="inductor"):
        recipe_with(fused_activation="inducto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="no GPU"):
        check_machine(recipe_with(fused_activation="triton"))
    monkeypatch.setenv("CXX", "not-installed")
    with pytest.raises(RecipeError, match=r"no C\+\+ compiler"):
        check_machine(recipe_with(fused_activation="inductor"))
    model = load_sparse(stock["mistral"], "drelu", torch.float32)
    model.model.layers[0].mlp.ffn_activation.threshold = torch.zeros(64)
    with pytest.raises(RecipeError, match="stores a mask"):
        fuse_activation(model, recipe_with(fused_activation="inductor"))
    with pytest.raises(RecipeError, match=r"count_zeros=true needs a kernel"):
        fuse_activation(model, recipe_with(count_zeros=True))
    fuse_activation(model, recipe_with(fused_activation="auto"))
    assert type(model.model.layers[0].mlp.ffn_activation) is FfnActivation
