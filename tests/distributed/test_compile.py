"""`training.compile` trains the same model, and a run that is stopped goes on to the same bits in a process that compiles anew."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsify.errors import RecipeError
from sparsify.models import SparseMixtralConfig, SparseMixtralForCausalLM
from sparsify.recipe.compose import compose_recipe
from sparsify.training.deepspeed_engine import check_machine, load_model
from sparsify.training.kernels.activation import has_compiler
from tests.conftest import Command, Setup
from tests.distributed.test_all_the_way import (
    STOP_ATTEMPTS,
    lines,
    losses,
    stopped_half_way,
    weights_hash,
)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_a_stopped_compiled_run_goes_on_to_the_same_bits(
    kind: str,
    command: Command,
    finished: Callable[[Setup], tuple[Path, dict]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup = Setup(kind, 1, 1, "bf16")
    eager, _ = finished(setup)
    compiles = ["training.compile=true", f"training.gradient_checkpointing={str(kind == 'mistral').lower()}"]

    def in_new_cache(name: str) -> None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))

    in_new_cache("straight_cache")
    straight = tmp_path / "straight"
    subprocess.run(command(setup, straight) + compiles, check=True, stdout=subprocess.DEVNULL)
    assert any((tmp_path / "straight_cache").iterdir())
    for (_, loss, _), (_, expected, _) in zip(losses(straight), losses(eager), strict=True):
        assert loss == pytest.approx(expected, rel=2e-3)
    zeros = [line["zeros"] for run in (straight, eager) for line in lines(run / "sparsity.jsonl")]
    assert zeros[: len(zeros) // 2] == pytest.approx(zeros[len(zeros) // 2 :], rel=0.02)

    run = tmp_path / "run"
    for attempt in range(STOP_ATTEMPTS):
        in_new_cache(f"cache{attempt}")
        if stopped_half_way(command(setup, run) + compiles, run, signal.SIGINT, 130):
            break
        shutil.rmtree(run)
    else:
        pytest.fail("it was stopped too late to prove anything")
    in_new_cache("resumed_cache")
    subprocess.run(command(setup, run) + compiles, check=True, stdout=subprocess.DEVNULL)
    assert losses(run) == losses(straight)
    assert weights_hash(run) == weights_hash(straight)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine=zero3"], "ZeRO-3"),
        (["engine=auto"], "engine=auto"),
        (["training.fused_activation=inductor"], "fused_activation"),
        (["training.count_zeros=true"], "count_zeros"),
        (["blending.budget_share=0.1"], "needs forward hooks"),
        (["penalty.target_zeros=0.9"], "needs forward hooks"),
    ],
)
def test_what_cannot_be_compiled_or_would_be_ignored_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        compose_recipe("recovery/drelu", ["training.compile=true", *overrides])


def test_a_checkpointed_mixture_of_experts_would_not_be_compiled(tmp_path: Path) -> None:
    config = SparseMixtralConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_local_experts=2,
        ffn_activation="drelu",
    )
    SparseMixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    overrides = ["training.compile=true", "training.gradient_checkpointing=true"]
    with pytest.raises(RecipeError, match="mixture of experts"):
        load_model(compose_recipe("recovery/drelu", overrides), tmp_path, {})


def test_a_machine_without_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "not-installed")
    with pytest.raises(RecipeError, match=r"no C\+\+ compiler"):
        check_machine(compose_recipe("recovery/drelu", ["training.compile=true"]))
