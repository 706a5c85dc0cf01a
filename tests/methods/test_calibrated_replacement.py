"""Signs, thresholds and refit, each by itself and against what linear algebra says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from sparsify.methods.calibrated_replacement import LayerCalibration, SignEnergies, flip
from sparsify.methods.histogram import THRESHOLD_BINS, Histogram
from sparsify.methods.layer_expert import Expert, Routes
from sparsify.methods.layerwise import Inputs
from sparsify.methods.reconstruction import Gram
from sparsify.methods.sites import fit_block
from sparsify.methods.thresholds import OutputNormThresholds, ThresholdSettings
from sparsify.models import ACTIVATIONS, FfnActivation
from sparsify.recipe.sparsification import ConversionSection

NEURONS, HIDDEN, ROWS = 24, 16, 400


def expert(name: str, seed: int = 0) -> Expert:
    torch.manual_seed(seed)
    weights = torch.randn(2, NEURONS, HIDDEN), torch.randn(HIDDEN, NEURONS)
    return Expert(*weights[0], weights[1], FfnActivation(name, 0.3))


def answer(each: Expert, x: torch.Tensor) -> torch.Tensor:
    return each.neurons(x) @ each.down.T


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "drelu"])
def test_turning_signs_changes_nothing_where_up_is_not_rectified(name: str) -> None:
    x, flips = torch.randn(ROWS, HIDDEN), torch.rand(NEURONS) > 0.5
    before = expert(name)
    assert torch.equal(answer(flip(before, flips), x), answer(before, x))


def test_a_sign_is_turned_where_the_other_half_holds_more_energy() -> None:
    x, drelu, flips = torch.randn(ROWS, HIDDEN) + 0.5, expert("drelu"), torch.rand(NEURONS) > 0.5
    energies, turned = SignEnergies(NEURONS, x.device), SignEnergies(NEURONS, x.device)
    energies.add(drelu, x)
    turned.add(flip(drelu, flips), x)
    assert torch.equal(turned.flips(), energies.flips() ^ flips)
    aligned = flip(drelu, energies.flips()).neurons(x).square().sum(0)
    assert (aligned >= drelu.neurons(x).square().sum(0)).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_thresholds_give_the_wanted_zeros_and_zero_the_smallest_outputs(name: str) -> None:
    x, plain = torch.randn(ROWS, HIDDEN), expert(name)

    def inputs() -> Iterator[Inputs]:
        for part in x.split(150):
            routes = Routes(torch.zeros(len(part), 1, dtype=torch.long), torch.ones(len(part), 1))
            every = torch.ones(len(part), dtype=torch.bool)
            yield Inputs(part, routes, torch.zeros_like(part), every, ~every)

    mask = OutputNormThresholds(ThresholdSettings(target_zeros=0.9))
    (limited,), *_ = fit_block(mask, [plain], inputs, torch.float32)
    h, kept = plain.neurons(x), limited.neurons(x)
    assert (kept == 0).float().mean() == pytest.approx(0.9, abs=0.01)
    sizes = h.abs() * plain.down.norm(dim=0)
    assert sizes[kept == 0].max() <= sizes[kept != 0].min() * 1.01
    assert torch.equal(kept[kept != 0], h[kept != 0])


def test_zeros_that_are_there_already_need_no_threshold() -> None:
    magnitudes = Histogram(THRESHOLD_BINS)
    magnitudes.add(expert("drelu").neurons(torch.randn(ROWS, HIDDEN)).abs())
    assert magnitudes.quantile(0.3) == 0


def test_the_refit_is_the_ridge_solution() -> None:
    torch.manual_seed(0)
    h, y, down = torch.randn(ROWS, NEURONS), torch.randn(ROWS, HIDDEN), expert("drelu").down
    gram = Gram(NEURONS, HIDDEN, h.device)
    for rows in range(0, ROWS, 90):
        gram.add(h[rows : rows + 90], y[rows : rows + 90])
    strength = float(0.05 * h.square().sum(0).mean()) ** 0.5
    # Ridge regression is least squares with the pull towards the old weights as further rows.
    rows = torch.cat([h, strength * torch.eye(NEURONS)]).double()
    wanted = torch.cat([y, strength * down.T]).double()
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(gram.solve(down, 0.05).double(), expected, atol=1e-5, rtol=1e-4)


def test_neurons_that_never_fire_leave_the_weights_alone() -> None:
    gram, down = Gram(NEURONS, HIDDEN, torch.device("cpu")), expert("drelu").down
    gram.add(torch.zeros(ROWS, NEURONS), torch.randn(ROWS, HIDDEN))
    assert gram.solve(down, 0.01) is down


@pytest.mark.parametrize("misled", [False, True])
def test_held_out_tokens_decide_whether_a_refit_is_kept(misled: bool) -> None:
    torch.manual_seed(0)
    x, judge = torch.randn(1024, HIDDEN), torch.arange(1024) % 4 == 3
    # Misled: what the refit is asked to mend is there on the tokens that it sees, and on no other.
    gap = 50 * x.abs() * ~judge[:, None] if misled else torch.zeros_like(x)
    routes = Routes(torch.zeros(1024, 1, dtype=torch.long), torch.ones(1024, 1))

    def inputs() -> Iterator[Inputs]:
        yield Inputs(x, routes, gap, ~judge, judge)

    dense = expert("swiglu")
    swapped = replace(dense, activation=FfnActivation("drelu"))
    settings = ConversionSection(calibration_tokens=1024)
    layer = LayerCalibration([dense], [swapped], settings, torch.float32, inputs, swapped.activation).run()
    result, new = layer.results[0], layer.stages["refit"][0]
    assert result.num_tokens == 768
    if misled:
        assert result.kept_because == "the refit was worse on held-out tokens"
        assert torch.equal(new.down, flip(swapped, layer.flips[0]).down)
    else:
        assert result.kept_because is None
        wanted = answer(dense, x[judge])
        error = (answer(new, x[judge]) - wanted).norm() / wanted.norm()
        assert result.error_refitted == pytest.approx(float(error), rel=1e-3)
        assert result.error_refitted < result.error_before < result.error_bare
