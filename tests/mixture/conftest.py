from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparsify.mixture.tokens.encoder import Encoded
from sparsify.mixture.tokens.ingest import Ingest
from sparsify.mixture.tokens.pool import SIZES, IngestSizes
from sparsify.mixture.tokens.tokenized_source import Need, TokenizedSource
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.source import SourceSection

WORDS = [
    "river",
    "stone",
    "cloud",
    "amber",
    "quiet",
    "seven",
    "lantern",
    "orbit",
    "maple",
    "violet",
    "harbour",
    "copper",
]

SMALL = IngestSizes(shard_tokens=100, batch_documents=4)
"""Batches of four documents and shards of about a hundred tokens."""


def story(number: int, num_words: int) -> str:
    """A document whose words `marker<number>` occur in no other document."""
    filler = [WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(num_words)]
    return f"marker{number}x " + " ".join(filler) + f" marker{number}x"


Tokenized = tuple[list[int], list[bool], bool]
"""Ids of a document, which of them carry loss as targets, and whether it is held out."""


def ingest_of(
    mixture: MixtureSection,
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path,
    train_tokens: int = 10**9,
    held_out_tokens: int = 10**9,
    sizes: IngestSizes = SIZES,
) -> Ingest:
    """What to tokenise of one source; to its end unless stated otherwise."""
    return Ingest(name, mixture, tokenizer, Need(train_tokens, held_out_tokens), cache_dir, sizes)


def documents_of(source: TokenizedSource) -> list[Tokenized]:
    """Every document in the cache of a source, in the order of the source."""
    found = []
    for number in range(len(source.cache.records)):
        shard = source.cache.shard(number)
        for start, length, held_out in zip(shard.starts, shard.lengths, shard.held_out, strict=True):
            place = slice(start, start + length)
            mask = [True] * length if shard.loss is None else (shard.loss[place] != 0).tolist()
            found.append((shard.tokens[place].tolist(), mask, bool(held_out)))
    return found


def ids_of(encoded: Encoded) -> list[NDArray[np.unsignedinteger]]:
    """Token ids of each document. [T] each"""
    return np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((story(number, 30) for number in range(50)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(rows: list[dict[str, object]], name: str = "rows.jsonl") -> str:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(path)

    return write


@pytest.fixture
def stories(write_jsonl: Callable[..., str]) -> SourceSection:
    """60 pretraining documents of very different lengths."""
    rows: list[dict[str, object]] = [{"text": story(n, 3 + n * n % 37)} for n in range(60)]
    return SourceSection(token_share=0.7, files=[write_jsonl(rows, "stories.jsonl")])


@pytest.fixture
def chats(write_jsonl: Callable[..., str]) -> SourceSection:
    """40 prompts with responses."""
    rows: list[dict[str, object]] = [
        {"prompt": f"question{n} about {WORDS[n % 12]}", "response": f"answer{n} is {story(n, 5)}"} for n in range(40)
    ]
    files = [write_jsonl(rows, "chats.jsonl")]
    return SourceSection(token_share=0.3, group="instruction", files=files)


@pytest.fixture
def mixture(stories: SourceSection, chats: SourceSection) -> MixtureSection:
    return MixtureSection(name="tiny", sources={"stories": stories, "chats": chats}, validation_fraction=0.2)


@pytest.fixture
def tokenized(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> dict[str, TokenizedSource]:
    """Both sources of `mixture`, completely tokenised."""
    return {name: ingest_of(mixture, name, tokenizer, tmp_path / "cache").run() for name in mixture.sources}
