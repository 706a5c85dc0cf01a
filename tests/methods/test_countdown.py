"""M-COUNTDOWN: one quantile of |u| for a layer."""

from __future__ import annotations

import pytest

from sparsify.methods.countdown import Countdown
from sparsify.methods.pooled import ZerosSettings
from tests.methods.blocks import naive_quantile, random_block


@pytest.mark.parametrize("tokens", [[300], [200, 90]])
def test_the_threshold_is_the_quantile_of_the_up_factors(tokens: list[int]) -> None:
    block, mask = random_block(tokens), Countdown(ZerosSettings(target_zeros=0.6))
    sizes = [abs(float(u)) for number in range(len(tokens)) for row in block.factors(number)[1] for u in row]
    (threshold,) = block.fit(mask, "up").parts["threshold"].tolist()
    exact = naive_quantile(sizes, 0.6)
    assert exact <= threshold <= exact * 1.0051
    assert list(mask.sites) == ["up"]
