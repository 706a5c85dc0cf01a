"""Types of the commands' numbers: each has bounds, and refuses what is outside them before any work begins."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import typer

from sparsify.errors import RecipeError, bound

MOST_CHARACTERS = 30


class Bounded:
    """An integer or a finite number within bounds.

    Args:
        kind: int or float.
        least: Smallest allowed value.
        most: Largest allowed value.
        open_below: Whether `least` itself is not allowed.
        also: Other values that are allowed.
    """

    def __init__(
        self,
        kind: type[int | float],
        least: float,
        most: float,
        *,
        open_below: bool = False,
        also: Sequence[float] = (),
    ) -> None:
        self.kind, self.least, self.most, self.open_below, self.also = kind, least, most, open_below, also

    @property
    def words(self) -> str:
        """What is allowed, as a phrase."""
        also = "".join(f"{bound(one)}, or " for one in self.also)
        what = "integers" if self.kind is int else "numbers"
        least = f"{'above' if self.open_below else 'from'} {bound(self.least)}"
        return f"{also}{what} {least} to {bound(self.most)}"

    def parse(self, option: str, text: Any) -> Any:
        """The number that a text says. Raises RecipeError, naming the option, if it is not one within the bounds."""
        try:
            value = self.kind(text if not isinstance(text, str) or len(text) <= MOST_CHARACTERS else "too long")
        except (ValueError, OverflowError):
            value = math.nan
        if value in self.also:
            return value
        inside = self.least < value <= self.most if self.open_below else self.least <= value <= self.most
        if not inside:
            raise RecipeError(f"{option} is {str(text)[:MOST_CHARACTERS]!r}.", allowed=f"Allowed: {self.words}.")
        return value

    def parse_list(self, option: str, text: str) -> list[Any]:
        """The comma-separated numbers of a text; an empty list if there are none."""
        return [self.parse(option, part.strip()) for part in text.split(",")] if text.strip() else []

    def check(self, param: typer.CallbackParam, value: Any) -> Any:
        """Callback of an option: refuses a value that is outside the bounds. Raises RecipeError."""
        option = max(param.opts, key=len)
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None:
                self.parse(option, one)
        return value


MOST_TOKENS = 10**15
"""More than any corpus has, and few enough that sums of positions stay below 64 bits."""
TOKENS = Bounded(int, 1, MOST_TOKENS)
TOKENS_OR_NONE = Bounded(int, 0, MOST_TOKENS)
NEW_TOKENS = Bounded(int, 1, 10_000_000)
SEQUENCE_LENGTH = Bounded(int, 2, 1 << 24)
COUNT = Bounded(int, 1, 10_000_000)
TRIALS = Bounded(int, 2, 100_000)
REPEATS = Bounded(int, 1, 1_000_000)
BATCH = Bounded(int, 1, 65_536)
PROCESSES = Bounded(int, 1, 1024)
THREADS = Bounded(int, 1, max(256, os.cpu_count() or 1))
WIDTH = Bounded(int, 1, 1 << 20)
LAYERS_OR_NONE = Bounded(int, 0, 10_000)
SEED = Bounded(int, 0, 2**32 - 1)
THROUGHPUT = Bounded(float, 0.0, 1e12, open_below=True)
PRICE = Bounded(float, 0.0, 1e6, open_below=True)
MEMORY_GB = Bounded(float, 0.001, 1e6)
MEMORY_GB_OR_NONE = Bounded(float, 0.0, 1e6)
GATE_THRESHOLD = Bounded(float, 0.0, 1e6)
SHARE = Bounded(float, 0.0, 1.0)
DENSITY = Bounded(float, 0.0, 1.0, open_below=True)
SHARE_BELOW_ONE = Bounded(float, 0.0, 0.9999)
SHARE_INSIDE = Bounded(float, 0.0001, 0.9999)
SIZE_SHARE = Bounded(float, 0.0, 100.0, open_below=True)
LEARNING_RATE = Bounded(float, 0.0, 10.0, open_below=True)
TEMPERATURE = Bounded(float, 0.001, 1000.0, also=(0,))
NATS = Bounded(float, 0.0, 1000.0)
SCORE = Bounded(float, -1e6, 1e6)
