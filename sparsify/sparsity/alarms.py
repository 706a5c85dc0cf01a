"""Alarms for a layer that dies or densifies during training, each said once."""

from __future__ import annotations

import math
from collections.abc import Sequence

DEAD_ZEROS = 0.999
"""A layer with more zeros than this adds next to nothing to the residual stream."""
DENSIFIED_BY = 0.10
"""A layer that has lost this share of zeros since its highest, as an absolute difference, is on its way back to dense."""


class LayerAlarms:
    """Watches the zeros of every layer from one measurement to the next.

    A layer is named again only after it has recovered from what it was named for.
    """

    def __init__(self) -> None:
        self._highest: dict[int, float] = {}
        self._named: set[tuple[int, str]] = set()

    def check(self, layers: Sequence[float]) -> list[str]:
        """Takes in one measurement.

        Args:
            layers: Share of zero products of every layer, 0 to 1.

        Returns:
            One sentence for each layer that is in a state that it has not been named for.
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
                if holds and (layer, state) not in self._named:
                    alarms.append(sentence)
                    self._named.add((layer, state))
                elif not holds:
                    self._named.discard((layer, state))
        return alarms
