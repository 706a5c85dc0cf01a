"""Rows that could not become documents: counted by reason, shown by example, and never more than a mixture allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from pydantic import TypeAdapter

from sparsify.errors import MixtureError

EXAMPLES_PER_REASON = 20
MIN_ROWS = 1_000
"""Rows after which a source is stopped in the middle; a smaller one is judged at its end."""
SHOWN_EXAMPLES = 3
MAX_DETAIL_CHARACTERS = 300


class Reason(StrEnum):
    """Why a row is left out."""

    NOT_JSON = "not JSON"
    NOT_CSV = "not CSV"
    NOT_AN_OBJECT = "not an object"
    NO_COLUMN = "no such column"
    NULL = "null"
    NOT_TEXT = "not text"
    INVALID_UTF8 = "invalid UTF-8"
    EMPTY = "empty"
    TOO_LONG = "too long"
    BROKEN_FILE = "broken file"
    UNREADABLE = "unreadable rows"
    BAD_CHAT = "no valid chat"
    TEMPLATE = "template failed"
    CHAT_TEMPLATE = "chat template failed"


HARMLESS = frozenset([Reason.EMPTY])
"""Counted and shown, but never too many: leaving out nothing loses nothing, and good data sets have much of it."""


@dataclass(frozen=True)
class BadRow:
    """One row that was left out.

    Args:
        file: The file, or the data set's id.
        row: The line in .jsonl, .csv and .tsv, else the row or document, from 1.
        detail: What is wrong with it.
    """

    file: str
    row: int
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row} {self.detail}"


@dataclass(frozen=True)
class DuplicateFile:
    """A file that was left out because another one has the same content."""

    file: str
    same_as: str


@dataclass
class BadRows:
    """Counts the good and the bad rows of one source.

    Args:
        source: The source's name, for messages.
        max_bad_fraction: Share of bad rows above which the source is refused. One bad row is always allowed, unless
            this is 0.
    """

    source: str
    max_bad_fraction: float
    good_rows: int = 0
    bad_rows: dict[Reason, int] = field(default_factory=dict)
    examples: dict[Reason, list[BadRow]] = field(default_factory=dict)
    duplicate_files: list[DuplicateFile] = field(default_factory=list)

    @property
    def num_bad_rows(self) -> int:
        """Bad rows of every reason, harmless ones too."""
        return sum(self.bad_rows.values())

    def add(self, file: str, reason: Reason, row: int, detail: str, rows: int = 1) -> None:
        """Counts `rows` bad rows, of which `row` is the first.

        Raises:
            MixtureError: If there are too many by now.
        """
        self.bad_rows[reason] = self.bad_rows.get(reason, 0) + rows
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES_PER_REASON:
            # A row may quote half a file; undecodable bytes cannot be written as JSON.
            printable = detail[:MAX_DETAIL_CHARACTERS].encode("utf-8", "backslashreplace").decode()
            shown.append(BadRow(file, row, printable))
        if self.good_rows + self.num_bad_rows >= MIN_ROWS:
            self.check()

    def refuse(self, file: str, reason: Reason, row: int, detail: str) -> None:
        """Counts a row as bad that was counted as good before.

        Raises:
            MixtureError: If there are too many by now.
        """
        self.good_rows -= 1
        self.add(file, reason, row, detail)

    def carry_refusals(self, previous: BadRows) -> None:
        """Takes over what the chat template refused among documents that are now skipped.

        An ingest that goes on reads them again, and so counts everything else again, but does not encode them.
        """
        reason = Reason.CHAT_TEMPLATE
        if reason in previous.bad_rows:
            self.bad_rows[reason] = previous.bad_rows[reason]
            self.examples[reason] = list(previous.examples[reason])
            self.good_rows -= previous.bad_rows[reason]

    def check(self) -> None:
        """Refuses a source with too many bad rows.

        Raises:
            MixtureError: With the counts and examples of each reason.
        """
        harmful = sum(rows for reason, rows in self.bad_rows.items() if reason not in HARMLESS)
        allowed = self.max_bad_fraction * (self.good_rows + harmful)
        if self.max_bad_fraction > 0:
            allowed = max(allowed, 1)
        if harmful > allowed:
            raise MixtureError(
                f"Source {self.source!r}: {harmful:,} of its first {self.good_rows + harmful:,} rows are bad:\n"
                + "\n".join(self.lines()),
                allowed=f"Allowed: mixture.max_bad_fraction={self.max_bad_fraction:g} of the rows.",
                next_step="Mend these rows, correct the columns of the source, or raise mixture.max_bad_fraction.",
            )

    def lines(self) -> Iterator[str]:
        """Counts and first examples of each reason, the most frequent first."""
        for reason, rows in self._by_count():
            shown = self.examples[reason][:SHOWN_EXAMPLES]
            yield f"  {reason} ({rows:,}):"
            yield from (f"    {example}" for example in shown)

    def merge(self, other: BadRows) -> None:
        """Adds what another reader of the same source counted."""
        self.good_rows += other.good_rows
        for reason, rows in other.bad_rows.items():
            self.bad_rows[reason] = self.bad_rows.get(reason, 0) + rows
            both = self.examples.get(reason, []) + other.examples[reason]
            self.examples[reason] = both[:EXAMPLES_PER_REASON]
        self.duplicate_files += [f for f in other.duplicate_files if f not in self.duplicate_files]

    def summary(self) -> str:
        """One line: rows, and what was left out of them and why."""
        text = f"{self.source}: {self.good_rows + self.num_bad_rows:,} rows"
        if self.bad_rows:
            reasons = ", ".join(f"{rows:,} {reason}" for reason, rows in self._by_count())
            text += f", {self.num_bad_rows:,} left out ({reasons})"
        if self.duplicate_files:
            text += f", {len(self.duplicate_files):,} duplicate file(s) left out"
        return text

    def to_json(self) -> str:
        """Everything, as JSON that a person can read."""
        return _ADAPTER.dump_json(self, indent=2).decode()

    @staticmethod
    def from_json(text: str | bytes) -> BadRows:
        """Reads what `to_json` wrote.

        Raises:
            pydantic.ValidationError: If it did not.
        """
        return _ADAPTER.validate_json(text)

    def _by_count(self) -> list[tuple[Reason, int]]:
        return sorted(self.bad_rows.items(), key=lambda item: (-item[1], item[0]))


_ADAPTER = TypeAdapter(BadRows)
