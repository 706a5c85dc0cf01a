"""Neurons shared by consecutive tokens: unions over chunks, reuse from token to token, co-activation.

Exact integer counts, like ActivationStatistics: they do not depend on how sequences are batched.
Only adjacent tokens of one document are consecutive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch

from sparsify.sparsity.probe import Tokens
from sparsify.sparsity.statistics import count_rows

CHUNK_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
PIECE_TOKENS = 1024
"""Tokens processed at once, so that memory does not grow with the batch; a multiple of the longest chunk."""
REUSE_TOKENS = (1, 2, 3, 4, 5)
"""How many tokens back a firing counts as reuse."""
SAMPLED_NEURONS = 512
"""Neurons of a layer whose pairs are counted: all pairs of 14,336 neurons would need 1.6 GB a layer."""


@dataclass(frozen=True)
class ConsecutiveStatistics:
    """Counts over consecutive tokens. All tensors are int64 on the CPU.

    Attributes:
        chunks: Whole chunks of each length of CHUNK_TOKENS, cut from the sequence's start, [lengths].
        chunk_fired: Neurons that fired on any token of a chunk, summed over chunks, [layers, lengths].
        fired: Neurons that fired on a token that has five tokens before it, summed over tokens, [layers].
        reused: Those of them that fired on at least one of the 1 to 5 tokens before, [layers, 5].
        together: Tokens on which two sampled neurons of an expert both fired, [layers, experts, sample, sample]; the
            diagonal holds the tokens on which one fired.
        routed: Tokens that each expert computed, [layers, experts].
    """

    chunks: torch.Tensor
    chunk_fired: torch.Tensor
    fired: torch.Tensor
    reused: torch.Tensor
    together: torch.Tensor
    routed: torch.Tensor

    @classmethod
    def empty(cls, num_layers: int, num_experts: int, num_neurons: int) -> Self:
        sample = len(sampled_neurons(num_neurons, num_experts))
        shapes = (
            (len(CHUNK_TOKENS),),
            (num_layers, len(CHUNK_TOKENS)),
            (num_layers,),
            (num_layers, len(REUSE_TOKENS)),
            (num_layers, num_experts, sample, sample),
            (num_layers, num_experts),
        )
        return cls(*(torch.zeros(shape, dtype=torch.int64) for shape in shapes))

    def chunk_unions(self, layer_neurons: int) -> list[tuple[int, float]]:
        """Number of chunks of each length, and the mean share of all neurons that fired in one; NaN without chunks."""
        values = self.chunks * len(self.chunk_fired) * layer_neurons
        shares = self.chunk_fired.sum(0).double() / values
        return list(zip(self.chunks.tolist(), shares.tolist(), strict=True))

    def reuse(self) -> list[float]:
        """Share of firing neurons that also fired on one of the 1 to 5 tokens before; NaN if no token was counted."""
        return (self.reused.sum(0).double() / self.fired.sum()).tolist()

    def coactivation_gap(self) -> tuple[float, float]:
        """How much more often a neuron's most frequent partner fires with it than its average partner.

        The co-activation of neuron i with j is the share of i's firings on which j fires too; the gap is the highest of
        these minus their mean (ReLU² Wins, arXiv 2402.03804), averaged over sampled neurons that fired.

        Returns:
            The gap, and the gap of independent neurons with the same firing rates; NaN if none fired.
        """
        together = self.together.double()
        fired = together.diagonal(dim1=-2, dim2=-1)
        sample = fired.shape[-1]
        if sample < 2 or not fired.any():
            return float("nan"), float("nan")
        given = together / fired.unsqueeze(-1)
        rates = fired / self.routed.unsqueeze(-1)
        alone = rates.unsqueeze(-2).expand_as(given)
        itself = torch.eye(sample, dtype=torch.bool)
        gaps = []
        for values in (given, alone):
            others = values.masked_fill(itself, 0)
            gaps.append(others.amax(-1) - others.sum(-1) / (sample - 1))
        together_gap, alone_gap = (float(gap[fired > 0].mean()) for gap in gaps)
        return together_gap, alone_gap


class ConsecutiveObserver:
    def __init__(self, num_layers: int, num_experts: int, num_neurons: int) -> None:
        self.statistics = ConsecutiveStatistics.empty(num_layers, num_experts, num_neurons)
        self._sample = sampled_neurons(num_neurons, num_experts)
        self._chunk_counts: list[torch.Tensor] = []
        self._reuse_counts = torch.empty(0)

    def begin(self, tokens: Tokens) -> None:
        counted = tokens.counted
        follows = torch.zeros_like(counted)
        follows[:, 1:] = (tokens.positions[:, 1:] == tokens.positions[:, :-1] + 1) & (counted[:, 1:] & counted[:, :-1])
        self._chunk_counts = []
        for index, length in enumerate(CHUNK_TOKENS):
            whole = counted.shape[1] // length
            inside = follows[:, : whole * length].unflatten(1, (whole, length))[..., 1:].all(-1)
            counts = inside & counted[:, : whole * length : length]
            self._chunk_counts.append(counts)
            self.statistics.chunks[index] += counts.sum().cpu()
        back = REUSE_TOKENS[-1]
        runs = follows.unfold(1, back, 1).all(-1) if follows.shape[1] > back else follows[:, :0]
        self._reuse_counts = runs[:, 1:]

    def add(self, layer: int, expert: int, tokens: torch.Tensor, block: Any, product: torch.Tensor) -> None:
        """Counts one block, a piece of the tokens at a time; the counts of a layer's experts add up."""
        batch, length = self._chunk_counts[0].shape
        self.statistics.routed[layer, expert] += len(tokens)
        sequences = max(1, PIECE_TOKENS // max(length, 1))
        back = REUSE_TOKENS[-1]
        for first in range(0, batch, sequences):
            some = slice(first, min(first + sequences, batch))
            for start in range(0, length, PIECE_TOKENS):
                # A piece starts with the last tokens of the piece before, which `_add_reuse` needs.
                before = min(start, back)
                piece = slice(start, min(start + PIECE_TOKENS, length))
                low = some.start * length + piece.start - before
                high = (some.stop - 1) * length + piece.stop
                low_row, high_row = torch.searchsorted(tokens, torch.tensor([low, high], device=tokens.device)).tolist()
                inside = tokens[low_row:high_row] - low
                fired = product.new_zeros(high - low, product.shape[1], dtype=torch.bool)
                fired[inside] = product[low_row:high_row].bool()
                self._add_pairs(layer, expert, fired[inside[inside >= before]])
                fired = fired.view(some.stop - some.start, -1, product.shape[1])
                self._add_reuse(layer, fired, some, piece)
                self._add_chunks(layer, fired[:, before:], some, piece)

    def _add_pairs(self, layer: int, expert: int, fired: torch.Tensor) -> None:
        sampled = fired[:, self._sample.to(fired.device)].float()
        self.statistics.together[layer, expert] += (sampled.T @ sampled).cpu().long()

    def _add_chunks(self, layer: int, fired: torch.Tensor, sequences: slice, tokens: slice) -> None:
        union = fired
        for index, (size, counts) in enumerate(zip(CHUNK_TOKENS, self._chunk_counts, strict=True)):
            if index:
                even = union.shape[1] // 2 * 2
                union = union[:, 0:even:2] | union[:, 1:even:2]
            counted = counts[sequences, tokens.start // size : tokens.stop // size]
            self.statistics.chunk_fired[layer, index] += _firings(union, counted)

    def _add_reuse(self, layer: int, fired: torch.Tensor, sequences: slice, tokens: slice) -> None:
        back, length = REUSE_TOKENS[-1], fired.shape[1]
        if length <= back:
            return
        counted = self._reuse_counts[sequences, max(tokens.start, back) - back : tokens.stop - back]
        now = fired[:, back:]
        self.statistics.fired[layer] += _firings(now, counted)
        before = torch.zeros_like(now)
        for index, distance in enumerate(REUSE_TOKENS):
            before |= fired[:, back - distance : length - distance]
            self.statistics.reused[layer, index] += _firings(now & before, counted)


def _firings(fired: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Number of firings [sequences, tokens, neurons] on the counted tokens [sequences, tokens]; a scalar on the CPU."""
    by_token = count_rows(fired.flatten(0, 1)).view(fired.shape[:2])
    return (by_token * counted.to(fired.device)).sum().cpu()


def sampled_neurons(num_neurons: int, num_experts: int) -> torch.Tensor:
    """Evenly spaced neurons of every expert, at most SAMPLED_NEURONS of a layer, [sample]."""
    sample = min(num_neurons, max(2, SAMPLED_NEURONS // num_experts))
    return torch.linspace(0, num_neurons - 1, sample).long()
