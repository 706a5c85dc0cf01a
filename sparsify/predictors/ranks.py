"""Which rank each block's predictor gets, within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsify.errors import RunError
from sparsify.predictors.format import Block

RANK_MULTIPLE = 32
"""Rows of a multiple of 32 can be quantised in blocks of 32, as every GGUF type needs it."""
RANK_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


def candidate_ranks(hidden: int) -> list[int]:
    """Ranks to try: shares of the hidden size in multiples of RANK_MULTIPLE."""
    ranks = (round(hidden * share / RANK_MULTIPLE) * RANK_MULTIPLE for share in RANK_SHARES)
    return sorted({max(RANK_MULTIPLE, rank) for rank in ranks})


@dataclass(frozen=True)
class Choice:
    """What one rank costs one block.

    Attributes:
        rank: The rank.
        predictor: Parameters of the predictor.
        read: Parameters that a token reads on average: the predictor's, and those of the neurons that are switched on.
    """

    rank: int
    predictor: int
    read: float


def choose_ranks(choices: Mapping[Block, list[Choice]], budget: int) -> dict[Block, int]:
    """The ranks that read least, as far as all predictors together stay within the budget.

    From every block's best rank it steps down where a parameter that is saved costs the least reading.

    Args:
        choices: What each rank costs, of every block.
        budget: Parameters that all predictors may have together.

    Raises:
        RunError: If the smallest ranks exceed the budget already.
    """
    ladders: dict[Block, list[Choice]] = {}
    for block, options in choices.items():
        best = min(options, key=lambda option: (option.read, option.predictor))
        smaller = [option for option in options if option.predictor <= best.predictor]
        ladders[block] = sorted(smaller, key=lambda option: option.predictor)
    smallest = sum(ladder[0].predictor for ladder in ladders.values())
    if smallest > budget:
        raise RunError(
            f"Predictors of the smallest ranks have {smallest:,} parameters together, more than the budget of {budget:,}.",
            next_step="Raise --budget-share, or give a smaller --rank.",
        )
    while sum(ladder[-1].predictor for ladder in ladders.values()) > budget:
        block = min(
            (block for block, ladder in ladders.items() if len(ladder) > 1),
            key=lambda block: (
                (ladders[block][-2].read - ladders[block][-1].read)
                / (ladders[block][-1].predictor - ladders[block][-2].predictor)
            ),
        )
        ladders[block].pop()
    return {block: ladder[-1].rank for block, ladder in ladders.items()}
