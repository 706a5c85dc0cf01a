"""Proxy runs are the recipe at a smaller budget, evaluated on the same text of every domain."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsify.conversion.convert import convert
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import MixtureError, RecipeError, RunError
from sparsify.mixture.sequences.shares import token_shares
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.model import ModelSection
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.sparsification import ActivationSection
from sparsify.tuning.trials import (
    Measurement,
    Proxy,
    check_comparable,
    held_out_halves,
    measure_domains,
    proxy_recipe,
)
from sparsify.tuning.tune import compare

SHARES = {"code": 0.7, "prose": 0.3, "questions": 0.0}


@pytest.fixture
def recipe(recipe_file: Path, mixture_file: Path, tmp_path: Path) -> Recipe:
    overrides = [f"mixture={mixture_file}", "baseline.ffn_activation=swiglu"]
    return compose_recipe(str(recipe_file), [*overrides, f"cache_dir={tmp_path / 'cache'}"])


def test_a_proxy_is_the_recipe_at_a_smaller_budget(recipe: Recipe) -> None:
    proxy = proxy_recipe(recipe, SHARES, 1536, Path("runs/tiny-tune/trial-03"), 7)
    assert proxy.run_dir == "runs/tiny-tune/trial-03"
    assert (proxy.num_steps, proxy.training.seed) == (3, 7)
    assert proxy.optimizer.warmup_tokens == 256  # a sixth of the budget, as in the recipe
    assert proxy.baseline.ffn_activation is None
    assert token_shares(proxy.mixture) == {"code": 0.7, "prose": 0.3}
    assert recipe.training.budget_tokens == 3072, "the recipe itself is left alone"


def test_the_instruction_share_override_does_not_change_a_trials_shares(recipe: Recipe) -> None:
    recipe.mixture.instruction_token_share = 0.5
    proxy = proxy_recipe(recipe, SHARES, 1536, Path("runs/x"), 1)
    assert token_shares(proxy.mixture) == {"code": 0.7, "prose": 0.3}


def test_delivered_shares_are_those_of_whole_sequences(recipe: Recipe) -> None:
    proxy = Proxy("one", proxy_recipe(recipe, SHARES, 1024, Path("runs/x"), 1), 3)
    delivered = proxy.delivered_shares
    assert delivered == {"code": 11 / 16, "prose": 5 / 16, "questions": 0.0}


def test_less_than_a_step_is_refused(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="less than one step of 512 tokens") as error:
        proxy_recipe(recipe, SHARES, 511, Path("runs/x"), 1)
    assert "--trial-tokens" in str(error.value)


def test_held_out_sequences_do_not_depend_on_shares(recipe: Recipe, stock: dict[str, Path]) -> None:
    """Every domain is included, even one without a share, and the halves have no sequence in common."""
    tokenizer = load_tokenizer(stock["mistral"])
    first = held_out_halves(recipe, tokenizer, 3)
    for name, share in SHARES.items():
        recipe.mixture.sources[name].token_share = share
    again = held_out_halves(recipe, tokenizer, 3)
    for halves in zip(first, again, strict=True):
        texts = [[w.input_ids.tolist() for sequences in half.values() for w in sequences] for half in halves]
        assert texts[0] == texts[1]
    for name in SHARES:
        one, other = ([w.input_ids.tolist() for w in half[name]] for half in first)
        assert len(one) == len(other) == 3
        assert not any(sequence in other for sequence in one)


def test_a_domain_with_one_held_out_sequence_is_refused(recipe: Recipe, stock: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text("\n".join(f'{{"text": "{"word " * 20}{i}"}}' for i in range(12)))
    recipe.mixture.sources["prose"].files = [str(tmp_path / "short.jsonl")]
    recipe.mixture.validation_fraction = 0.3
    with pytest.raises(MixtureError, match="prose"):
        held_out_halves(recipe, load_tokenizer(stock["mistral"]), 3)


def test_losses_of_domains_are_means_over_their_labels(recipe: Recipe, stock: dict[str, Path], tmp_path: Path) -> None:
    """An untrained model of 2,048 tokens is about ln 2048 from every text; dReLU zeros three quarters."""
    import torch

    source = ModelSection(source=str(stock["mistral"]))
    convert(source, ActivationSection("drelu"), tmp_path / "model", seed=0, dtype=torch.float32)
    model = load_sparse(tmp_path / "model", "drelu", torch.float32)
    half, _ = held_out_halves(recipe, load_tokenizer(tmp_path / "model"), 3)
    one, other = (measure_domains(model, half, batch) for batch in (1, 4))
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    assert one.losses.keys() == SHARES.keys()
    assert all(7 < loss < 9 for loss in one.losses.values())
    assert 0.6 < one.zeros < 0.9
    assert min(one.sequence_losses["code"]) < one.losses["code"] < max(one.sequence_losses["code"])


def measurement(shift: float, fingerprint: str = "x") -> Measurement:
    sequences = {"code": [2.0 + shift, 3.0 + shift], "web": [4.0, 5.0]}
    losses = {name: sum(values) / 2 for name, values in sequences.items()}
    return Measurement(losses=losses, zeros=0.5, sequence_losses=sequences, held_out_fingerprint=fingerprint)


def test_trials_on_different_text_are_not_compared(recipe: Recipe) -> None:
    folders = [Path("runs/x/trial-00"), Path("runs/x/trial-01")]
    proxies = [Proxy("", proxy_recipe(recipe, SHARES, 1024, one, 1), 3) for one in folders]
    check_comparable([(proxy, measurement(0)) for proxy in proxies])
    with pytest.raises(RunError, match="trial-01"):
        check_comparable([(proxies[0], measurement(0)), (proxies[1], measurement(0, "y"))])


def test_a_confirmation_compares_sequence_by_sequence() -> None:
    """Sequences differ a lot from each other; only their common change counts."""
    weights = {"code": 0.5, "web": 0.5}
    better = compare(measurement(0), measurement(-0.2), weights, num_tokens=1, seed=2)
    assert better.difference == pytest.approx(-0.1)
    assert better.better
    assert "beats the default" in better.verdict
    worse = compare(measurement(0), measurement(0.2), weights, num_tokens=1, seed=2)
    assert not worse.better
    assert "did not beat the default: +0.1000" in worse.verdict
