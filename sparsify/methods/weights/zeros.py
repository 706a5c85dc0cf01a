"""Which weights of a matrix become zero, given how much each one matters: a share of them, or N of every M that stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch

OLD = -1.0
"""Score of a weight that is zero already: below every other one, so that a mask is extended and never loosened."""


@dataclass(frozen=True)
class ZeroPattern:
    """How many weights become zero, and among which they are chosen.

    Attributes:
        share: Of all weights.
        kept: Of every `group` consecutive weights of a row, how many stay; None where zeros may be anywhere.
        group: Weights of a group.
    """

    share: float
    kept: int | None = None
    group: int = 1

    @property
    def words(self) -> str:
        return f"{self.share:.0%}" if self.kept is None else f"{self.kept}:{self.group}"

    def in_groups(self, scores: torch.Tensor) -> torch.Tensor:
        """The zeros of whole groups, bool of the shape of the scores, [rows, columns]: in each the least scores."""
        assert self.kept is not None
        assert scores.shape[1] % self.group == 0, f"{scores.shape[1]} columns in groups of {self.group}"
        return lowest_in_rows(scores.reshape(-1, self.group), self.group - self.kept).view_as(scores)

    def in_rows(self, scores: torch.Tensor) -> torch.Tensor:
        """The zeros if every row gets the same share, rounded down; bool [rows, columns]."""
        if self.kept is not None:
            return self.in_groups(scores)
        return lowest_in_rows(scores, int(scores.shape[1] * self.share))

    def anywhere(self, scores: torch.Tensor) -> torch.Tensor:
        """The zeros if the share is of all these weights together, rounded down; bool [rows, columns]."""
        if self.kept is not None:
            return self.in_groups(scores)
        flat = scores.reshape(1, -1)
        return lowest_in_rows(flat, int(flat.shape[1] * self.share)).view_as(scores)


def parse_pattern(text: str, share: float) -> ZeroPattern:
    """A pattern from its name: `unstructured`, or N:M.

    Raises:
        ValueError: If it is not a pattern, or has another share of zeros.
    """
    if text == "unstructured":
        return ZeroPattern(share)
    kept, colon, group = text.partition(":")
    if not (colon and kept.isdecimal() and group.isdecimal() and 0 < int(kept) < int(group) <= 32):
        raise ValueError(f"it is {text!r}")
    zeros = 1 - int(kept) / int(group)
    if abs(zeros - share) > 1e-6:
        raise ValueError(f"{text} makes {zeros:g} of the weights zero, and weight_sparsity is {share:g}")
    return ZeroPattern(zeros, int(kept), int(group))


def lowest_in_rows(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Bool of the shape of scores [rows, columns]: the so many lowest of each row, of equal ones the first."""
    lowest = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)


def share_of_zeros(weight: torch.Tensor) -> float:
    return float((weight == 0).double().mean())
