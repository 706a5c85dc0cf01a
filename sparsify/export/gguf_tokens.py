"""A model's vocabulary as GGUF files hold it, read from what its tokenizer does (tokenizer.json).

llama.cpp has two tokenizers for such models: `llama` merges SentencePiece's pieces by score, `gpt2` merges bytes by rank inside
the words of a pre-tokenizer that it knows by name. Both first take out added tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from sparsify.errors import ExportError
from sparsify.export.gguf_pre_tokenizers import PRE_TOKENIZERS, canonical_steps

SPACE = "\u2581"
"""SentencePiece's sign for a space."""
LOWEST_SCORE = -1e9
"""Of tokens that no merge gives."""
FORMS = ("NFC", "NFKC")
"""Normalisations that leave most text as it is."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Tokens:
    """One token for every row of the embedding.

    Attributes:
        model: `llama` or `gpt2`.
        pre: llama.cpp's name of the pre-tokenizer; None for `llama`.
        scores: For `llama`: the higher, the earlier a piece is merged.
        types: Numbers of gguf.TokenType.
        merges: For `gpt2`: the two parts with a space between, the first merge first.
        adds_space: Whether a space is put before a text.
        bos: The token that begins a text; None if there is none.
        adds_bos: Whether it is put before a text.
        notes: Where the engine's ids differ from the tokenizer's, in sentences.
    """

    model: str
    pre: str | None
    texts: list[str]
    scores: list[float]
    types: list[int]
    merges: list[str]
    adds_space: bool
    bos: int | None
    adds_bos: bool
    notes: list[str]


def read_tokens(tokenizer: PreTrainedTokenizerFast, vocab_size: int, engine: str) -> Tokens:
    """Reads a tokenizer's vocabulary, with a placeholder for every row of the embedding that has no token.

    Raises:
        ExportError: If llama.cpp has no tokenizer that gives the same ids.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _refusal(engine, f"its model is {model['type']}, not BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refusal(engine, f"it sets {name}")
    added = {token["id"]: token for token in content["added_tokens"]}
    texts = _texts(tokenizer, vocab_size)
    bos, adds_bos = _bos(tokenizer, engine)
    notes = _added_notes(added.values())
    if model.get("byte_fallback"):
        adds_space, more = _spaces(content, engine)
        scores, late = _scores(model, texts)
        types = [_type(number, text, added, tokenizer) for number, text in enumerate(texts)]
        if types.count(TokenType.BYTE) != 256:
            raise _refusal(engine, "it has no token for some bytes")
        return Tokens("llama", None, texts, scores, types, [], adds_space, bos, adds_bos, notes + more + late)
    pre = _pre_tokenizer(content, engine)
    merges = [" ".join(pair) for pair in _pairs(model)]
    notes += [note] if (note := PRE_TOKENIZERS[pre].note) else []
    types = [_type(number, text, added, tokenizer) for number, text in enumerate(texts)]
    return Tokens("gpt2", pre, texts, [], types, merges, False, bos, adds_bos, notes + _form_notes(content, engine))


def _refusal(engine: str, reason: str) -> ExportError:
    return ExportError(
        f"{engine} has no tokenizer that gives the ids of this model's: {reason}.",
        allowed=f"SentencePiece BPE with byte fallback, or byte-level BPE with a known pre-tokenizer: {', '.join(PRE_TOKENIZERS)}.",
        next_step="`sparsify export RUN --to DIR` writes the Hugging Face bundle, which keeps the tokenizer as it is.",
    )


def _texts(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[str]:
    by_id = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(by_id) >= vocab_size:
        raise ExportError(
            f"The tokenizer has ids up to {max(by_id):,}, but the model's embedding only {vocab_size:,} rows."
        )
    return [by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)]


def _bos(tokenizer: PreTrainedTokenizerFast, engine: str) -> tuple[int | None, bool]:
    """The token that begins a text, and whether the tokenizer puts it there."""
    whole, plain = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False))
    if whole[1:] == plain:
        return whole[0], True
    if whole != plain:
        raise _refusal(engine, "it puts other tokens around a text than one before it")
    own = tokenizer.bos_token_id
    return (own if isinstance(own, int) else None), False


def _type(number: int, text: str, added: dict[int, dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> int:
    if number == tokenizer.unk_token_id:
        kind = TokenType.UNKNOWN
    elif number in added:
        kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
    elif text == f"[PAD{number}]":
        kind = TokenType.UNUSED
    elif _BYTE.fullmatch(text):
        kind = TokenType.BYTE
    else:
        kind = TokenType.NORMAL
    return int(kind)


def _added_notes(added: Iterable[dict[str, Any]]) -> list[str]:
    names = [token["content"] for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]]
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [
        f"The tokenizer drops spaces next to {', '.join(map(repr, names[:3]))}{more}, or takes them only as whole words; the "
        "engine does not."
    ]


def _parts(step: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [part for one in step[inside] for part in _parts(one, inside)] if step["type"] == "Sequence" else [step]


def _form_notes(content: dict[str, Any], engine: str) -> list[str]:
    kinds = [part["type"] for part in _parts(content["normalizer"], "normalizers")]
    if other := [kind for kind in kinds if kind not in FORMS]:
        raise _refusal(engine, f"it normalises text by {', '.join(other)}")
    return [f"The tokenizer brings text into the form {kind}, the engine does not." for kind in kinds]


def _spaces(content: dict[str, Any], engine: str) -> tuple[bool, list[str]]:
    """Whether a SentencePiece tokenizer puts a space before a text, and where the engine does it elsewhere."""
    steps = _parts(content["normalizer"], "normalizers")
    forms = {"type": "Sequence", "normalizers": [step for step in steps if step["type"] in FORMS]}
    notes = _form_notes({"normalizer": forms}, engine)
    steps = [step for step in steps if step["type"] not in FORMS]
    prepends = bool(steps) and steps[0] == {"type": "Prepend", "prepend": SPACE}
    pre = _parts(content["pre_tokenizer"], "pretokenizers")
    if steps[prepends:] == [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}] and not pre:
        return prepends, notes
    if steps or len(pre) != 1 or pre[0]["type"] != "Metaspace" or pre[0]["replacement"] != SPACE:
        raise _refusal(engine, "it treats spaces in another way than SentencePiece")
    if pre[0].get("split", True) and any(SPACE in text[1:] for text in content["model"]["vocab"]):
        raise _refusal(engine, "it splits text at spaces, though it has tokens with a space inside")
    scheme = pre[0]["prepend_scheme"]
    if scheme != "never":
        notes.append("The tokenizer puts no second space where text begins with one; the engine does.")
    if scheme == "first":
        notes.append(
            "The tokenizer puts a space before a text, but not after an added token inside it; the engine does both."
        )
    return scheme != "never", notes


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [(first, second) for first, second in model["merges"]]


def _scores(model: dict[str, Any], texts: list[str]) -> tuple[list[float], list[str]]:
    """The rank of the first merge that gives a piece, negative: the engine merges to the piece with the highest score."""
    ranks: dict[str, int] = {}
    last, late = None, set()
    for rank, pair in enumerate(_pairs(model)):
        piece = "".join(pair)
        if piece in ranks and piece != last:
            late.add(piece)
        ranks.setdefault(piece, rank)
        last = piece
    notes = [f"For {len(late):,} pieces the engine may merge in another order than the tokenizer."] if late else []
    return [float(-ranks[text]) if text in ranks else LOWEST_SCORE for text in texts], notes


def _pre_tokenizer(content: dict[str, Any], engine: str) -> str:
    model = content["model"]
    steps = canonical_steps(_parts(content["pre_tokenizer"], "pretokenizers"))
    fitting = {name: known for name, known in PRE_TOKENIZERS.items() if known.steps == steps}
    if not fitting:
        raise _refusal(engine, f"its pre-tokenizer is not one of those: {str(content['pre_tokenizer'])[:300]}")
    whole_words = bool(model.get("ignore_merges"))
    for name, known in fitting.items():
        if known.whole_words == whole_words:
            return name
    added = {token["content"] for token in content["added_tokens"]}
    if not _merges_give_every_token(model, added):
        raise _refusal(engine, "it has tokens that its merges do not give, which the engine treats otherwise")
    return next(iter(fitting))


def _merges_give_every_token(model: dict[str, Any], added: set[str]) -> bool:
    """Whether it is the same to look a word up whole first (`ignore_merges`) and to merge its bytes."""
    plain = models.BPE(vocab=model["vocab"], merges=_pairs(model))
    return all(len(plain.tokenize(text)) == 1 for text in model["vocab"].keys() - added)
