"""What a source gives: documents, and on which side of the held-out split each of them falls."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Message = dict[str, str]
"""`{"role": "system", "user" or "assistant", "content": ...}`, as chat templates take it."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document: plain text for pretraining, the messages of one conversation, or token ids.

    Args:
        origin: What decides the held-out split. Documents of one origin always fall on the same side.
        text: The text of a pretraining document.
        messages: The turns of an instruction document.
        token_ids: The tokens of a document that was tokenised elsewhere, without the end of sequence. [T] unsigned
        file: The file or data set that it comes from.
        row: Its line or row there, from 1.
    """

    origin: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    token_ids: NDArray[np.unsignedinteger] | None = field(default=None, compare=False)
    file: str = field(default="", compare=False)
    row: int = field(default=0, compare=False)

    @property
    def num_characters(self) -> int:
        """Length of its text, or of all its messages; for token ids their number."""
        if self.messages is not None:
            return sum(len(message["content"]) for message in self.messages)
        if self.token_ids is not None:
            return len(self.token_ids)
        return len(self.text or "")


def conversation(origin: str, prompt: str, response: str) -> Document:
    """A document of one prompt and its answer."""
    turns = (
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": response},
    )
    return Document(origin, messages=turns)


def content_origin(*parts: str) -> str:
    """An origin made of the content itself, so that exact duplicates fall on the same side of the split.

    Raises:
        UnicodeEncodeError: If the text is not Unicode: it holds lone surrogates.
    """
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def is_held_out(origin: str, validation_fraction: float) -> bool:
    """Whether documents of this origin are kept from training: a hash, so that no list has to be stored."""
    digest = hashlib.blake2b(origin.encode(), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "big") < validation_fraction * 2**64
