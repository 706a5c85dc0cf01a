"""What a model's routers of groups do on a text: how many groups are on, and how decided their scores are."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import torch

from sparsify.models import SparseModel, site_rules
from sparsify.models.group_router import GroupRouter
from sparsify.models.masking import GROUP
from sparsify.sparsity.schema import GATE_BINS, RouterRow

UNDECIDED = 0.1
"""Distance of sigmoid(score) from the threshold within which a group counts as undecided."""


class RouterReader:
    """Context manager that counts what the routers of groups say in every forward pass; nothing in a model without."""

    def __init__(self, model: SparseModel) -> None:
        self._model = model
        layers = len(model.ffn_blocks())
        # Rows, rows without any group, groups, groups on, groups undecided.
        self._counts = torch.zeros(layers, 5, dtype=torch.int64)
        self._gates = torch.zeros(layers, GATE_BINS, dtype=torch.int64)
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        if GROUP in site_rules(self._model.config):
            for layer, block in enumerate(self._model.ffn_blocks()):
                self._handles.append(block.group_router.register_forward_hook(partial(self._take, layer)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def rows(self) -> list[RouterRow]:
        """One row for each layer; empty without routers."""
        found = []
        for layer, (counts, gates) in enumerate(zip(self._counts.tolist(), self._gates.double(), strict=True)):
            rows, empty, groups, on, undecided = counts
            if groups:
                shares = (gates / groups).tolist()
                found.append(
                    RouterRow(
                        layer=layer,
                        active=on / groups,
                        undecided=undecided / groups,
                        empty_tokens=empty / rows,
                        gates=shares,
                    )
                )
        return found

    @torch.no_grad()
    def _take(self, layer: int, router: GroupRouter, _: object, scores: torch.Tensor) -> None:
        scores = scores.flatten(0, -2)
        on, gates = router.kept(scores), scores.sigmoid()
        near = torch.zeros_like(on)
        if router.rule.rule == "router":
            near = (gates - router.threshold.to(gates.dtype)).abs() < UNDECIDED
        counts = [len(scores), (~on.any(-1)).sum(), on.numel(), on.sum(), near.sum()]
        self._counts[layer] += torch.tensor([int(count) for count in counts])
        bins = (gates * GATE_BINS).long().clamp_(0, GATE_BINS - 1)
        self._gates[layer] += torch.bincount(bins.flatten(), minlength=GATE_BINS).cpu()
