"""From documents to token ids, and which of these tokens carry loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.mixture.documents import Document, Message

Tokenizer = PreTrainedTokenizerFast

PIECE_CHARACTERS = 1 << 20
"""Longer documents are tokenised in pieces."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Chat template for tokenizers that have none. Public format of OpenAI's ChatML."""


def chat_template_of(tokenizer: Tokenizer) -> str:
    """The template that instruction documents are written in: the tokenizer's own, or ChatML."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or CHATML


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of everything in a tokenizer that decides about token ids."""
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return _fingerprint(tokenizer, len(tokenizer), chat_template_of(tokenizer), ends)


@lru_cache(maxsize=2)  # writing out a large vocabulary takes a moment, and every source asks for it
def _fingerprint(
    tokenizer: Tokenizer, vocabulary_size: int, template: str, ends: tuple[int | None, ...]
) -> str:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by whoever called the tokenizer last; neither is used here.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    parts = json.dumps([backend, vocabulary_size, template, ends], sort_keys=True)
    return hashlib.blake2b(parts.encode(), digest_size=12).hexdigest()


class Encoder:
    """Turns documents of one source into tokens.

    Args:
        name: The source's name, for messages.
        tokenizer: A fast Hugging Face tokenizer with an end-of-sequence token.
        responses_only: Only the answers of instruction documents and their end carry loss.

    Raises:
        MixtureError: If the tokenizer is slow or has no end-of-sequence token.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, *, responses_only: bool) -> None:
        check_tokenizer(tokenizer)
        self.name, self.tokenizer, self.responses_only = name, tokenizer, responses_only
        self.token_dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)

    def encode(
        self, documents: Sequence[Document]
    ) -> Iterator[tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]]]:
        """Tokens of each document and whether each of them carries loss as a target.

        A pretraining document is [bos] + ids + [eos], where the tokenizer has a bos. An instruction document is its
        chat-template text in the same frame, without doubling what the template writes itself.
        """
        # A source is all of one kind.
        if not any(document.messages is not None for document in documents):
            yield from self._encode_texts([document.text or "" for document in documents])
            return
        texts, spans = zip(*map(self._render, documents), strict=True)
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=self.responses_only,
            verbose=False,
        )
        offsets = encoded["offset_mapping"] if self.responses_only else [None] * len(texts)
        for ids, places, answers in zip(encoded["input_ids"], offsets, spans, strict=True):
            mask = np.ones(len(ids), dtype=np.bool_)
            if places is not None:
                mask = _inside(places, answers)
            yield self._frame(np.asarray(ids, dtype=self.token_dtype), mask)

    def _encode_texts(
        self, texts: list[str]
    ) -> Iterator[tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]]]:
        # Straight to the tokenizer's own core: the way through transformers takes about as long again.
        backend = self.tokenizer.backend_tokenizer
        # A pretraining text that happens to spell "</s>" must not end its document, so special tokens are only
        # parsed where a chat template wrote them.
        backend.encode_special_tokens = True
        # Whoever called the tokenizer last may have left them behind.
        backend.no_truncation()
        backend.no_padding()
        if max(map(len, texts), default=0) <= PIECE_CHARACTERS:
            pieces = backend.encode_batch_fast(texts, add_special_tokens=False)
            found = (np.asarray(piece.ids, dtype=self.token_dtype) for piece in pieces)
        else:
            found = (self._encode_long(backend, text) for text in texts)
        for ids in found:
            yield self._frame(ids, np.ones(len(ids), dtype=np.bool_))

    def _encode_long(self, backend: Any, text: str) -> NDArray[np.unsignedinteger]:
        """Piece by piece: a tokenizer holds a hundred bytes and more for each token of what it is given at once."""
        ids, start = [np.empty(0, dtype=self.token_dtype)], 0
        while start < len(text):
            # After a line's end, where hardly any tokenizer joins what stands on both sides.
            stop = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1
            if stop <= start or start + PIECE_CHARACTERS >= len(text):
                stop = start + PIECE_CHARACTERS
            encoding = backend.encode_batch_fast([text[start:stop]], add_special_tokens=False)[0]
            ids.append(np.asarray(encoding.ids, dtype=self.token_dtype))
            start = stop
        return np.concatenate(ids)

    def _frame(
        self, ids: NDArray[np.unsignedinteger], mask: NDArray[np.bool_]
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        before = [bos] if bos is not None and ids[:1].tolist() != [bos] else []
        after = [eos] if ids[-1:].tolist() != [eos] else []
        framed = np.array([*before, *ids, *after], dtype=self.token_dtype)
        # A bos is never a target, whatever its mask says: nothing of its document precedes it.
        return framed, np.concatenate([[False] * len(before), mask, [True] * len(after)]).astype(
            np.bool_
        )

    def _render(self, document: Document) -> tuple[str, list[tuple[int, int]]]:
        """Text of a document, and the character spans of its assistant turns."""
        if document.messages is None:
            return document.text or "", []
        messages = list(document.messages)
        text = self._chat_text(messages).rstrip()
        if not self.responses_only:
            return text, []
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                # Where the whole text leaves the one that waits for this answer, the answer begins.
                waiting = self._chat_text(messages[:turn], add_generation_prompt=True)
                start = _common_characters(text, waiting)
                stop = _common_characters(text, self._chat_text(messages[: turn + 1]))
                spans.append((start, stop))
        return text, spans

    def _chat_text(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=chat_template_of(self.tokenizer),
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except jinja2.TemplateError as error:
            raise MixtureError(
                f"The tokenizer's chat template refuses a document of source {self.name!r}: {error}.",
                next_step="Use another tokenizer, or correct its chat_template.",
            ) from error
        assert isinstance(text, str)
        return text


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer that cannot mark the end of a document or tell where its tokens stand in the text."""
    if not getattr(tokenizer, "is_fast", False):
        raise MixtureError(
            f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} is not a fast one.",
            allowed="A tokenizer that comes with, or converts to, tokenizer.json.",
        )
    if tokenizer.eos_token_id is None:
        raise MixtureError(
            f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no end-of-sequence token.",
            allowed="Documents of one window are told apart by it.",
            next_step="Set eos_token in its tokenizer_config.json.",
        )


def _common_characters(one: str, other: str) -> int:
    """Length of the longest common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _inside(
    places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> NDArray[np.bool_]:
    """Which tokens begin inside one of the character spans. `places` are the tokens' own spans."""
    starts = np.array([start for start, _ in places], dtype=np.int64)
    stops = np.array([stop for _, stop in places], dtype=np.int64)
    inside = np.zeros(len(starts), dtype=np.bool_)
    for first, last in spans:
        # By its end, a token that merges the last blank of the prompt with the answer's first letter counts.
        inside |= (stops > first) & (starts < last)
    return inside
