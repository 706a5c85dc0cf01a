"""PowerInfer's tokenizer for byte-level BPE vocabularies (`gpt2`), and where its ids differ from a model's tokenizer.

It splits text into words roughly as GPT-2 does, whatever pre-tokenizer the model has, and merges bytes inside the words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher

from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparsify.errors import ExportError

SAMPLED_TOKENS = 20_000
"""Tokens of a vocabulary that are compared."""
MOST_OTHER_TOKENS = 0.01
"""Share of them that may have other ids in the engine."""
PROBES = (
    "Once upon a time, there were 3 cats; in 2024 there were 1,234,567.",
    "It's what they'd said: I'm late, you're not, we've won, she'll see. Don't!",
    "The first line.\nThe second line.\n\nAnother paragraph\twith a tab.",
    "def first(values):\n    total = values[0] + self._count(values, key='a')\n    return total",
    "caf\u00e9 \u00e0 la cre\u0300me, \u5317\u4eac, \u041f\u0440\u0438\u0432\u0435\u0442 \u4e16\u754c, \U0001f642!",
)
"""Texts on which the engine gives the ids of GPT-2's pre-tokenizer, whatever the vocabulary: words, digits, endings, newlines."""
_ENDING = re.compile("'(?:s|t|m|d|re|ve|ll)")
_BYTE_SIGNS = sorted(pre_tokenizers.ByteLevel.alphabet())


class EngineTokenizer:
    """The engine's algorithm.

    Args:
        texts: The text of every id.
        merges: Pairs of texts, the first merge first.
    """

    def __init__(self, texts: Sequence[str], merges: Sequence[tuple[str, str]]) -> None:
        self._ids = {text: number for number, text in enumerate(texts)}
        self._merges = models.BPE(vocab=self._ids, merges=list(merges))
        self.reads_newlines = {"\u00c4", "\u012c"} <= set(texts)
        """Whether it has tokens for the bytes of a sign that the engine tokenises when it loads a file."""
        self._bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.missing_bytes = [sign for sign in _BYTE_SIGNS if sign not in self._ids]
        """Signs of the bytes without a token; the engine ends with an error at text that needs one."""
        # The engine takes every token that is not made of two others for a special one, and finds it first in a text.
        whole = [text for text in texts if len(text) > 1 and not self._is_made(text)]
        self._whole = re.compile("|".join(map(re.escape, sorted(whole, key=len, reverse=True))) or r"(?!)")

    def ids(self, text: str) -> list[int]:
        """Ids of a text, as `main` reads it; bytes without a token are dropped."""
        ids: list[int] = []
        at = 0
        for found in self._whole.finditer(text):
            ids += self._merged(text[at : found.start()])
            ids.append(self._ids[found[0]])
            at = found.end()
        return ids + self._merged(text[at:])

    def _merged(self, text: str) -> list[int]:
        signs = (self._bytes.pre_tokenize_str(word)[0][0] for word in engine_words(text))
        return [token.id for word in signs for token in self._merges.tokenize(word)]

    def _is_made(self, text: str) -> bool:
        return any(text[:at] in self._ids and text[at:] in self._ids for at in range(1, len(text)))


def engine_words(text: str) -> Iterator[str]:
    """Splits a text as the engine does.

    Unlike GPT-2's regular expression, white space does not end before a sign other than a letter or a digit: a run of it and
    the signs that follow are one word.
    """
    word, collecting = "", ""
    at = 0
    while at < len(text):
        if ending := _ENDING.match(text, at):
            if word:
                yield word
            yield ending[0]
            # The engine begins a new word, but still collects the kind of the one before.
            word, at = "", ending.end()
            continue
        sign, following = text[at], text[at + 1 : at + 2]
        kind, next_kind = _kind(sign), _kind(following)
        split = False
        if not collecting:
            starts = next_kind if not word and sign == " " and next_kind not in ("space", "") else kind
            if not word and sign == " " and not following:
                starts = "other"
            if starts != "space":
                collecting = starts
            elif next_kind == "space":
                collecting = "space"
            else:
                split = True
        elif collecting == "space":
            split = next_kind in ("letter", "digit")
        else:
            split = kind != collecting
        if not following:
            word += sign
            split = True
        if split:
            if word:
                yield word
            word, collecting = sign, ""
        else:
            word += sign
        at += 1


def _kind(sign: str) -> str:
    if not sign:
        return ""
    if sign.isspace():
        return "space"
    return {"L": "letter", "N": "digit"}.get(unicodedata.category(sign)[0], "other")


def check_same_ids(engine: EngineTokenizer, tokenizer: PreTrainedTokenizerFast, specials: Iterable[str]) -> None:
    """Compares ids on the probes, on special tokens inside text, and on the vocabulary's own tokens.

    Raises:
        ExportError: If the engine's differ, with the first text on which they do.
    """
    probes = [*PROBES, *(f"One{special}two {special}\n3" for special in specials)]
    for text in probes:
        own, theirs = _own_ids(tokenizer, text), engine.ids(text)
        if own != theirs:
            raise _refusal(tokenizer, own, theirs)
    size = len(tokenizer)
    numbers = range(0, size, max(1, size // SAMPLED_TOKENS))
    texts = tokenizer.batch_decode([[number] for number in numbers])
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    compared = {number: text for number, text, ids in zip(numbers, texts, encoded, strict=True) if ids == [number]}
    others = [number for number, text in compared.items() if engine.ids(text) != [number]]
    if len(others) > MOST_OTHER_TOKENS * len(compared):
        raise _refusal(tokenizer, others[:1], engine.ids(compared[others[0]]))


def other_share(engine: EngineTokenizer, tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> float:
    """Share of the tokens of some texts that the engine does not give."""
    tokens = kept = 0
    for text in texts:
        own, theirs = _own_ids(tokenizer, text), engine.ids(text)
        tokens += len(own)
        kept += sum(block.size for block in SequenceMatcher(None, own, theirs, autojunk=False).get_matching_blocks())
    return 1 - kept / max(tokens, 1)


def _own_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _refusal(tokenizer: PreTrainedTokenizerFast, own: list[int], theirs: list[int]) -> ExportError:
    at = next((i for i, (one, other) in enumerate(zip(own, theirs, strict=False)) if one != other), len(own))
    around = slice(max(0, at - 1), at + 3)
    shown, wrong = (tokenizer.convert_ids_to_tokens(ids[around]) for ids in (own, theirs))
    return ExportError(
        "PowerInfer splits text as GPT-2 does, and this model's tokenizer in another way: "
        f"in {str(tokenizer.decode(own[around]))!r} it has the tokens {shown}, and PowerInfer {wrong}.",
        allowed="A byte-level BPE tokenizer with GPT-2's pre-tokenizer, also with single digits, or a SentencePiece BPE tokenizer.",
        next_step="`sparsify export RUN --to DIR` writes the Hugging Face bundle of any model.",
    )
