"""Verdicts, what `engine=auto` chooses, and what the command says and ends with."""

from __future__ import annotations

import json
import logging
import sys
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.cli import main
from sparsify.commands.plan import Assumptions, plan, refuse_unfit
from sparsify.commands.train import resolve_for_this_machine
from sparsify.errors import RecipeError
from sparsify.plan import make_plan, named_hardware, resolve_engine
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.engine import AUTO_STAGE

MISTRAL, MIXTRAL = "turbosparse_mistral_7b", "turbosparse_mixtral_8x7b"


@pytest.mark.parametrize("hardware", ["8xa800-80gb", "64xa800-80gb"])
@pytest.mark.parametrize("recipe", [MISTRAL, MIXTRAL])
def test_the_papers_recipes_fit_as_they_are(recipe: str, hardware: str) -> None:
    assert plan(recipe, [], Assumptions(hardware)).verdict.fits


@pytest.mark.parametrize("recipe", [MISTRAL, MIXTRAL])
def test_one_gpu_is_too_small_for_the_recipes_as_they_are(recipe: str) -> None:
    given = Assumptions("1xh200-141gb")
    result = plan(recipe, [], given)
    assert not result.verdict.fits
    with pytest.raises(RecipeError, match=f"{recipe} does not fit 1xh200-141gb"):
        refuse_unfit(result)
    nearest = result.verdict.nearest
    if recipe == MIXTRAL:  # its optimiser alone is 747 GB
        assert nearest is None
        return
    assert nearest is not None
    assert plan(recipe, nearest.overrides, given).verdict.fits


@pytest.mark.parametrize(
    ("recipe", "hardware", "host_memory_gb", "stage", "offload"),
    [
        (MISTRAL, "8xa800-80gb", None, 2, False),
        (MISTRAL, "64xa800-80gb", None, 2, False),
        (MISTRAL, "1xh200-141gb", None, 1, True),
        (MIXTRAL, "8xa800-80gb", None, 3, True),
        (MIXTRAL, "64xa800-80gb", None, 3, False),
        (MIXTRAL, "1xh200-141gb", 1024, 1, True),
    ],
)
def test_auto_chooses(recipe: str, hardware: str, host_memory_gb: float | None, stage: int, offload: bool) -> None:
    given = Assumptions(hardware, host_memory_gb=host_memory_gb)
    result = plan(recipe, ["engine=auto"], given)
    assert result.verdict.fits
    assert result.verdict.chosen
    assert (result.zero_stage, bool(result.host.total)) == (stage, offload)
    per_step = result.micro_batch_size * result.processes * result.accumulation_steps
    assert per_step == 2048


def test_auto_that_finds_nothing_says_what_there_is() -> None:
    with pytest.raises(RecipeError, match=r"nothing that fits 1xh200-141gb.*256\.0 GB of host"):
        plan(MIXTRAL, ["engine=auto"], Assumptions("1xh200-141gb"))


@given(gpu=st.sampled_from(["a100-40gb", "h100-80gb"]), count=st.sampled_from([1, 2, 8, 32]))
@settings(max_examples=8, deadline=None)
def test_what_auto_chooses_fits_and_is_the_fastest_of_its_neighbours(gpu: str, count: int) -> None:
    hardware = named_hardware(f"{count}x{gpu}")
    recipe = compose_recipe(MISTRAL, ["engine=auto", f"launch.processes={count}"])
    try:
        resolved, choice = resolve_engine(recipe, hardware=hardware)
    except RecipeError:
        return
    assert choice is not None
    chosen = make_plan(resolved, hardware=hardware)
    assert chosen.verdict.fits
    for checkpointing in (False, True):
        other = deepcopy(resolved)
        other.training.gradient_checkpointing = checkpointing
        neighbour = make_plan(other, hardware=hardware)
        if neighbour.verdict.fits:
            assert neighbour.cost.hours >= 0.99 * chosen.cost.hours


def test_auto_leaves_what_it_may_not_change() -> None:
    held = ["engine.auto_micro_batch=false", "engine.auto_checkpointing=false"]
    result = plan(MISTRAL, ["engine=auto", *held], Assumptions("8xh100-80gb"))
    assert (result.micro_batch_size, result.gradient_checkpointing) == (4, True)
    with pytest.raises(RecipeError, match="nothing that fits"):
        plan(MISTRAL, ["engine=auto", "engine.auto_offload=false"], Assumptions("1xh100-80gb"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine=auto", "engine.offload_optimizer_to_cpu=true"], "engine=auto, which decides it"),
        (["engine=zero2", "engine.auto_offload=false"], "where nothing is chosen"),
        (["engine.zero_stage=4"], "or engine=auto"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        compose_recipe("quickstart", overrides)


def test_a_run_gets_concrete_numbers_and_hears_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = compose_recipe("quickstart", ["engine=auto", f"run_dir={tmp_path}"])
    assert recipe.engine.zero_stage == AUTO_STAGE
    caplog.set_level(logging.INFO, "sparsify")
    resolved = resolve_for_this_machine(recipe)
    assert resolved.engine.zero_stage in (0, 1, 2, 3)
    assert resolved.training.global_batch_size == recipe.training.global_batch_size
    assert caplog.messages[0].startswith(f"engine=auto: ZeRO-{resolved.engine.zero_stage}, ")
    assert "shortest assumed step" in caplog.messages[0]


def test_given_numbers_replace_assumptions() -> None:
    given = Assumptions("8xh100-80gb", tokens_per_second=100_000, gpu_hour_price=2.0)
    cost = plan(MISTRAL, [], given).cost
    assert not cost.assumed
    assert cost.hours == pytest.approx(149_996_699_648 / 100_000 / 3600)
    assert cost.price == pytest.approx(cost.hours * 8 * 2.0)
    with pytest.raises(RecipeError, match="--gpu-hour-price is 0"):
        plan(MISTRAL, [], Assumptions(gpu_hour_price=0))
    with pytest.raises(RecipeError, match="Did you mean 'h100-80gb'"):
        plan(MISTRAL, [], Assumptions("8xh100"))


@pytest.mark.parametrize(("hardware", "code"), [("8xh100-80gb", None), ("1xrtx4090-24gb", 2)])
def test_the_command_ends_with_2_where_it_cannot_work(
    hardware: str,
    code: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["sparsify", "plan", MISTRAL, "--json", "--hardware", hardware]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code in ((0, None) if code is None else (code,))
    printed = capsys.readouterr()
    assert json.loads(printed.out)["verdict"]["fits"] == (code is None)
    assert ("does not fit" in printed.err) == (code == 2)


def test_epochs_stand_where_the_cache_knows_the_source(tmp_path: Path, mixture_file: Path) -> None:
    from sparsify.commands.plan import ALL_TOKENS, _tokenizer_here
    from sparsify.mixture.inspection import open_mixture

    overrides = [f"mixture={mixture_file}", f"cache_dir={tmp_path}"]
    assert all(one.epochs is None for one in plan("quickstart", overrides, Assumptions()).sources.values())
    recipe = compose_recipe("quickstart", overrides)
    tokenizer = _tokenizer_here(recipe)
    assert tokenizer is not None
    opened = open_mixture(
        recipe.mixture,
        tokenizer,
        train_tokens=dict.fromkeys(recipe.mixture.sources, ALL_TOKENS),
        sequence_length=recipe.training.sequence_length,
        cache_dir=tmp_path,
        on_progress=lambda *_: None,
    )
    for name, source in plan("quickstart", overrides, Assumptions()).sources.items():
        assert source.epochs == pytest.approx(source.tokens / opened[name].num_train_tokens)
