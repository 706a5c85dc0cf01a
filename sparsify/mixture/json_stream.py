"""The rows of a JSON file, without holding the file in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from sparsify.mixture.files import BrokenFileError

MAX_VALUE_CHARACTERS = 1 << 28
_SPACE = re.compile(r"[ \t\n\r]*")
# An error this near to the end of what is read may be about what is not read yet: "\\ud83d\\ude00" is the longest.
_MARGIN = 16


def json_list(chunks: Iterable[str]) -> Iterator[Any]:
    """Elements of the list that a JSON text is, or of the one list of objects that its object holds.

    Raises:
        BrokenFileError: If the text does not go on as JSON, or holds no such list.
    """
    text = _Text(iter(chunks))
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

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks, self._held, self._at = chunks, "", 0
        self._before = 0
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
        while True:
            try:
                value, end = self._decoder.raw_decode(self._held, self._at)
            except json.JSONDecodeError as error:
                unfinished = (
                    error.msg.startswith("Unterminated string")
                    or error.pos >= len(self._held) - _MARGIN
                )
                held = len(self._held) - self._at
                # As much again each time: a long value is parsed again only a few times.
                if not (unfinished and held < MAX_VALUE_CHARACTERS and self._more(held)):
                    where = self._before + error.pos
                    raise BrokenFileError(
                        f"not JSON: {error.msg}, at character {where:,}"
                    ) from error
                continue
            except (ValueError, RecursionError) as error:
                raise BrokenFileError(
                    f"not JSON: {error}, at character {self.position:,}"
                ) from error
            # A number at the end of what is held may go on in what is not: "1" is held of "1.5", or "1e-" of "1e-5".
            whole = not isinstance(value, int | float) or end < len(self._held) - len("e-")
            if whole or not self._more():
                self._at = end
                return value

    def _more(self, characters: int = 1) -> bool:
        """Reads on by so many characters or more. Returns False at the end."""
        pieces = [self._held[self._at :]]
        read = 0
        for chunk in self._chunks:
            pieces.append(chunk)
            read += len(chunk)
            if read >= characters:
                break
        if read:
            self._before += self._at
            self._held, self._at = "".join(pieces), 0
        return read > 0
