"""CHESS: a neuron's threshold is the layer's cut, divided by the mean size of its up factor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sparsify.methods.chess import Chess, ChessSettings
from tests.methods.blocks import NEURONS, Block, naive_quantile, random_block


def naive_means(block: Block, statistic: str, least_rows: int = 256) -> list[list[float]]:
    """m_c of each expert's neurons; experts with few tokens have the mean over all experts' tokens and neurons."""
    sums, rows = [], []
    for number in range(len(block.experts)):
        _, u, weights = block.factors(number)
        total = [0.0] * NEURONS
        for row, weight in zip(u.tolist(), weights.tolist(), strict=True):
            for c in range(NEURONS):
                total[c] += (weight * row[c]) ** 2 if statistic == "rms" else abs(weight * row[c])
        sums.append(total)
        rows.append(len(u))
    pooled = sum(map(sum, sums)) / (sum(rows) * NEURONS)
    means = [
        [pooled if count < least_rows and len(rows) > 1 else one / count for one in total]
        for total, count in zip(sums, rows, strict=True)
    ]
    return [[math.sqrt(one) if statistic == "rms" else one for one in own] for own in means]


@pytest.mark.parametrize("tokens", [[300], [300, 260, 90, 0]])
@pytest.mark.parametrize("statistic", ["rms", "mean_abs"])
def test_thresholds_are_the_formula_in_a_loop(tokens: list[int], statistic: Any) -> None:
    block, mask = random_block(tokens), Chess(ChessSettings(target_zeros=0.5, up_statistic=statistic))
    means = naive_means(block, statistic)
    scores = [
        abs(g) * means[number][c]
        for number in range(len(tokens))
        for row in block.factors(number)[0].tolist()
        for c, g in enumerate(row)
    ]
    cut = naive_quantile(scores, 0.5)
    fitted = block.fit(mask, "gate")
    for own, expected in zip(fitted.parts["threshold"].tolist(), means, strict=True):
        for threshold, mean in zip(own, expected, strict=True):
            assert cut / mean * 0.9999 <= threshold <= cut / mean * 1.0052
    assert fitted.record["pooled_experts"] == [n for n, count in enumerate(tokens) if count < 256 and len(tokens) > 1]


def test_a_neuron_whose_up_factor_is_always_zero_never_fires() -> None:
    block, mask = random_block([300]), Chess(ChessSettings(target_zeros=0.3))
    block.experts[0].up[4] = 0
    parts = {"gate": block.fit(mask, "gate").parts}
    (masked,) = block.masked(mask, parts)
    kept = masked.neurons(block.x) != 0
    assert not kept[:, 4].any()
    assert kept[:, :4].any(0).all()
    share = 1 - (masked.activation.masked_gate(block.x @ masked.gate.T) != 0).float().mean()
    assert float(share) == pytest.approx(0.3, abs=0.01)


def test_it_drops_what_matters_least_where_gate_and_up_are_independent() -> None:
    """Among masks of so many gates by fixed thresholds, none loses less of the products' energy than E[u²]'s."""
    torch.manual_seed(3)
    g, sizes = torch.randn(4000, NEURONS).double(), torch.rand(NEURONS).double() + 0.05
    u = torch.randn(4000, NEURONS).double() * sizes
    means = u.square().mean(0).sqrt()

    def lost(scores: torch.Tensor) -> float:
        dropped = scores <= scores.flatten().quantile(0.5)
        return float((g * u)[dropped].square().sum())

    own = lost(g.abs() * means)
    assert own < lost(g.abs())
    for exponent in (0.5, 2.0):
        assert own < lost(g.abs() * means**exponent)
