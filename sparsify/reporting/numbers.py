"""Formatting of shares and large counts."""

from __future__ import annotations

import math


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal; only an exact 0 or 1 gives 0% or 100%, and None gives a dash."""
    if share is None or math.isnan(share):
        return "–"
    if share in (0, 1):
        return f"{share:.0%}"
    rounded = f"{share:.1%}"
    return {"0.0%": "<0.1%", "100.0%": ">99.9%"}.get(rounded, rounded)


def share(value: float | None) -> str:
    """A measured share with one decimal whatever it is, 0.0% too; None reads as a dash."""
    return "–" if value is None else f"{value:.1%}"


def count(number: float) -> str:
    """A count of parameters: 2.17B, 3.1M, 812."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.{2 if unit == 'B' else 1}f}{unit}"
    return f"{number:,.0f}"
