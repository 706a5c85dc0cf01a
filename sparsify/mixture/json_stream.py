"""The rows of a JSON file, without holding the file in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any

from sparsify.mixture.files import BrokenFileError

CHUNK_CHARACTERS = 1 << 20
MAX_VALUE_CHARACTERS = 1 << 28
_SPACE = re.compile(r"[ \t\n\r]*")
# An error this near to the end of what is read may be about what is not read yet: "\\ud83d\\ude00" is the longest.
_MARGIN = 16


def json_list(stream: IO[str]) -> Iterator[Any]:
    """Elements of the list that a JSON file is, or of the one list of objects that its object holds.

    Raises:
        BrokenFileError: If the file does not go on as JSON, or holds no such list.
    """
    text = _Text(stream)
    opening = text.peek()
    if opening == "[":
        yield from _elements(text)
    elif opening == "{":
        yield from _list_inside(text)
    elif opening:
        raise BrokenFileError(
            "it holds neither a list nor an object; use .jsonl for one object a line"
        )
    if text.peek():
        raise BrokenFileError(
            f"there is more after its end, at character {text.position:,}; "
            "use .jsonl for one object a line"
        )


def _elements(text: _Text) -> Iterator[Any]:
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        yield text.value()
        if text.peek() == "]":
            text.take("]")
            return
        text.take(",")


def _list_inside(text: _Text) -> Iterator[Any]:
    text.take("{")
    found = None
    while text.peek() != "}":
        key = text.value()
        text.take(":")
        if text.peek() == "[":
            elements = _elements(text)
            first = next(elements, None)
            if isinstance(first, dict):
                if found is not None:
                    raise BrokenFileError(f"it holds two lists, {found!r} and {key!r}")
                found = key
                yield first
                yield from elements
            for _ in elements:
                pass
        else:
            text.value()
        if text.peek() != "}":
            text.take(",")
    text.take("}")
    if found is None:
        raise BrokenFileError("it is an object that holds no list of objects")


class _Text:
    """A JSON text of which only a piece is held, and the place in it."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._held, self._at = stream, "", 0
        self._before = 0
        self._ended = False
        self._decoder = json.JSONDecoder()

    @property
    def position(self) -> int:
        """Characters of the file before this place."""
        return self._before + self._at

    def peek(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            self._at = _SPACE.match(self._held, self._at).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self._at < len(self._held) or not self._more():
                return self._held[self._at : self._at + 1]

    def take(self, wanted: str) -> None:
        found = self.peek()
        if found != wanted:
            said = f"{found!r}" if found else "the end of the file"
            raise BrokenFileError(
                f"{wanted!r} expected, {said} found, at character {self.position:,}"
            )
        self._at += 1

    def value(self) -> Any:
        self.peek()
        wanted = CHUNK_CHARACTERS
        while True:
            try:
                value, end = self._decoder.raw_decode(self._held, self._at)
            except json.JSONDecodeError as error:
                unfinished = (
                    error.msg.startswith("Unterminated string")
                    or error.pos >= len(self._held) - _MARGIN
                )
                if not (
                    unfinished and self._held_value() < MAX_VALUE_CHARACTERS and self._more(wanted)
                ):
                    where = self._before + error.pos
                    raise BrokenFileError(
                        f"not JSON: {error.msg}, at character {where:,}"
                    ) from error
                # Twice as much each time: a long value is parsed again only a few times.
                wanted *= 2
                continue
            except (ValueError, RecursionError) as error:
                raise BrokenFileError(
                    f"not JSON: {error}, at character {self.position:,}"
                ) from error
            # A number at the end of what is held may go on in what is not.
            if end < len(self._held) or not self._more(wanted):
                self._at = end
                return value

    def _held_value(self) -> int:
        return len(self._held) - self._at

    def _more(self, characters: int = CHUNK_CHARACTERS) -> bool:
        """Reads on. Returns False at the end of the file."""
        if self._ended:
            return False
        piece = self._stream.read(characters)
        self._ended = not piece
        self._before += self._at
        self._held, self._at = self._held[self._at :] + piece, 0
        return bool(piece)
