"""From measured trials to record, page and terminal: the conclusions follow from the trials."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sparsify.mixture.sequences.shares import token_shares
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.recipe import Recipe
from sparsify.tuning.decision import conclude
from sparsify.tuning.record import TuneRecord
from sparsify.tuning.report import render_page, tune_summary
from sparsify.tuning.space import parse_space
from sparsify.tuning.trials import Measurement, Proxy, proxy_recipe

WEIGHTS = {"code": 0.5, "prose": 0.25, "questions": 0.25}
Losses = Callable[[dict[str, float]], dict[str, float]]


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, mixture_file: Path) -> Recipe:
    return compose_recipe(str(recipe_file), [f"mixture={mixture_file}"])


def record_of(recipe: Recipe, over: list[str], losses: Losses) -> TuneRecord:
    space = parse_space(over, recipe.mixture)
    shares = [token_shares(recipe.mixture), *map(space.source_shares, space.spread(7, 1))]
    measured = []
    for number, one in enumerate(shares):
        folder = Path(f"runs/tiny-tune/trial-{number:02d}")
        proxy = Proxy("", proxy_recipe(recipe, one, 10_240, folder, 1), 3)
        found = losses(proxy.delivered_shares)
        sequences = {name: [loss] for name, loss in found.items()}
        measured.append(
            (
                proxy,
                Measurement(losses=found, zeros=0.8, sequence_losses=sequences, held_out_fingerprint="x"),
            )
        )
    return conclude(space, WEIGHTS, measured)


def better_with_questions(shares: dict[str, float]) -> dict[str, float]:
    return dict.fromkeys(WEIGHTS, 3.0 - 0.5 * shares["questions"])


def test_a_clear_gain_is_recommended_up_to_the_bound(recipe: Recipe) -> None:
    record = record_of(recipe, ["mixture.instruction_token_share=0:0.6"], better_with_questions)
    assert record.recommended
    assert record.domains["questions"].tuned_share == pytest.approx(0.6, abs=2e-3)
    assert record.tuned_loss - record.default_loss == pytest.approx(-0.175, abs=0.01)
    assert record.weighted.loo_r2 > 0.95
    assert "instruction is at its upper bound, 60.0%" in record.verdict
    assert len(record.curves) == 1, "with two parts one curve says it all"


def noise(seed: int) -> Losses:
    draw = np.random.default_rng(seed).standard_normal
    return lambda _: {name: 3 + 0.02 * draw() for name in WEIGHTS}


def test_noise_is_rarely_recommended_and_reported_as_such(recipe: Recipe) -> None:
    """About 1 in 20 such tunings mistakes noise for a gain; several seeds, so that none can be picked."""
    records = [record_of(recipe, ["token_shares"], noise(seed)) for seed in range(20)]
    refused = [record for record in records if not record.recommended]
    assert len(refused) >= 16
    for record in refused:
        assert "do not support a mixture other" in record.verdict
        assert record.verdict.endswith("Keep the default mixture.")
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(tune_summary(refused[0], Path("runs/tiny-tune"), "tiny.yaml"))
    text = console.export_text()
    assert "Keep the default mixture." in text
    assert "No mixture was written" in text


def test_constant_losses_are_handled(recipe: Recipe) -> None:
    record = record_of(recipe, ["code=0.2:0.8"], lambda _: dict.fromkeys(WEIGHTS, 3.0))
    assert not record.recommended
    assert record.default_loss == pytest.approx(3.0)
    assert record.tuned_loss == pytest.approx(3.0)
    assert record.verdict.endswith("Keep the default mixture.")


def test_the_page_is_self_contained_and_shows_every_domain(recipe: Recipe) -> None:
    page = render_page(record_of(recipe, ["token_shares"], better_with_questions))
    assert page.count("data:image/svg+xml") == 4
    assert "http" not in page.replace("http://www.w3.org", "")
    for name in WEIGHTS:
        assert f"<td>{name}</td>" in page
