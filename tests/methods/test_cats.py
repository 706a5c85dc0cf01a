"""CATS: one quantile of |g| for a layer, whatever the expert."""

from __future__ import annotations

import pytest

from sparsify.methods.cats import Cats
from sparsify.methods.pooled import ZerosSettings
from tests.methods.blocks import naive_quantile, random_block


@pytest.mark.parametrize("tokens", [[300], [300, 40, 0, 120]])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_threshold_is_the_quantile_of_the_gates_of_all_experts(tokens: list[int], share: float) -> None:
    block, mask = random_block(tokens), Cats(ZerosSettings(target_zeros=share))
    sizes = [abs(float(g)) for number in range(len(tokens)) for row in block.factors(number)[0] for g in row]
    (threshold,) = block.fit(mask, "gate").parts["threshold"].tolist()
    exact = naive_quantile(sizes, share)
    assert exact <= threshold <= exact * 1.0051
