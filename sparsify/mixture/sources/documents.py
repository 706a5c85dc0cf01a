"""Documents, and the hash that decides which of them are held out of training."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Message = dict[str, Any]
"""One turn in the form that chat templates take: `role`, `content` (a text), and where the data has them `tool_calls`,
`tool_call_id`, `name` and the reasoning."""

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names under which chat templates read the reasoning of a turn."""


def message_text(message: Message) -> str:
    """Everything that a turn says: its reasoning, its content and its tool calls."""
    said = [message[key] for key in REASONING_KEYS if message.get(key)] + [message["content"]]
    if message.get("tool_calls"):
        said.append(json.dumps(message["tool_calls"], sort_keys=True, ensure_ascii=False))
    return "\n".join(said) if len(said) > 1 else said[0]


@dataclass(frozen=True, slots=True)
class Document:
    """One document: plain text for pretraining, the messages of one conversation, or token ids.

    Args:
        origin: Decides the held-out split. Documents of one origin always fall on the same side.
        tools: Tools that the conversation may call, as JSON schemas.
        token_ids: Tokens of a pre-tokenised document, without the end-of-sequence token. [T] unsigned
        row: Its line or row in the file, from 1.
    """

    origin: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    token_ids: NDArray[np.unsignedinteger] | None = field(default=None, compare=False)
    file: str = field(default="", compare=False)
    row: int = field(default=0, compare=False)

    @property
    def num_characters(self) -> int:
        """Characters of the text or of all messages; for token ids, the number of ids."""
        if self.messages is not None:
            return sum(len(message_text(message)) for message in self.messages)
        if self.token_ids is not None:
            return len(self.token_ids)
        return len(self.text or "")


def conversation(origin: str, prompt: str, response: str) -> Document:
    turns = (
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": response},
    )
    return Document(origin, messages=turns)


def content_origin(*parts: str) -> str:
    """Derives an origin from the content, so that exact duplicates fall on the same side of the split.

    Raises:
        UnicodeEncodeError: If the text holds lone surrogates, which UTF-8 cannot encode.
    """
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def is_held_out(origin: str, validation_fraction: float) -> bool:
    """Whether documents of this origin are held out of training. A hash decides, so no list is stored."""
    digest = hashlib.blake2b(origin.encode(), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "big") < validation_fraction * 2**64
