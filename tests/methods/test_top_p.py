"""Top-p: one mass for a layer, with which its tokens have the wanted zeros on average."""

from __future__ import annotations

from typing import Any

import pytest

from sparsify.methods.top_p import TopP, TopPSettings
from tests.methods.blocks import NEURONS, random_block


@pytest.mark.parametrize("tokens", [[300], [200, 130]])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.9])
def test_the_mass_gives_the_wanted_zeros_and_each_token_keeps_the_fewest(tokens: list[int], share: float) -> None:
    block, mask = random_block(tokens), TopP(TopPSettings(target_zeros=share))
    parts = block.fit(mask, "inter").parts
    mass = 1 - float(parts["dropped_mass"])
    kept = dropped = 0
    for number, expert in enumerate(block.masked(mask, {"inter": parts})):
        g, u, _ = block.factors(number)
        chosen = (expert.neurons(block.x[block.routes.of(number)[0]]) != 0).tolist()
        for row, own in zip((g * u).abs().tolist(), chosen, strict=True):
            taken = [h for h, one in zip(row, own, strict=True) if one]
            assert sum(taken) >= mass * sum(row) * 0.9999
            assert sum(taken) - min(taken) <= mass * sum(row) * 1.0001
            kept += len(taken)
            dropped += NEURONS - len(taken)
    assert dropped / (kept + dropped) == pytest.approx(share, abs=0.002)


def test_every_token_keeps_its_largest_neuron() -> None:
    block, mask = random_block([300]), TopP(TopPSettings(target_zeros=0.99))
    (expert,) = block.masked(mask, {"inter": block.fit(mask, "inter").parts})
    assert (expert.neurons(block.x) != 0).any(-1).all()


@pytest.mark.parametrize("site", ["gate", "up", "ffn_in"])
def test_other_sites_have_the_wanted_zeros_too(site: Any) -> None:
    block, mask = random_block([300]), TopP(TopPSettings(target_zeros=0.5, site=site))
    (expert,) = block.masked(mask, {site: block.fit(mask, site).parts})
    gate, up = block.x @ expert.gate.T, block.x @ expert.up.T
    masked = {
        "gate": lambda: expert.activation.masked_gate(gate),
        "up": lambda: expert.activation.masked_up(up),
        "ffn_in": lambda: expert.input_mask(block.x) if expert.input_mask else block.x,
    }[site]()
    assert float((masked == 0).float().mean()) == pytest.approx(0.5, abs=0.002)
