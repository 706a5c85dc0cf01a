"""Finds overlaps of training documents with evaluation items: a 13-gram of words that both contain.

The rule is that of GPT-3 (T. Brown et al., arXiv 2005.14165, Appendix C) and of lm-evaluation-harness: lower-case words
without punctuation, and one shared 13-gram is enough. An item of 8 to 12 words counts as one n-gram of all its words;
8 is the minimum that GPT-3 used. Two things differ. A document with an overlap is dropped entirely instead of cut into
pieces, since a piece of an instruction is not an instruction. And punctuation separates words instead of being deleted,
so that "film, television", "film , television" and "film—television" are the same two words.

`datatrove` has a block for this. We do not use it because it needs lighteval, nltk and an xxhash older than the one
that `datasets` requires, reports the task but not the item of an overlap, and does not compare the words behind a hash.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsify.mixture.cleaning.eval_items import decontamination_fingerprint, read_items
from sparsify.mixture.sources.documents import Document, message_text
from sparsify.recipe.mixture import MixtureSection

NGRAM_WORDS = 13
SHORT_NGRAM_WORDS = 8
"""Items with fewer words are too short to distinguish a copy from a coincidence."""
EXCERPT_WORDS = 12
MAX_NGRAM_ITEMS = 10
"""An n-gram in more items than this is a common phrase: "this question refers to the following information"."""
FILTER_SLOTS_PER_NGRAM = 8
BASE = 0x9E3779B97F4A7C15
"""An odd number whose bits look random: 2^64 / golden ratio (D. Knuth, The Art of Computer Programming, 6.4)."""

_WORD = re.compile(r"[^\W_]+")
_SPACE = re.compile(r"\s")

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Overlap:
    """What a document shares with evaluation items.

    Args:
        items: (file, item) of every overlapping item, both numbered from 0, in order.
        file: Number of the evaluation file that contains `ngram`.
        item: Number of the item in that file.
        excerpt: The document's words around the n-gram.
    """

    items: tuple[tuple[int, int], ...]
    ngram: str
    file: int
    item: int
    excerpt: str


@dataclass(frozen=True)
class EvaluationFile:
    """One evaluation file.

    Args:
        num_short_items: Items of fewer than SHORT_NGRAM_WORDS words, which are not compared.
    """

    path: Path
    num_items: int
    num_short_items: int


class Decontaminator:
    """Finds evaluation items in training documents.

    Raises:
        MixtureError: If a file cannot be read.
    """

    def __init__(self, paths: Iterable[Path], piece_characters: int = 1 << 20) -> None:
        self._piece_characters = piece_characters
        self.files: list[EvaluationFile] = []
        self._items: list[tuple[int, int, str]] = []  # file, item, its words between spaces
        long_grams, short_grams = _NgramTable(), _NgramTable()
        for path in paths:
            num_items = num_short = 0
            for text in read_items(path):
                words = _words(text)
                if len(words) >= NGRAM_WORDS:
                    long_grams.add(_ngram_hashes(_word_hashes(words))[1], len(self._items))
                elif len(words) >= SHORT_NGRAM_WORDS:
                    # The first SHORT_NGRAM_WORDS words find the item; `_shared` compares the rest.
                    short_grams.add(_ngram_hashes(_word_hashes(words))[0][:1], len(self._items))
                if len(words) >= SHORT_NGRAM_WORDS:
                    self._items.append((len(self.files), num_items, f" {' '.join(words)} "))
                else:
                    num_short += 1
                num_items += 1
            self.files.append(EvaluationFile(path, num_items, num_short))
        self._tables = (short_grams.finish(), long_grams.finish())
        self.num_common_ngrams = sum(table.num_common for table in self._tables)
        """N-grams that occur in more than MAX_NGRAM_ITEMS items, which are not compared."""

    @staticmethod
    def of(mixture: MixtureSection) -> Decontaminator | None:
        """The decontaminator of a mixture; None if it names no evaluation set."""
        files = tuple((str(path), size, time) for path, size, time in decontamination_fingerprint(mixture))
        return _decontaminator(files) if files else None

    def overlaps(self, documents: Sequence[Document]) -> list[Overlap | None]:
        """For each document, its overlap with evaluation items; None if there is none."""
        if not documents:
            return []
        hashes = [_text_hashes(_text(document), self._piece_characters) for document in documents]
        ends = np.cumsum([len(one) for one in hashes])
        # N-grams across the boundary of two documents are hashed too; comparing the words rejects them.
        suspects = [set[int]() for _ in documents]
        for table, grams in zip(self._tables, _ngram_hashes(np.concatenate(hashes)), strict=True):
            places = table.candidates(grams)
            owners = np.searchsorted(ends, places, side="right")
            for place, owner in zip(places.tolist(), owners.tolist(), strict=True):
                suspects[owner].add(place - int(ends[owner]) + len(hashes[owner]))
        return [
            self._compare(_words(_text(document)), sorted(places)) if places else None
            for document, places in zip(documents, suspects, strict=True)
        ]

    def _compare(self, words: list[str], places: Sequence[int]) -> Overlap | None:
        """Compares the words at the places whose n-gram hashes match evaluation items."""
        found: dict[int, tuple[int, str]] = {}
        hashes = _ngram_hashes(_word_hashes(words))
        for table, grams in zip(self._tables, hashes, strict=True):
            for place in (place for place in places if place < len(grams)):
                for number in table.items_of(grams[place]):
                    if number not in found:
                        ngram = self._shared(words, place, number)
                        if ngram is not None:
                            found[number] = (place, ngram)
        if not found:
            return None
        first = min(found, key=lambda number: (found[number][0], number))
        place, ngram = found[first]
        around = words[max(0, place - EXCERPT_WORDS) : place + NGRAM_WORDS + EXCERPT_WORDS]
        file, item, _ = self._items[first]
        items = tuple(self._items[number][:2] for number in sorted(found))
        return Overlap(items, ngram, file, item, " ".join(around))

    def _shared(self, words: list[str], place: int, number: int) -> str | None:
        text = self._items[number][2]
        num_words = min(text.count(" ") - 1, NGRAM_WORDS)
        ngram = " ".join(words[place : place + num_words])
        whole = place + num_words <= len(words) and f" {ngram} " in text
        return ngram if whole else None


@lru_cache(maxsize=1)  # shared by all sources of a mixture
def _decontaminator(files: tuple[tuple[str, int | str, int | str], ...]) -> Decontaminator:
    return Decontaminator(Path(path) for path, _, _ in files)


class _NgramTable:
    """Hashes of n-grams, each with the number of the item that contains it."""

    def __init__(self) -> None:
        self._parts: list[tuple[Hashes, int]] = []
        self.num_common = 0

    def add(self, grams: Hashes, item: int) -> None:
        self._parts.append((np.unique(grams), item))

    def finish(self) -> _NgramTable:
        """Sorts the table. Nothing can be added afterwards."""
        grams = np.concatenate([np.empty(0, np.uint64), *(part for part, _ in self._parts)])
        lengths = [len(part) for part, _ in self._parts]
        items = np.repeat(np.array([item for _, item in self._parts], dtype=np.int32), lengths)
        self._parts.clear()
        order = np.argsort(grams, kind="stable")
        grams, items = grams[order], items[order]
        _, runs, num_items = np.unique(grams, return_inverse=True, return_counts=True)
        self.num_common = int((num_items > MAX_NGRAM_ITEMS).sum())
        rare = num_items[runs] <= MAX_NGRAM_ITEMS
        self._grams, self._items = grams[rare], items[rare]
        # One byte per slot rejects most n-grams of training text before the binary search.
        slot_bits = max(10, (len(grams) * FILTER_SLOTS_PER_NGRAM).bit_length())
        self._shift = np.uint64(64 - slot_bits)
        self._slots = np.zeros(1 << slot_bits, dtype=np.bool_)
        self._slots[self._grams >> self._shift] = True
        return self

    def candidates(self, grams: Hashes) -> NDArray[np.int64]:
        places = np.flatnonzero(self._slots[grams >> self._shift])
        if not len(places) or not len(self._grams):
            return places[:0]
        found = np.searchsorted(self._grams, grams[places])
        return places[self._grams[np.minimum(found, len(self._grams) - 1)] == grams[places]]

    def items_of(self, gram: np.uint64) -> list[int]:
        """Numbers of the items that contain an n-gram with this hash, in order, without repetitions."""
        start, stop = (int(np.searchsorted(self._grams, gram, side)) for side in ("left", "right"))
        return self._items[start:stop].tolist()


def _text(document: Document) -> str:
    if document.messages is not None:
        return "\n".join(map(message_text, document.messages))
    return document.text or ""


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _word_hashes(words: list[str]) -> Hashes:
    # Python's hash differs between processes. This does not affect the result: the words are compared afterwards.
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def _text_hashes(text: str, piece_characters: int) -> Hashes:
    """Hash of every word, in pieces: the list of all words of a long text would take ten times its memory."""
    return np.concatenate([_word_hashes(_words(piece)) for piece in _pieces(text, piece_characters)])


def _pieces(text: str, num_characters: int) -> Iterator[str]:
    start = 0
    while len(text) - start > num_characters:
        cut = _SPACE.search(text, start + num_characters)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:] if start else text


def _ngram_hashes(words: Hashes) -> tuple[Hashes, Hashes]:
    """Hashes of the SHORT_NGRAM_WORDS and of the NGRAM_WORDS words that start at each word, from word hashes [W].

    A hash is a polynomial in BASE modulo 2^64. Hashes of 8 and 13 words are composed from those of 1, 2 and 4 words.

    Returns:
        [W - 7] and [W - 12]; empty for fewer words.
    """

    def joined(left: Hashes, left_words: int, right: Hashes, right_words: int) -> Hashes:
        size = max(0, len(words) - left_words - right_words + 1)
        power = np.uint64(pow(BASE, right_words, 1 << 64))
        return left[:size] * power + right[left_words : left_words + size]

    one = words
    two = joined(one, 1, one, 1)
    four = joined(two, 2, two, 2)
    eight = joined(four, 4, four, 4)
    return eight, joined(eight, 8, joined(four, 4, one, 1), 5)
