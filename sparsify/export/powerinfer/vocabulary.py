"""A model's vocabulary in the form that PowerInfer's SentencePiece tokenizer needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from transformers import PreTrainedTokenizerFast

from sparsify.errors import ExportError

PIECES_FILE = "tokenizer.model"
ADDED_SCORE = -1000.0
BPE = 2
"""The model type's number in sentencepiece."""
DUMMY_PREFIX_NOTE = (
    "PowerInfer adds a space before every prompt, but this tokenizer does not: the first token of a prompt differs."
)


@dataclass(frozen=True)
class Vocabulary:
    """One token for every row of the embedding.

    Attributes:
        texts: UTF-8 text of each token.
        scores: SentencePiece score of each token.
        types: gguf.TokenType of each token.
        num_pieces: Number of tokens in tokenizer.model; the others were added.
        notes: Differences of the engine's tokenizer.
    """

    texts: list[bytes]
    scores: list[float]
    types: list[int]
    num_pieces: int
    notes: list[str]

    @property
    def added(self) -> dict[str, int]:
        """Ids of the tokens that are not in tokenizer.model, for added_tokens.json."""
        return {self.texts[index].decode(): index for index in range(self.num_pieces, len(self.texts))}


def read_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> Vocabulary:
    """Reads tokenizer.model, and adds the other tokens of the tokenizer and a token for every other row of the embedding.

    Args:
        folder: Folder with the tokenizer's files.
        tokenizer: The same tokenizer, as loaded by transformers.
        vocab_size: Rows of the embedding.

    Raises:
        ExportError: If the engine's tokenizer would give other ids than the model's.
    """
    path = folder / PIECES_FILE
    if not path.is_file():
        raise ExportError(
            f"{folder} has no {PIECES_FILE}, which PowerInfer's SentencePiece tokenizer needs.",
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
    types = [int(piece.type) for piece in pieces]  # gguf.TokenType has SentencePiece's numbers
    added = dict(tokenizer.added_tokens_decoder)
    for number in range(size, vocab_size):
        token = added.get(number)
        # Every row needs a token, since the engine takes the number of tokens as the embedding's size.
        texts.append(f"[PAD{number}]".encode() if token is None else token.content.encode())
        scores.append(ADDED_SCORE)
        if token is None:
            types.append(int(TokenType.UNUSED))
        else:
            types.append(int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED))
    notes = [] if model.normalizer_spec.add_dummy_prefix else [DUMMY_PREFIX_NOTE]
    return Vocabulary(texts, scores, types, size, notes)


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
