"""Zeros by layer from measured sensitivity: the law of the division, and a conversion with it."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import RecipeError
from sparsify.methods.allocation import allocate, damage_by_layer, probe_shares
from sparsify.methods.base import method_of
from sparsify.recipe.sparsification import ConversionSection
from tests.methods.conftest import Calibrate, killed_after, measured

DAMAGES = st.lists(st.tuples(st.floats(1e-4, 1), st.floats(1, 8)), min_size=2, max_size=12)


@given(DAMAGES, st.floats(0.2, 0.97))
def test_the_mean_is_the_target_and_what_costs_more_gets_fewer(
    damages: list[tuple[float, float]], target: float
) -> None:
    low, high = zip(*((loss / rise, loss) for loss, rise in damages), strict=True)
    shares = allocate(low, high, target)
    assert sum(shares) / len(shares) == pytest.approx(target, abs=2e-3)
    assert all(target - (1 - target) / 2 - 1e-5 <= share <= (1 + target) / 2 + 1e-5 for share in shares)
    order = sorted(range(len(high)), key=lambda layer: high[layer])
    assert all(shares[a] >= shares[b] - 1e-5 for a, b in pairwise(order))


def test_equal_layers_get_equal_shares_and_unmeasurable_damage_counts_as_little() -> None:
    assert allocate([0.01] * 4, [0.03] * 4, 0.9) == pytest.approx([0.9] * 4, abs=1e-4)
    shares = allocate([0.0, 0.01], [-0.001, 0.03], 0.9)
    assert shares[0] > 0.94 > 0.9 > shares[1]
    low, high = probe_shares(0.9)
    assert low / (1 - low) == pytest.approx(high / (1 - high) / 2)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_layers_get_their_own_zeros(
    kind: str, calibrate: Calibrate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sparsify")
    settings = {"method": "percentile", "target_zeros": 0.8, "remainder": "constant"}
    with killed_after("Layer 1 of 2: relative error"):
        calibrate(kind, "swiglu", tmp_path / "out", allocation="sensitivity", **settings)
    found = calibrate(kind, "swiglu", tmp_path / "out", allocation="sensitivity", **settings)
    zeros = [layer["zeros"]["percentile"] for layer in found.calibration.layers]
    first, second = (zero / values for zero, values in zeros)
    assert (first + second) / 2 == pytest.approx(0.8, abs=0.04)
    assert abs(first - second) > 0.01
    model = load_sparse(found.folder)
    loss, _ = measured(model, found)
    assert found.calibration.stages[-1].loss == pytest.approx(loss, abs=2e-4)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sequences = next(iter(found.watched.values()))
    damages = damage_by_layer(model, sequences)
    assert len(damages) == 2
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_without_zeros_to_divide_it_would_be_ignored() -> None:
    with pytest.raises(RecipeError, match="allocation=sensitivity would be ignored"):
        method_of(ConversionSection(calibration_tokens=1024, allocation="sensitivity"))
