"""PowerInfer's `gpt2` tokenizer gives a byte-level BPE model's ids, or the model is refused."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparsify.conversion.sparse_folder import write_config
from sparsify.errors import ExportError
from sparsify.export.powerinfer.bpe import EngineTokenizer, engine_words, other_share
from sparsify.export.powerinfer.export import PowerInferSettings, check_model, export_powerinfer
from sparsify.export.powerinfer.vocabulary import BOS_NOTE, read_vocabulary
from sparsify.models import SparseMistralConfig, SparseMistralForCausalLM
from sparsify.runs.load import Loaded, load
from tests.conftest import SHAPE
from tests.export.powerinfer_engine import File, engine_logits
from tests.predictors.untrained import random_predictors

SIZE, ROWS = 1500, 1504
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Qwen2's, without its endings: it takes a sign together with the letters after it."""
Split = Callable[[], Any]


def byte_level(**more: Any) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | more)


SPLITS: dict[str, Split] = {
    "gpt2": byte_level,
    "single digits": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]),
    "letters": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LETTERS), "isolated"), byte_level(use_regex=False)]
    ),
    "space first": lambda: byte_level(add_prefix_space=True),
}


def tokenizer(name: str, *added: AddedToken) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on code of the standard library."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = SPLITS[name](), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(map(inspect.getsource, (argparse, json, inspect)), trainer)
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")


@pytest.fixture(scope="module", params=["gpt2", "single digits"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("bpe")
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": ROWS, "intermediate_size": 1024, "bos_token_id": 0, "eos_token_id": 1}
    config = SparseMistralConfig(**shape, sliding_window=None, ffn_activation="drelu")
    SparseMistralForCausalLM(config).save_pretrained(folder)
    write_config(config, folder, torch.float32)
    tokenizer(request.param).save_pretrained(folder)
    return load(str(folder))


TEXTS = (
    "Once upon a time, in 2024, there were 12,345 cats; it's what they'd said.",
    "def test_it(x):\n    return x[0] + self._name(y)\n\nassert 1 == 1",
    "caf\u00e9 \u5317\u4eac \U0001f642 <|begin|>user<|end|>",
)


def test_the_file_has_the_vocabulary_and_gives_the_same_ids(loaded: Loaded, tmp_path: Path) -> None:
    ids = torch.tensor([loaded.tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]])
    batch = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None]}
    predictors = random_predictors(loaded.model, -1e9, "residual")
    written = export_powerinfer(loaded, predictors, [batch], tmp_path / "out", PowerInferSettings("tiny"))
    file = File(tmp_path / "out" / written.model_file)
    keys = {name.removeprefix("tokenizer.ggml."): value for name, value in file.keys.items() if "tokenizer" in name}
    assert keys["model"] == "gpt2"
    assert (keys["bos_token_id"], keys["eos_token_id"]) == (0, 1)
    # Absent keys would be tokens of another vocabulary; the engine reads the largest number as none.
    assert keys["unknown_token_id"] == 2**32 - 1
    assert "scores" not in keys
    assert keys["tokens"][:2] + keys["tokens"][SIZE:] == [
        "<|begin|>",
        "<|end|>",
        *(f"[PAD{i}]" for i in range(SIZE, ROWS)),
    ]
    kinds = [TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL, TokenType.UNUSED]
    assert [keys["token_type"][i] for i in (0, 1, 2, SIZE)] == kinds
    engine = EngineTokenizer(keys["tokens"], [tuple(pair.split(" ")) for pair in keys["merges"]])
    for text in TEXTS:
        assert engine.ids(text) == loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = loaded.model(ids, use_cache=False).logits[0]
    assert (engine_logits(file, ids[0]) - expected).abs().max() < 1e-2 * expected.abs().max()
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "-p 'Once upon a time'" in readme
    assert "other ids than the model's for 0.00% of the tokens" in readme


# Each checked in the engine itself: 1,974 texts of code, prose and random signs gave the ids of `EngineTokenizer`.
WORDS = {
    "It's 12 cats": ["It", "'s", " 12", " cats"],
    "a\n    return": ["a", "\n   ", " return"],
    "a  2": ["a", " ", " 2"],
    "x\n\n- item": ["x", "\n", "\n-", " item"],
    "one    (x": ["one", "    ", "(x"],
    "    (x": ["    ", "(x"],
    "a ": ["a "],
    "a1": ["a1"],
    "'llama": ["'ll", "ama"],
}


@pytest.mark.parametrize("text", WORDS)
def test_the_engine_splits_words_in_its_own_way(text: str) -> None:
    assert list(engine_words(text)) == WORDS[text]


@pytest.mark.parametrize(
    ("name", "words"), [("letters", "splits text as GPT-2 does"), ("space first", "and PowerInfer")]
)
def test_a_tokenizer_that_splits_otherwise_is_refused(name: str, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        read_vocabulary(Path("nowhere"), tokenizer(name), ROWS)


def test_text_that_the_engine_reads_otherwise_is_counted() -> None:
    own = tokenizer("gpt2")
    engine = read_vocabulary(Path("nowhere"), own, ROWS).engine
    assert engine is not None
    assert other_share(engine, own, TEXTS) == 0
    text = "    (a)\n    (b)\n"
    assert engine.ids(text) != own(text, add_special_tokens=False)["input_ids"]
    assert 0 < other_share(engine, own, [text]) < 1


def test_what_the_engine_cannot_print_or_begin_with_is_said() -> None:
    own = tokenizer("gpt2", AddedToken("two words", normalized=False), AddedToken("returnq", normalized=False))
    vocabulary = read_vocabulary(Path("nowhere"), own, ROWS)
    # As a normal token, the space would end the engine's process when it is printed.
    assert vocabulary.types[SIZE : SIZE + 2] == [TokenType.USER_DEFINED, TokenType.NORMAL]
    assert vocabulary.notes == [
        BOS_NOTE,
        "PowerInfer reads 'returnq' in a text as other tokens.",
        "PowerInfer prints nothing for 'two words'.",
    ]
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    vocabulary = read_vocabulary(Path("nowhere"), own, ROWS)
    assert vocabulary.prefix == "<|begin|>"
    assert "begin every prompt of `main` with it" in vocabulary.notes[0]


def test_bytes_without_a_token_are_said() -> None:
    whole = tokenizer("gpt2")
    content = whole.backend_tokenizer
    vocabulary = {text: number for text, number in whole.get_vocab().items() if text not in ("\u0100", "\u0101")}
    ordered = sorted(vocabulary, key=lambda text: vocabulary[text])
    model = json.loads(content.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"] if {"\u0100", "\u0101"}.isdisjoint("".join(pair))]
    engine = EngineTokenizer(ordered, merges)
    assert engine.missing_bytes == ["\u0100", "\u0101"]
    assert engine.reads_newlines


def test_the_layout_of_the_engines_converter_is_refused(loaded: Loaded) -> None:
    with pytest.raises(ExportError, match="needs a SentencePiece tokenizer"):
        check_model(loaded, "f16", None, layout="powerinfer_hf")
    with pytest.raises(ExportError, match="ids up to 1,499, but the embedding only 1,000 rows"):
        read_vocabulary(Path("nowhere"), loaded.tokenizer, 1000)
