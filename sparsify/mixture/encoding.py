"""From documents to token ids, and which of these tokens carry loss."""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import cast

import numpy as np
import tokenizers
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.mixture.chat import ChatTemplateError, ChatWriter, Span, chat_template_text
from sparsify.mixture.documents import Document
from sparsify.mixture.quarantine import BadRows, Reason
from sparsify.recipe import MixtureSection

Tokenizer = PreTrainedTokenizerFast

PIECE_CHARACTERS = 1 << 20
"""Longer documents are tokenised in pieces."""
PARTS = 2
"""Parts of a batch: one is tokenised while the caller does something with the one before."""
Encoded = tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]]
"""Token ids of a document, and whether each of them carries loss as a target. [T], [T]"""


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of everything in a tokenizer that decides about token ids of a given text."""
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return _fingerprint(tokenizer, len(tokenizer), ends)


@lru_cache(maxsize=2)  # writing out a large vocabulary takes a moment, and every source asks for it
def _fingerprint(tokenizer: Tokenizer, vocabulary_size: int, ends: tuple[int | None, ...]) -> str:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by whoever called the tokenizer last; neither is used here.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    parts = json.dumps([backend, vocabulary_size, ends], sort_keys=True)
    return hashlib.blake2b(parts.encode(), digest_size=12).hexdigest()


class Encoder:
    """Turns documents of one source into tokens.

    Args:
        name: The source's name, for messages.
        tokenizer: A fast Hugging Face tokenizer with an end-of-sequence token.
        responses_only: Only the answers of instruction documents and their end carry loss.
        chat_template: `mixture.chat_template`.
        bad_rows: Counts the documents that the chat template refuses.

    Raises:
        MixtureError: If the tokenizer is slow or has no end-of-sequence token, or the chat template cannot be read.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        *,
        responses_only: bool,
        chat_template: str | None = None,
        bad_rows: BadRows | None = None,
    ) -> None:
        check_tokenizer(tokenizer)
        self.name, self.tokenizer, self.responses_only = name, tokenizer, responses_only
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._bos, self._eos = cast(tuple[int | None, int], ends)
        self.token_dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        self.bad_rows = bad_rows or BadRows(name, MixtureSection.max_bad_fraction)
        self._chat = ChatWriter(tokenizer, chat_template_text(chat_template, tokenizer))
        # The tokenizer's core runs without Python's lock, so one thread more lets both work.
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    def encode(self, documents: Sequence[Document]) -> Iterator[Encoded]:
        """Tokens of each document and whether each of them carries loss as a target.

        Tokenising begins at once, in a thread of its own; do something else before asking for the first document. One
        batch must be asked for to its end before the next is begun with the same tokenizer.

        A pretraining document is [bos] + ids + [eos], where the tokenizer has a bos. An instruction document is its
        chat-template text in the same frame, without doubling what the template writes itself. One that the chat
        template refuses gives no tokens.

        Raises:
            MixtureError: If the chat template refuses too many.
        """
        # A source is all of one kind.
        if documents and documents[0].messages is not None:
            return self._encode_chats(documents)
        if documents and documents[0].token_ids is not None:
            return (self._frame(one.token_ids) for one in documents if one.token_ids is not None)
        return self._encode_texts([document.text or "" for document in documents])

    def _encode_texts(self, texts: list[str]) -> Iterator[Encoded]:
        # Straight to the tokenizer's own core, and without places: the way through transformers costs a third.
        # A pretraining text that happens to spell "</s>" must not end its document, so special tokens are only
        # parsed where a chat template wrote them.
        backend = self._backend(parse_special_tokens=False)
        if max(map(len, texts), default=0) > PIECE_CHARACTERS:
            return (self._frame(self._encode_long(backend, text)) for text in texts)
        encodings = self._encode_ahead(backend.encode_batch_fast, texts)
        return (self._frame(encoding.ids) for encoding in encodings)

    def _encode_ahead(
        self, encode: Callable[..., list[tokenizers.Encoding]], texts: list[str]
    ) -> Iterator[tokenizers.Encoding]:
        size = max(-(-len(texts) // PARTS), 1)
        parts = [
            self._ahead.submit(encode, texts[start : start + size], add_special_tokens=False)
            for start in range(0, len(texts), size)
        ]
        return (encoding for part in parts for encoding in part.result())

    def _encode_long(self, backend: tokenizers.Tokenizer, text: str) -> NDArray[np.unsignedinteger]:
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

    def _encode_chats(self, documents: Sequence[Document]) -> Iterator[Encoded]:
        written = [self._write(document) for document in documents]
        backend = self._backend(parse_special_tokens=True)
        encode = backend.encode_batch if self.responses_only else backend.encode_batch_fast
        encodings = self._encode_ahead(encode, [text for text, _ in written])
        return map(self._frame_chat, written, encodings)

    def _frame_chat(
        self, written: tuple[str, list[Span]], encoding: tokenizers.Encoding
    ) -> Encoded:
        text, answers = written
        if not text:
            return np.empty(0, dtype=self.token_dtype), np.empty(0, dtype=np.bool_)
        inside = _inside(encoding, answers) if self.responses_only else None
        return self._frame(encoding.ids, inside)

    def _write(self, document: Document) -> tuple[str, list[Span]]:
        assert document.messages is not None
        try:
            return self._chat.write(document.messages, with_answers=self.responses_only)
        except ChatTemplateError as error:
            detail = f"the chat template fails: {error}"
            self.bad_rows.refuse(document.file, Reason.CHAT_TEMPLATE, document.row, detail)
            return "", []

    def _backend(self, *, parse_special_tokens: bool) -> tokenizers.Tokenizer:
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = not parse_special_tokens
        # Whoever called the tokenizer last may have left them behind.
        backend.no_truncation()
        backend.no_padding()
        return backend

    def _frame(
        self,
        ids: Sequence[int] | NDArray[np.unsignedinteger],
        carries_loss: NDArray[np.bool_] | None = None,
    ) -> Encoded:
        bos, eos = self._bos, self._eos
        before = int(bos is not None and not (len(ids) and ids[0] == bos))
        after = int(not (len(ids) and ids[-1] == eos))
        framed = np.empty(before + len(ids) + after, dtype=self.token_dtype)
        mask = np.ones(len(framed), dtype=np.bool_)
        # array takes a list in a third of the time that numpy does, and this is done for every token of a run.
        flat = ids if isinstance(ids, np.ndarray) else np.frombuffer(array("I", ids), np.uint32)
        framed[before : before + len(ids)] = flat
        if carries_loss is not None:
            mask[before : before + len(ids)] = carries_loss
        if before:
            # A bos is never a target, whatever its mask says: nothing of its document precedes it.
            framed[0], mask[0] = cast(int, bos), False
        if after:
            framed[-1] = eos
        return framed, mask


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


def _inside(encoding: tokenizers.Encoding, spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens begin inside one of the character spans."""
    inside = np.zeros(len(encoding), dtype=np.bool_)
    tokens = range(len(encoding))
    for first, last in spans:
        # Tokens stand in the order of their text, and asking for a few places takes a twentieth of listing all. By
        # its end, a token that merges the last blank of the prompt with the answer's first letter counts.
        start = bisect_right(tokens, first, key=lambda token: _place(encoding, token)[1])
        stop = bisect_left(tokens, last, key=lambda token: _place(encoding, token)[0])
        inside[start:stop] = True
    return inside


def _place(encoding: tokenizers.Encoding, token: int) -> Span:
    return cast(Span, encoding.token_to_chars(token))
