"""The pre-tokenizers of byte-level BPE that llama.cpp knows by name, as tokenizer.json says them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

Steps = tuple[str, ...]


class PreTokenizer(NamedTuple):
    """How text is split into words.

    Attributes:
        steps: As `canonical_steps` writes them.
        whole_words: Whether a word that is a token stays whole even if no merges give it.
        note: On what text llama.cpp's is another, in a sentence.
    """

    steps: Steps
    whole_words: bool = False
    note: str | None = None


def canonical_steps(steps: Iterable[dict[str, Any]]) -> Steps:
    """Steps of a tokenizer.json, without what does not change ids, and with one form of what has two."""
    canonical: list[dict[str, Any]] = []
    for step in steps:
        one = {name: value for name, value in step.items() if name != "trim_offsets"}
        if one == BYTES and canonical and canonical[-1] == _split(GPT2):
            canonical[-1] = WORDS
            continue
        canonical.append(one)
    return tuple(json.dumps(step, sort_keys=True) for step in canonical)


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _known(*steps: str | dict[str, Any], whole_words: bool = False, note: str | None = None) -> PreTokenizer:
    given = [_split(step) if isinstance(step, str) else step for step in steps]
    return PreTokenizer(canonical_steps(given), whole_words, note)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
"""Splits by GPT2."""
DIGITS = {"type": "Digits", "individual_digits": True}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
LLAMA3 = _ENDINGS + "|" + _LETTERS + r"|\p{N}{1,3}" + _OTHERS + r"[\r\n]*" + _REST
QWEN2 = _ENDINGS + "|" + _LETTERS + r"|\p{N}" + _OTHERS + r"[\r\n]*" + _REST
TEKKEN = f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _OTHERS + r"[\r\n/]*" + _REST

PRE_TOKENIZERS = {
    "gpt-2": _known(WORDS),
    "smollm": _known(DIGITS, WORDS),
    "llama-bpe": _known(LLAMA3, BYTES, whole_words=True),
    "smaug-bpe": _known(LLAMA3, BYTES),
    "qwen2": _known(QWEN2, BYTES),
    "tekken": _known(
        TEKKEN,
        BYTES,
        whole_words=True,
        note="llama.cpp takes combining marks apart from their letters, which gives other ids; composed letters have the same.",
    ),
    "deepseek-coder": _known(
        *(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", DIGITS, BYTES),
        note="llama.cpp takes a line separator (U+2028) together with the letters after it, which gives other ids.",
    ),
}
"""By the name that llama.cpp gives them. Each is tested against llama.cpp on text where the others differ."""
