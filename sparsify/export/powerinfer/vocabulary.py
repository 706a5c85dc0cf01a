"""A model's vocabulary in the form that PowerInfer's tokenizers need: SentencePiece's pieces, or byte-level BPE."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import TokenType
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparsify.errors import ExportError
from sparsify.export.powerinfer.bpe import EngineTokenizer, check_same_ids

PIECES_FILE = "tokenizer.model"
ADDED_SCORE = -1000.0
SPACE = "\u2581"
"""SentencePiece's sign for a space."""
BPE = 2
"""The model type's number in sentencepiece."""
PREFIX_NOTE = (
    "This tokenizer puts a space before a text, and so do PowerInfer's `server` and `perplexity`, but not its `main`: there, "
    "begin every prompt with a space."
)
NO_PREFIX_NOTE = (
    "PowerInfer's `server` and `perplexity` put a space before a prompt, but this tokenizer and its `main` do not: in these "
    "two, the first token of a prompt differs."
)
BOS_NOTE = (
    "PowerInfer's `server` puts the token that begins a text before every prompt; this tokenizer and the engine's other programs "
    "do not."
)


@dataclass(frozen=True)
class Vocabulary:
    """One token for every row of the embedding.

    Attributes:
        model: The engine's name of the tokenizer, `llama` or `gpt2`.
        scores: For `llama`: the higher, the earlier a piece is merged.
        merges: For `gpt2`: the two parts with a space between, the first merge first.
        num_pieces: Number of tokens in tokenizer.model; the others were added.
        prefix: What a prompt must begin with in `main`, so that it has the ids of the model's tokenizer.
        notes: Where ids differ between the engine's programs and the model's tokenizer, in sentences.
        engine: For `gpt2`: the engine's algorithm.
    """

    model: str
    texts: list[bytes]
    scores: list[float]
    types: list[int]
    num_pieces: int
    prefix: str
    notes: list[str]
    merges: list[str] = field(default_factory=list)
    engine: EngineTokenizer | None = None

    @property
    def added(self) -> dict[str, int]:
        """Ids of the tokens that are not in tokenizer.model, for added_tokens.json."""
        return {self.texts[index].decode(): index for index in range(self.num_pieces, len(self.texts))}


def read_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> Vocabulary:
    """Reads tokenizer.model, or the merges of a byte-level BPE tokenizer, and adds the other tokens of the tokenizer and a
    token for every other row of the embedding.

    Raises:
        ExportError: If the engine's tokenizer would give other ids than the model's.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if content["model"]["type"] == "BPE" and "ByteLevel" in json.dumps(content["pre_tokenizer"]):
        return _read_bpe(content, tokenizer, vocab_size)
    path = folder / PIECES_FILE
    if not path.is_file():
        raise ExportError(
            f"{folder} has no {PIECES_FILE}, and its tokenizer is not byte-level BPE; PowerInfer needs one of them.",
            next_step=f"Copy the {PIECES_FILE} of the base model there, if it has one.",
        )
    model = _read_model(path)
    pieces, size = model.pieces, len(model.pieces)
    if size > vocab_size:
        raise ExportError(f"{path} has {size:,} pieces, but the model's embedding has only {vocab_size:,} rows.")
    own = tokenizer.get_vocab()
    for number, piece in enumerate(pieces):
        if own.get(piece.piece) != number:
            raise ExportError(
                f"{path} belongs to another tokenizer: its piece {number} is {piece.piece!r}, whose id in the model's tokenizer "
                f"is {own.get(piece.piece)}.",
                next_step=f"Copy the {PIECES_FILE} that belongs to the model's tokenizer.json.",
            )
    texts = [piece.piece.encode() for piece in pieces]
    scores = [piece.score for piece in pieces]
    # gguf.TokenType has SentencePiece's numbers. The engine prints nothing for a user-defined piece, a newline for example.
    types = [_printed(int(piece.type)) for piece in pieces]
    added = dict(tokenizer.added_tokens_decoder)
    for number in range(size, vocab_size):
        token = added.get(number)
        # Every row needs a token, since the engine takes the number of tokens as the embedding's size.
        texts.append(f"[PAD{number}]".encode() if token is None else token.content.encode())
        scores.append(ADDED_SCORE)
        if token is None:
            types.append(int(TokenType.UNUSED))
        else:
            types.append(int(TokenType.CONTROL if token.special else TokenType.NORMAL))
    adds_space = tokenizer.tokenize("Once")[0].startswith(SPACE)
    note = PREFIX_NOTE if adds_space else NO_PREFIX_NOTE
    return Vocabulary("llama", texts, scores, types, size, " " * adds_space, [note])


def _read_bpe(content: dict[str, Any], tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> Vocabulary:
    by_id = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(by_id) >= vocab_size:
        raise ExportError(f"The tokenizer has ids up to {max(by_id):,}, but the embedding only {vocab_size:,} rows.")
    added = {token["id"]: token for token in content["added_tokens"]}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    signs = set(pre_tokenizers.ByteLevel.alphabet())
    texts, types, unprinted = [], [], []
    for number in range(vocab_size):
        text, kind = by_id.get(number, f"[PAD{number}]"), TokenType.NORMAL
        if number not in by_id:
            kind = TokenType.UNUSED
        elif number in added:
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.NORMAL
        if kind == TokenType.NORMAL and not signs.issuperset(text):
            # The engine fails when it prints a normal token with other signs than those of bytes.
            kind = TokenType.USER_DEFINED
            unprinted.append(text)
        texts.append(text)
        types.append(int(kind))
    engine = EngineTokenizer(texts, [(pair.split(" ")[0], pair.split(" ")[1]) for pair in merges])
    if not engine.reads_newlines:
        raise ExportError("The tokenizer has no tokens for some bytes that PowerInfer needs to load it: 0x8A or 0xC4.")
    plain = [token["content"] for token in added.values() if not token["special"]]
    check_same_ids(engine, tokenizer, [token["content"] for token in added.values() if token["special"]])
    prefix, notes = _bos_notes(tokenizer)
    if engine.missing_bytes:
        notes.append(
            f"{len(engine.missing_bytes)} of 256 bytes have no token; PowerInfer ends with an error at text that contains one of them."
        )
    if lost := [text for text in plain if engine.ids(text) != tokenizer.convert_tokens_to_ids([text])]:
        notes.append(f"PowerInfer reads {', '.join(map(repr, lost[:5]))} in a text as other tokens.")
    if unprinted:
        notes.append(f"PowerInfer prints nothing for {', '.join(map(repr, unprinted[:5]))}.")
    encoded = [text.encode() for text in texts]
    return Vocabulary("gpt2", encoded, [], types, len(encoded), prefix, notes, merges, engine)


def _bos_notes(tokenizer: PreTrainedTokenizerFast) -> tuple[str, list[str]]:
    """What a prompt must begin with in `main`, and the notes on it."""
    whole, plain = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False))
    if whole == plain:
        return "", [BOS_NOTE]
    if whole[1:] != plain:
        raise ExportError(
            "The tokenizer puts other tokens around a text than one before it; PowerInfer's programs cannot do that."
        )
    prefix = str(tokenizer.convert_ids_to_tokens(whole[0]))
    return prefix, [
        f"This tokenizer puts {prefix} before a text, and so does PowerInfer's `server`, but not its `main` and `perplexity`: "
        "begin every prompt of `main` with it."
    ]


def _printed(kind: int) -> int:
    return int(TokenType.NORMAL) if kind == TokenType.USER_DEFINED else kind


def _read_model(path: Path) -> Any:
    model: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ExportError(f"{path} cannot be read: {error}") from error
    if model.trainer_spec.model_type != BPE:
        raise ExportError(
            f"{path} is not a BPE model. PowerInfer merges pieces by score, which gives wrong tokens for other model types."
        )
    if not any(piece.type == TokenType.BYTE for piece in model.pieces):
        raise ExportError(f"{path} has no byte pieces, without which PowerInfer fails on unknown characters.")
    return model
