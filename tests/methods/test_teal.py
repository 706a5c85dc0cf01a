"""TEAL: a quantile for what each projection reads, and the greedy choice of their shares within a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.methods.base import Fitted, LayerValues, MethodSettings
from sparsify.methods.greedy import greedy_shares
from sparsify.methods.pooled import magnitudes
from sparsify.methods.teal import TEAL_SITES, Teal, TealSettings
from sparsify.models import SiteRule
from tests.methods.blocks import HIDDEN, NEURONS, Block, naive_quantile, random_block

IN_BLOCK = TEAL_SITES[4:]
SIZES = {"ffn_in.gate": 3 * NEURONS * HIDDEN, "ffn_in.up": 2 * NEURONS * HIDDEN, "inter": NEURONS * HIDDEN}
"""Different, so that steps are."""


class InBlock:
    """Thresholds on what the projections of a block read."""

    name = paper = "in block"
    Settings = MethodSettings
    reconstructs = False

    def __init__(self, settings: MethodSettings) -> None: ...

    @property
    def sites(self) -> dict[str, SiteRule]:
        return dict.fromkeys(IN_BLOCK, SiteRule())

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        raise NotImplementedError


def naive_output(block: Block, thresholds: dict[str, float]) -> torch.Tensor:
    """The block's output in float64, masked by these thresholds."""

    def kept(x: torch.Tensor, site: str) -> torch.Tensor:
        return x * (x.abs() > thresholds.get(site, -1.0))

    output = torch.zeros(len(block.x), HIDDEN, dtype=torch.float64)
    for number, expert in enumerate(block.experts):
        token, weight = block.routes.of(number)
        x = block.x[token].double()
        a = kept(x, "ffn_in.gate") @ expert.gate.double().T
        h = a / (1 + (-a).exp()) * (kept(x, "ffn_in.up") @ expert.up.double().T)
        output[token] = kept(h, "inter") @ expert.down.double().T * weight[:, None].double()
    return output


@pytest.mark.parametrize("tokens", [[60], [40, 30]])
def test_a_layer_with_masks_that_are_tried_out_is_the_formula(tokens: list[int]) -> None:
    block = random_block(tokens)
    values = block.values(InBlock(MethodSettings()))
    thresholds = {"ffn_in.gate": 0.4, "inter": 0.3}
    parts = {site: {"threshold": torch.tensor([value])} for site, value in thresholds.items()}
    expected = naive_output(block, thresholds)
    torch.testing.assert_close(values.output(parts, 1000).double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values.output({}, 50).double(), naive_output(block, {})[:50], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [[60], [40, 30]])
def test_greedy_shares_are_those_of_a_loop(tokens: list[int]) -> None:
    block = random_block(tokens, seed=1)
    values = block.values(InBlock(MethodSettings()))
    histograms = {site: magnitudes(values, site) for site in IN_BLOCK}
    dense, shares, missing = naive_output(block, {}), dict.fromkeys(IN_BLOCK, 0.0), 0.5 * sum(SIZES.values())
    while missing > 1e-6:
        tried = []
        for site, size in SIZES.items():
            saved = min(0.2 * max(SIZES.values()), missing, (1 - shares[site]) * size)
            if saved < 1e-6:
                continue
            raised = shares | {site: shares[site] + saved / size}
            cuts = {one: histograms[one].quantile(min(1.0, share)) for one, share in raised.items() if share}
            before = {one: histograms[one].quantile(share) for one, share in shares.items() if share}
            error = (naive_output(block, cuts) - dense).norm(dim=1).mean()
            error_before = (naive_output(block, before) - dense).norm(dim=1).mean()
            tried.append((float(error - error_before) / saved, saved, raised))
        _, saved, shares = min(tried, key=lambda one: one[0])
        missing -= saved
    found = greedy_shares(
        values,
        SIZES,
        lambda site, share: {"threshold": torch.tensor([histograms[site].quantile(share)])},
        share=0.5,
        step=0.2,
        num_tokens=1000,
    )
    assert found == pytest.approx(shares, abs=1e-6)
    assert len(set(found.values())) > 1


@settings(max_examples=25)
@given(st.floats(0.0, 0.99), st.floats(0.1, 1.0))
def test_the_layer_has_the_wanted_share_whatever_the_step(share: float, step: float) -> None:
    values = random_block([20]).values(InBlock(MethodSettings()))
    histograms = {site: magnitudes(values, site) for site in IN_BLOCK}
    found = greedy_shares(
        values,
        SIZES,
        lambda site, own: {"threshold": torch.tensor([histograms[site].quantile(own)])},
        share=share,
        step=step,
        num_tokens=10,
    )
    assert all(0 <= own <= 1 for own in found.values())
    dropped = sum(found[site] * size for site, size in SIZES.items())
    assert dropped == pytest.approx(share * sum(SIZES.values()), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("site", IN_BLOCK)
def test_each_threshold_is_the_quantile_of_what_its_projection_reads(site: Any) -> None:
    block, mask = random_block([250, 60]), Teal(TealSettings(target_zeros=0.4))
    sizes = []
    for number in range(2):
        token, _ = block.routes.of(number)
        g, u, _ = block.factors(number)
        sizes += (g * u if site == "inter" else block.x[token]).abs().flatten().tolist()
    (threshold,) = block.fit(mask, site).parts["threshold"].tolist()
    exact = naive_quantile(sizes, 0.4)
    assert exact * 0.9999 <= threshold <= exact * 1.0052
