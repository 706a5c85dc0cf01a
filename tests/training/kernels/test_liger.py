"""Liger's kernels train the same model, or the recipe is refused; what they do is in liger_checks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsify.errors import RecipeError
from sparsify.plan import make_plan, named_hardware, resolve_engine
from sparsify.recipe.compose import compose_recipe
from sparsify.training.deepspeed_engine import check_machine
from sparsify.training.kernels import liger
from sparsify.training.kernels.liger_ops import installed_version
from tests.triton import run_checks

CHECKS = Path(__file__).with_name("liger_checks.py")
ASKED = "training.liger_kernels=true"


@pytest.mark.slow
@pytest.mark.skipif(installed_version() is None, reason="no liger-kernel")
def test_liger_does_what_it_must() -> None:
    """On the GPU, or in Triton's interpreter."""
    run_checks(CHECKS)


def test_what_would_be_ignored_or_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"training\.compile: the compiler fuses"):
        compose_recipe("recovery/drelu", [ASKED, "training.compile=true"])
    with pytest.raises(RecipeError, match=r"distillation\.logits_weight: distillation compares"):
        compose_recipe("recovery/drelu", [ASKED, "distillation.logits_weight=1"])
    recipe = compose_recipe("recovery/drelu", [ASKED])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RecipeError, match="no GPU here"):
        check_machine(recipe)
    check_machine(compose_recipe("recovery/drelu", []))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for found, message in ((None, "not installed"), ("0.8.4", r"liger-kernel is 0\.8\.4")):
        monkeypatch.setattr(liger, "installed_version", lambda found=found: found)
        with pytest.raises(RecipeError, match=message) as caught:
            check_machine(recipe)
        assert "pip install -U liger-kernel" in str(caught.value)
    for found in ("0.8.5", "0.10.0"):
        monkeypatch.setattr(liger, "installed_version", lambda found=found: found)
        check_machine(recipe)


def test_plan_has_no_whole_logits_and_auto_makes_use_of_the_room() -> None:
    hardware = named_hardware("8xa800-80gb")
    devices, micro_batches = [], []
    for asked in ([], [ASKED]):
        recipe = compose_recipe("turbosparse_mistral_7b", ["engine=auto", *asked])
        resolved, _ = resolve_engine(recipe, hardware=hardware)
        micro_batches.append(resolved.training.micro_batch_size)
        devices.append(make_plan(resolved, hardware=hardware).device)
    assert micro_batches[1] > micro_batches[0]
    assert devices[0].moment == "loss"
    assert devices[1].logits_bytes < devices[0].logits_bytes / 2
