"""Top-k on the product: the same number of neurons for every token, the largest of its score."""

from __future__ import annotations

from typing import Any

import pytest

from sparsify.methods.topk import TopK, TopKSettings
from tests.methods.blocks import HIDDEN, NEURONS, random_block


@pytest.mark.parametrize("score", ["magnitude", "output_norm"])
@pytest.mark.parametrize("tokens", [[40], [30, 25]])
def test_every_token_keeps_the_largest_by_a_loop(score: Any, tokens: list[int]) -> None:
    block, mask = random_block(tokens), TopK(TopKSettings(target_zeros=0.7, score=score))
    masked = block.masked(mask, {"inter": block.fit(mask, "inter").parts})
    for number, expert in enumerate(masked):
        g, u, _ = block.factors(number)
        down = expert.down.double().tolist()
        norms = [sum(down[d][c] ** 2 for d in range(HIDDEN)) ** 0.5 for c in range(NEURONS)]
        kept = (expert.neurons(block.x[block.routes.of(number)[0]]) != 0).tolist()
        for row, chosen in zip((g * u).tolist(), kept, strict=True):
            scores = [abs(h) * (norms[c] if score == "output_norm" else 1) for c, h in enumerate(row)]
            largest = sorted(range(NEURONS), key=lambda c: -scores[c])[:6]
            assert [c for c in range(NEURONS) if chosen[c]] == sorted(largest)
