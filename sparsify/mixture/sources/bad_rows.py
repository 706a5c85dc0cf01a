"""Bad rows: rows that cannot become documents. Counted by reason, with examples and an upper limit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pydantic import TypeAdapter

from sparsify.errors import MixtureError
from sparsify.metadata import parse_record

EXAMPLES_PER_REASON = 20
MIN_ROWS = 1_000
"""Rows before the limit is checked while reading; a smaller source is checked at its end."""
SHOWN_EXAMPLES = 3
MAX_DETAIL_CHARACTERS = 300


class Reason(StrEnum):
    NOT_JSON = "not JSON"
    NOT_CSV = "not CSV"
    NOT_AN_OBJECT = "not an object"
    NO_COLUMN = "no such column"
    NULL = "null"
    NOT_TEXT = "not text"
    INVALID_UTF8 = "invalid UTF-8"
    NUL = "NUL characters"
    EMPTY = "empty"
    TOO_LONG = "too long"
    BROKEN_FILE = "broken file"
    UNREADABLE = "unreadable rows"
    BAD_CHAT = "invalid chat"
    TEMPLATE = "template failed"
    CHAT_TEMPLATE = "chat template failed"


HARMLESS = frozenset([Reason.EMPTY])
"""Reasons that do not count towards the limit: an empty row loses nothing, and good data sets have many."""


@dataclass(frozen=True)
class BadRow:
    """One row that was dropped.

    Args:
        file: The file, or the data set's id.
        row: The line in .jsonl, .csv and .tsv; otherwise the row or document, from 1.
    """

    file: str
    row: int
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row} {self.detail}"


@dataclass(frozen=True)
class DuplicateFile:
    file: str
    same_as: str


@dataclass
class BadRows:
    """Counts the good and the bad rows of one source.

    Args:
        max_bad_fraction: Share of bad rows above which the source is refused. One bad row is always allowed, unless
            this is 0.
    """

    source: str
    max_bad_fraction: float
    good_rows: int = 0
    bad_rows: dict[Reason, int] = field(default_factory=dict)
    examples: dict[Reason, list[BadRow]] = field(default_factory=dict)
    duplicate_files: list[DuplicateFile] = field(default_factory=list)
    dropped_turns: dict[str, int] = field(default_factory=dict)
    """Turns of good rows that the chat template does not write, by role; `answer` for those of the assistant."""

    @property
    def num_bad_rows(self) -> int:
        """Bad rows of every reason, including the harmless ones."""
        return sum(self.bad_rows.values())

    def add(self, file: str, reason: Reason, row: int, detail: str, rows: int = 1) -> None:
        """Counts `rows` bad rows, of which `row` is the first.

        Raises:
            MixtureError: If the source exceeds the limit.
        """
        self.bad_rows[reason] = self.bad_rows.get(reason, 0) + rows
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES_PER_REASON:
            # The detail may quote a long row, and undecodable bytes cannot be written as JSON.
            printable = detail[:MAX_DETAIL_CHARACTERS].encode("utf-8", "backslashreplace").decode()
            shown.append(BadRow(file, row, printable))
        if self.good_rows + self.num_bad_rows >= MIN_ROWS:
            self.check()

    def refuse(self, file: str, reason: Reason, row: int, detail: str) -> None:
        """Counts a row as bad that was counted as good before; raises MixtureError if the source exceeds the limit."""
        self.good_rows -= 1
        self.add(file, reason, row, detail)

    def add_dropped_turns(self, turns: Mapping[str, int]) -> None:
        """Counts turns that the chat template does not write."""
        for role, number in turns.items():
            self.dropped_turns[role] = self.dropped_turns.get(role, 0) + number

    def carry_refusals(self, previous: BadRows) -> None:
        """Adds what the chat template refused and dropped of documents that a resumed ingest skips.

        A resumed ingest reads these documents again, and counts every other reason again, but does not encode them.
        """
        self.add_dropped_turns(previous.dropped_turns)
        reason = Reason.CHAT_TEMPLATE
        if reason in previous.bad_rows:
            self.bad_rows[reason] = previous.bad_rows[reason]
            self.examples[reason] = list(previous.examples[reason])
            self.good_rows -= previous.bad_rows[reason]

    def check(self) -> None:
        """Raises MixtureError, with the counts and examples of each reason, if the source has too many bad rows."""
        harmful = sum(rows for reason, rows in self.bad_rows.items() if reason not in HARMLESS)
        allowed = self.max_bad_fraction * (self.good_rows + harmful)
        if self.max_bad_fraction > 0:
            allowed = max(allowed, 1)
        if harmful > allowed:
            raise MixtureError(
                f"Source {self.source!r}: {harmful:,} of its first {self.good_rows + harmful:,} rows are bad:\n"
                + "\n".join(self.lines()),
                allowed=f"Allowed: mixture.max_bad_fraction={self.max_bad_fraction:g} of the rows.",
                next_step="Fix these rows, correct the columns of the source, or raise mixture.max_bad_fraction.",
            )

    def lines(self) -> Iterator[str]:
        """Counts and first examples of each reason, the most frequent first."""
        for reason, rows in self._by_count():
            shown = self.examples[reason][:SHOWN_EXAMPLES]
            yield f"  {reason} ({rows:,}):"
            yield from (f"    {example}" for example in shown)

    def summary(self) -> str:
        """One line: number of rows, and how many were dropped for which reason."""
        text = f"{self.source}: {self.good_rows + self.num_bad_rows:,} rows"
        if self.bad_rows:
            reasons = ", ".join(f"{rows:,} {reason}" for reason, rows in self._by_count())
            text += f", {self.num_bad_rows:,} dropped ({reasons})"
        if self.dropped_turns:
            turns = ", ".join(f"{number:,} {role}" for role, number in sorted(self.dropped_turns.items()))
            text += f", turns that the chat template drops: {turns}"
        if self.duplicate_files:
            text += f", {len(self.duplicate_files):,} duplicate file(s) skipped"
        return text

    def to_json(self) -> str:
        return _ADAPTER.dump_json(self, indent=2).decode()

    @staticmethod
    def from_json(text: str | bytes) -> BadRows:
        """Reads the output of `to_json`.

        Raises:
            ValueError: If the text is not such output.
        """
        return parse_record(text, BadRows)

    def _by_count(self) -> list[tuple[Reason, int]]:
        return sorted(self.bad_rows.items(), key=lambda item: (-item[1], item[0]))


_ADAPTER = TypeAdapter(BadRows)
