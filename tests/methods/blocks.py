"""A feed-forward block with random weights, and everything that calibration sees of it in float64, for tests of formulas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from sparsify.methods.base import Fitted, Mask
from sparsify.methods.layer_expert import Expert, Routes
from sparsify.methods.layerwise import Inputs
from sparsify.methods.sites import BlockValues, with_masks
from sparsify.models import FfnActivation

HIDDEN, NEURONS = 12, 20


@dataclass(frozen=True)
class Block:
    """A block of SwiGLU experts, and the tokens that reach it.

    Attributes:
        x: [tokens, hidden].
    """

    experts: list[Expert]
    x: torch.Tensor
    routes: Routes

    def values(self, mask: Mask) -> BlockValues:
        return BlockValues(self.experts, self._inputs, mask.sites)

    def fit(self, mask: Mask, site: str) -> Fitted:
        return mask.fit(site, self.values(mask))

    def masked(self, mask: Mask, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> list[Expert]:
        return with_masks(self.experts, mask.sites, parts)

    def factors(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate factor and up factor [rows, neurons] of the tokens of an expert, and the router's weights [rows], in float64."""
        token, weight = self.routes.of(number)
        x, expert = self.x[token].double(), self.experts[number]
        a = x @ expert.gate.double().T
        return a / (1 + (-a).exp()), x @ expert.up.double().T, weight.double()

    def _inputs(self) -> Iterator[Inputs]:
        half = len(self.x) // 2
        for part in (slice(0, half), slice(half, None)):
            x = self.x[part]
            every = torch.ones(len(x), dtype=torch.bool)
            yield Inputs(x, Routes(self.routes.experts[part], self.routes.weights[part]), 0 * x, every, ~every)


def random_block(tokens_of_experts: list[int], seed: int = 0) -> Block:
    """A block whose experts get so many tokens each, one expert a token; one expert is a dense block.

    Neurons differ in size, as they do in models.
    """
    torch.manual_seed(seed)
    experts = []
    for _ in tokens_of_experts:
        sizes = torch.rand(NEURONS, 1) + 0.1
        gate, up = torch.randn(NEURONS, HIDDEN), torch.randn(NEURONS, HIDDEN) * sizes
        experts.append(Expert(gate, up, torch.randn(HIDDEN, NEURONS), FfnActivation("swiglu")))
    number = torch.arange(len(experts)).repeat_interleave(torch.tensor(tokens_of_experts))[:, None]
    number = number[torch.randperm(len(number))]
    weights = torch.rand(len(number), 1) * 0.8 + 0.2 if len(experts) > 1 else torch.ones(len(number), 1)
    return Block(experts, torch.randn(len(number), HIDDEN), Routes(number, weights))


def naive_quantile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    wanted = share * len(ordered)
    return next(value for count, value in enumerate(ordered, 1) if count >= wanted)
