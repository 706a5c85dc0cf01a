"""Encodes documents as token ids, with a mask of the tokens that carry loss."""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import numpy as np
import tokenizers
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.mixture.sources.bad_rows import BadRows, Reason
from sparsify.mixture.sources.documents import Document
from sparsify.mixture.tokens.chat import ChatWriter, WrittenChat
from sparsify.mixture.tokens.chat_marks import CharacterSpan
from sparsify.mixture.tokens.chat_template import ChatTemplateError, chat_template_text
from sparsify.mixture.tokens.pool import tokenizer_threads
from sparsify.recipe.mixture import MixtureSection

Tokenizer = PreTrainedTokenizerFast

PIECES_AT_ONCE = 2
"""Pieces of a long document per call: a tokenizer needs more than a hundred bytes for each token of a call."""

Ids = Sequence[int] | NDArray[np.unsignedinteger]
"""Token ids of one document."""


@dataclass(frozen=True)
class Encoded:
    """Concatenated documents as tokens.

    Attributes:
        ids: Token ids. [T]
        carries_loss: Which tokens carry loss as targets; None without a loss mask. [T]
        lengths: Tokens of each document; 0 for a document that the chat template refuses. [D] int64
    """

    ids: NDArray[np.unsignedinteger]
    carries_loss: NDArray[np.bool_] | None
    lengths: NDArray[np.int64]


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of everything in a tokenizer that affects the token ids of a text."""
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return _fingerprint(tokenizer, len(tokenizer), ends)


@lru_cache(maxsize=2)  # serialising a large vocabulary is slow, and every source needs the hash
def _fingerprint(tokenizer: Tokenizer, vocabulary_size: int, ends: tuple[int | None, ...]) -> str:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # State of the last call of the tokenizer; neither is used here.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    parts = json.dumps([backend, vocabulary_size, ends], sort_keys=True)
    return hashlib.blake2b(parts.encode(), digest_size=12).hexdigest()


class Encoder:
    """Encodes documents of one source.

    Args:
        tokenizer: A fast Hugging Face tokenizer with an end-of-sequence token.
        responses_only: Only the responses of instruction documents, and the token after each, carry loss.
        piece_characters: Longer documents are tokenised in pieces of this length.

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
        piece_characters: int = 1 << 20,
    ) -> None:
        check_tokenizer(tokenizer)
        self.name, self.tokenizer, self.responses_only = name, tokenizer, responses_only
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._bos, self._eos = cast(tuple[int | None, int], ends)
        self.token_dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        self.bad_rows = bad_rows or BadRows(name, MixtureSection.max_bad_fraction)
        self._piece_characters = piece_characters
        self._chat = ChatWriter(tokenizer, chat_template_text(chat_template, tokenizer))

    def encode(self, documents: Sequence[Document]) -> Encoded:
        return self.start(documents)()

    def start(self, documents: Sequence[Document]) -> Callable[[], Encoded]:
        """Starts to encode documents in background threads, and returns immediately.

        A pretraining document becomes [bos] + ids + [eos]; without bos if the tokenizer has none. An instruction
        document is the text of the chat template, framed in the same way unless the template writes bos or eos itself.

        Returns:
            A function that waits for the tokens. It counts the documents that the chat template refuses and the turns
            that it drops, and raises MixtureError if it refuses too many.
        """
        if not documents:
            return lambda: self._frame([], [] if self.responses_only else None)
        # All documents of a source are of the same kind.
        if documents[0].messages is not None:
            return self._start_chats(documents)
        if documents[0].token_ids is not None:
            ids = [one.token_ids for one in documents if one.token_ids is not None]
            return lambda: self._frame(ids)
        texts = [document.text or "" for document in documents]
        # Calls the Rust tokenizer directly and without offsets: the detour through transformers costs a third.
        # A pretraining text that contains "</s>" must not end its document, so special tokens are parsed only
        # where a chat template wrote them.
        backend = self._backend(parse_special_tokens=False)
        return tokenizer_threads().submit(self._encode_texts, backend, texts)

    def _encode_texts(self, backend: tokenizers.Tokenizer, texts: list[str]) -> Encoded:
        if max(map(len, texts), default=0) > self._piece_characters:
            return self._frame([self._encode_long(backend, text) for text in texts])
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return self._frame(encoding.ids for encoding in encodings)

    def _encode_long(self, backend: tokenizers.Tokenizer, text: str) -> Ids:
        pieces, ids = list(_pieces(text, self._piece_characters)), array("I")
        for start in range(0, len(pieces), PIECES_AT_ONCE):
            some = pieces[start : start + PIECES_AT_ONCE]
            for encoding in backend.encode_batch_fast(some, add_special_tokens=False):
                ids.extend(array("I", encoding.ids))
        return ids

    def _start_chats(self, documents: Sequence[Document]) -> Callable[[], Encoded]:
        written, refused = [], []
        for document in documents:
            assert document.messages is not None
            try:
                chat = self._chat.write(document.messages, document.tools)
            except ChatTemplateError as error:
                refused.append((document, error))
                chat = WrittenChat("", [])
            written.append(chat)
        backend = self._backend(parse_special_tokens=True)
        tokenized = tokenizer_threads().submit(self._encode_chats, backend, written)

        def result() -> Encoded:
            # Count refusals here, in writing order, so that the counts at the end of a shard cover exactly its documents.
            for document, error in refused:
                detail = f"the chat template fails: {error}"
                self.bad_rows.refuse(document.file, Reason.CHAT_TEMPLATE, document.row, detail)
            for chat in written:
                self.bad_rows.add_dropped_turns(chat.dropped_turns)
            return tokenized()

        return result

    def _encode_chats(self, backend: tokenizers.Tokenizer, written: Sequence[WrittenChat]) -> Encoded:
        encode = backend.encode_batch if self.responses_only else backend.encode_batch_fast
        given = [chat for chat in written if chat.text]
        encodings = encode([chat.text for chat in given], add_special_tokens=False)
        inside = None
        if self.responses_only:
            inside = [_inside(encoding, chat.answers) for encoding, chat in zip(encodings, given, strict=True)]
        encoded = self._frame((encoding.ids for encoding in encodings), inside)
        lengths = np.zeros(len(written), dtype=np.int64)
        lengths[[bool(chat.text) for chat in written]] = encoded.lengths
        return replace(encoded, lengths=lengths)

    def _backend(self, *, parse_special_tokens: bool) -> tokenizers.Tokenizer:
        backend = self.tokenizer.backend_tokenizer
        encode_special_tokens = not parse_special_tokens
        # An earlier call may have left truncation or padding enabled.
        wanted = (encode_special_tokens, None, None)
        if (backend.encode_special_tokens, backend.truncation, backend.padding) != wanted:
            # Wait for tasks of other sources: the settings of a tokenizer must not change while it works.
            tokenizer_threads().wait()
            backend.encode_special_tokens = encode_special_tokens
            backend.no_truncation()
            backend.no_padding()
        return backend

    def _frame(self, documents: Iterable[Ids], inside: Sequence[NDArray[np.bool_]] | None = None) -> Encoded:
        """Adds bos and eos to the ids of every document; `inside` says which ids carry loss."""
        bos, eos = self._bos, self._eos
        begin, end = array("I", [bos or 0]), array("I", [eos])
        # bos is never a target, because no token of its document precedes it.
        no_loss = np.zeros(1, dtype=np.bool_)
        pieces, masks, lengths = [], [], []
        # One long array instead of one per document: numpy's overhead for short arrays adds up over a run.
        for place, ids in enumerate(documents):
            before = bos is not None and not (len(ids) and ids[0] == bos)
            after = not (len(ids) and ids[-1] == eos)
            if before:
                pieces.append(begin)
            # array converts a list three times as fast as numpy.
            pieces.append(array("I", ids) if isinstance(ids, list) else np.asarray(ids, np.uint32))
            if after:
                pieces.append(end)
            lengths.append(before + len(ids) + after)
            if inside is not None:
                # eos belongs to the answer that it follows, and to no other turn.
                masks += [no_loss] * before + [inside[place]] + [inside[place][-1:]] * after
        flat = np.frombuffer(b"".join(pieces), dtype=np.uint32)
        return Encoded(
            flat.astype(self.token_dtype, copy=False),
            None if inside is None else np.concatenate([np.empty(0, np.bool_), *masks]),
            np.array(lengths, dtype=np.int64),
        )


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises MixtureError for a tokenizer without offsets (a slow one) or without an end-of-sequence token."""
    if not getattr(tokenizer, "is_fast", False):
        raise MixtureError(
            f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} is not a fast one.",
            allowed="A tokenizer that has, or converts to, a tokenizer.json.",
        )
    if tokenizer.eos_token_id is None:
        raise MixtureError(
            f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no end-of-sequence token.",
            allowed="This token separates the documents of a sequence.",
            next_step="Set eos_token in its tokenizer_config.json.",
        )


def _pieces(text: str, num_characters: int) -> Iterator[str]:
    start = 0
    while start < len(text):
        # Cut after a line break: hardly any tokenizer merges across one.
        stop = text.rfind("\n", start, start + num_characters) + 1
        if stop <= start or start + num_characters >= len(text):
            stop = start + num_characters
        yield text[start:stop]
        start = stop


def _inside(encoding: tokenizers.Encoding, spans: Sequence[CharacterSpan]) -> NDArray[np.bool_]:
    inside = np.zeros(len(encoding), dtype=np.bool_)
    tokens = range(len(encoding))
    for first, last in spans:
        # Binary search: tokens are in text order, and querying a few offsets takes a twentieth of the time of listing
        # all. The search for the start uses token ends, so that a token that merges the prompt's last blank with the
        # first letter of the response counts as part of the response.
        start = bisect_right(tokens, first, key=lambda token: _place(encoding, token)[1])
        stop = bisect_left(tokens, last, key=lambda token: _place(encoding, token)[0])
        inside[start:stop] = True
    return inside


def _place(encoding: tokenizers.Encoding, token: int) -> CharacterSpan:
    return cast(CharacterSpan, encoding.token_to_chars(token))
