"""Marks in the turns of a conversation, which show where a chat template writes them.

A mark is a character of a private Unicode plane at the begin or the end of a turn's text. A template copies
it with the text, whatever it does to the order of the turns, and the text without marks must be the one that the
template writes without them. So a place is known, not guessed from a text that may occur twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsify.mixture.sources.documents import REASONING_KEYS, Message

CharacterSpan = tuple[int, int]
"""Index of the first character, and one past the last."""

PLANE = 0xF0000
MAX_MARKS = 0xFFFE
_MARK = re.compile(f"[{chr(PLANE)}-{chr(PLANE + MAX_MARKS)}]")


@dataclass
class MarkedTurns:
    """A conversation with marks around every text that a template may write.

    Attributes:
        owners: Turn of each marked text.
    """

    turns: list[Message]
    owners: list[int]

    def spans(self, rendered: str) -> tuple[str, list[list[CharacterSpan]]]:
        """Text without the marks, and the places of each turn's texts in it. A text whose marks are not there exactly
        once and in order has no place.
        """
        plain, marks = unmarked(rendered)
        found: list[list[CharacterSpan]] = [[] for _ in self.turns]
        for number, turn in enumerate(self.owners):
            first, last = marks.get(2 * number, []), marks.get(2 * number + 1, [])
            if len(first) == len(last) == 1 and first[0] < last[0]:
                found[turn].append((first[0], last[0]))
        return plain, found


def mark(turns: Sequence[Message]) -> MarkedTurns:
    """Marks the content, the reasoning and the tool calls of every turn."""
    marked, owners = [], []

    def wrapped(text: str, turn: int) -> str:
        lead, core, trail = split_blanks(text)
        if not core or len(owners) >= MAX_MARKS // 2:
            return text
        owners.append(turn)
        number = 2 * (len(owners) - 1)
        return f"{lead}{chr(PLANE + number)}{core}{chr(PLANE + number + 1)}{trail}"

    def leaves(value: Any, turn: int) -> Any:
        if isinstance(value, str):
            return wrapped(value, turn)
        if isinstance(value, Mapping):
            return {key: leaves(one, turn) for key, one in value.items()}
        if isinstance(value, list):
            return [leaves(one, turn) for one in value]
        return value

    for turn, message in enumerate(turns):
        new = dict(message)
        for key in (*REASONING_KEYS, "content"):
            if new.get(key):
                new[key] = leaves(new[key], turn) if key != "content" else _content(new[key], wrapped, turn)
        if new.get("tool_calls"):
            new["tool_calls"] = [
                {**call, "function": {key: leaves(value, turn) for key, value in call["function"].items()}}
                for call in new["tool_calls"]
            ]
        marked.append(new)
    return MarkedTurns(marked, owners)


def _content(content: Any, wrapped: Any, turn: int) -> Any:
    if isinstance(content, str):
        return wrapped(content, turn)
    return [{**part, "text": wrapped(part["text"], turn)} for part in content]


def marked_at(turns: Sequence[Message], turn: int, first: int | None, last: int | None) -> list[Message]:
    """The conversation with one or two marks in the content of one turn, at characters of its text without blanks
    around it.
    """
    content = turns[turn]["content"]
    text = content if isinstance(content, str) else content[0]["text"]
    lead, core, trail = split_blanks(text)
    if last is not None:
        core = core[:last] + chr(PLANE + 1) + core[last:]
    if first is not None:
        core = core[:first] + chr(PLANE) + core[first:]
    text = lead + core + trail
    changed = {**turns[turn], "content": text if isinstance(content, str) else [{**content[0], "text": text}]}
    return [*turns[:turn], changed, *turns[turn + 1 :]]


def unmarked(rendered: str) -> tuple[str, dict[int, list[int]]]:
    """Text without marks, and the places of each mark in it."""
    pieces, marks = [], {}
    start = length = 0
    for match in _MARK.finditer(rendered):
        piece = rendered[start : match.start()]
        pieces.append(piece)
        length += len(piece)
        marks.setdefault(ord(match.group()) - PLANE, []).append(length)
        start = match.end()
    return "".join([*pieces, rendered[start:]]), marks


def has_marks(text: str) -> bool:
    return _MARK.search(text) is not None


def split_blanks(text: str) -> tuple[str, str, str]:
    """Leading blanks, the text without blanks around it, and trailing blanks."""
    core = text.strip()
    first = text.find(core) if core else 0
    return text[:first], core, text[first + len(core) :]


def common_start(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def common_end(one: str, other: str) -> int:
    return common_start(one[::-1], other[::-1])
