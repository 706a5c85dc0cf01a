"""Alarms for layers that die or densify during training, each raised once."""

from __future__ import annotations

import math
from collections.abc import Sequence

DEAD_ZEROS = 0.999
"""A layer with more zeros than this adds almost nothing to the residual stream."""
DENSIFIED_BY = 0.10
"""Absolute drop of a layer's share of zeros below its maximum at which it counts as densifying."""


class LayerAlarms:
    """Checks the zeros of every layer at each measurement. An alarm is repeated only after the layer has recovered."""

    def __init__(self) -> None:
        self._highest: dict[int, float] = {}
        self._raised: set[tuple[int, str]] = set()

    def check(self, layers: Sequence[float]) -> list[str]:
        """Checks one measurement.

        Returns:
            The new alarms, one sentence each.
        """
        alarms = []
        for layer, zeros in enumerate(layers):
            if math.isnan(zeros):
                continue
            highest = max(self._highest.get(layer, 0.0), zeros)
            self._highest[layer] = highest
            states = {
                "dies": (
                    zeros > DEAD_ZEROS,
                    f"layer {layer} dies: {zeros:.2%} of its activations are zero",
                ),
                "densifies": (
                    highest - zeros > DENSIFIED_BY,
                    f"layer {layer} densifies: {zeros:.1%} zeros, down from {highest:.1%}",
                ),
            }
            for state, (holds, sentence) in states.items():
                if holds and (layer, state) not in self._raised:
                    alarms.append(sentence)
                    self._raised.add((layer, state))
                elif not holds:
                    self._raised.discard((layer, state))
        return alarms
