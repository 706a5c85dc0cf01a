"""llama.cpp itself computes from an exported file what the model computes, and its tokenizer gives the same ids."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.export.gguf_pre_tokenizers import PRE_TOKENIZERS
from sparsify.export.llamacpp.export import export_llamacpp
from sparsify.export.llamacpp.rules import TYPES
from tests.conftest import TOKENIZER
from tests.export.llamacpp_models import MODELS, TEXTS, byte_level, sentence_piece, with_tokenizer, written_model

llama_cpp = pytest.importorskip("llama_cpp")

IDS = torch.randint(3, 2000, (48,), generator=torch.Generator().manual_seed(0))
FULL = {"type_k": 0, "type_v": 0}
"""Keys and values in F32, by ggml's number."""


def engine(folder: Path, to: Path, *more: Any, **settings: Any) -> Any:
    written = export_llamacpp(str(folder), to, *more)
    options = (
        {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "logits_all": True} | FULL | settings
    )
    return llama_cpp.Llama(str(to / written.model_file), **options)


def difference(model: Any, engine: Any) -> float:
    """Largest difference of the logits of all tokens, as a share of the largest logit."""
    with torch.no_grad():
        expected = model(IDS[None], use_cache=False).logits[0]
    engine.reset()
    engine.eval(IDS.tolist())
    found = torch.tensor(engine.scores[: len(IDS)])
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_has_the_models_logits(name: str, tmp_path: Path) -> None:
    model = written_model(tmp_path / "model", name)
    assert difference(model, engine(tmp_path / "model", tmp_path / "out", "fp32")) < 1e-4


def round_weights(model: Any, dtype: str) -> None:
    """Gives a model the weights that a file of this type holds."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and not name.endswith("mlp.gate.weight"):
                kind = TYPES["q8_0" if dtype == "q4_0" and name == "lm_head.weight" else dtype]
                stored = gguf.quantize(weight.numpy(), kind)
                weight.copy_(torch.from_numpy(gguf.dequantize(stored, kind).reshape(weight.shape)))


def skip_if_it_crashes(file: str) -> None:
    """A build for a newer CPU, or for one whose matrix unit the virtual machine does not pass on, ends the process."""
    code = "import sys, llama_cpp; llama_cpp.Llama(sys.argv[1], n_ctx=64, verbose=False).eval([*range(3, 40)])"
    ended = subprocess.run([sys.executable, "-c", code, file], capture_output=True, check=False).returncode
    if ended == -signal.SIGILL:
        pytest.skip("this build of llama.cpp has instructions that this machine does not")
    assert ended == 0


@pytest.mark.parametrize("name", ["mistral", "mixtral", "reglu"])
@pytest.mark.parametrize(("dtype", "allowed"), [("bf16", 0.015), ("fp16", 0.002), ("q8_0", 0.05), ("q4_0", 0.05)])
def test_the_engine_computes_with_the_weights_of_every_type(
    name: str, dtype: str, allowed: float, tmp_path: Path
) -> None:
    # All experts take part: rounded activations would send some tokens to others.
    more = {"num_experts_per_tok": 4} if name == "mixtral" else {}
    model = written_model(tmp_path / "model", name, **more)
    own = engine(tmp_path / "model", tmp_path / "out", dtype)
    skip_if_it_crashes(own.model_path)
    round_weights(model, dtype)
    with torch.no_grad():
        expected = model(IDS[None], use_cache=False).logits[0]
    own.eval(IDS.tolist())
    error = torch.tensor(own.scores[: len(IDS)]) - expected
    # llama.cpp rounds the activations to the type of the weights, or to eight bits.
    assert float(error.square().mean().sqrt() / expected.square().mean().sqrt()) < allowed


@pytest.mark.parametrize("name", ["mistral", "reglu"])
def test_greedy_text_and_perplexity_are_the_models(name: str, tmp_path: Path) -> None:
    model = written_model(tmp_path / "model", name)
    tokenizer = load_tokenizer(tmp_path / "model")
    own = engine(tmp_path / "model", tmp_path / "out", "fp32")
    for prompt in ("Once upon a time", "def read(path):\n"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        generated = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
        assert own.tokenize(prompt.encode(), special=True) == ids[0].tolist()
        own.reset()
        stream = own.generate(ids[0].tolist(), temp=0.0, repeat_penalty=1.0)
        found = list(itertools.takewhile(lambda number: number != 2, itertools.islice(stream, 24)))
        assert found == [number for number in generated.tolist() if number != 2]
    with torch.no_grad():
        logits = model(IDS[None], use_cache=False).logits[0]
    own.reset()
    own.eval(IDS.tolist())
    found = torch.tensor(own.scores[: len(IDS)])
    losses = [torch.nn.functional.cross_entropy(one[:-1], IDS[1:]).item() for one in (logits, found)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def assert_same_ids(tokenizer: Any, own: Any, texts: tuple[str, ...]) -> None:
    for text in texts:
        expected = list(tokenizer(text)["input_ids"])
        assert own.tokenize(text.encode(), add_bos=True, special=True) == expected, text


def vocabulary_engine(tokenizer: Any, folder: Path) -> Any:
    written_model(folder / "model", "mistral", num_hidden_layers=1)
    with_tokenizer(folder / "model", tokenizer)
    return engine(folder / "model", folder / "out", vocab_only=True)


def test_the_quickstarts_tokenizer_gives_its_ids(tmp_path: Path) -> None:
    written_model(tmp_path / "model", "mistral", num_hidden_layers=1)
    own = engine(tmp_path / "model", tmp_path / "out", vocab_only=True)
    assert_same_ids(load_tokenizer(TOKENIZER), own, TEXTS)
    assert own.metadata["tokenizer.chat_template"] == (TOKENIZER / "chat_template.jinja").read_text()
    assert (own.token_bos(), own.token_eos()) == (1, 2)
    for text in TEXTS[:5]:
        assert own.detokenize(own.tokenize(text.encode(), add_bos=False)).decode() == text


@pytest.mark.parametrize("spaces", ["none", "prepended", "always", "first"])
def test_sentencepiece_tokenizers_give_their_ids(spaces: str, tmp_path: Path) -> None:
    tokenizer = sentence_piece(spaces)
    own = vocabulary_engine(tokenizer, tmp_path)
    texts = TEXTS
    notes = json.loads((tmp_path / "out" / "export.json").read_text())["notes"]
    if spaces in ("always", "first"):  # text of which the notes say that it differs
        assert "no second space" in notes[0]
        texts = tuple(text for text in texts if not text.startswith(" ") and "\n " not in text and "> " not in text)
    if spaces == "first":
        assert "not after an added token" in notes[1]
        texts = tuple(text for text in texts if "\n" not in text)
    assert len(notes) == {"always": 1, "first": 2}.get(spaces, 0)
    assert_same_ids(tokenizer, own, texts)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_tokenizers_give_their_ids(name: str, tmp_path: Path) -> None:
    tokenizer = byte_level(name, bos=name != "smollm")
    own = vocabulary_engine(tokenizer, tmp_path)
    # What the notes of these two say that differs.
    odd = {"tekken": "\u0301", "deepseek-coder": "\u2028"}.get(name)
    notes = json.loads((tmp_path / "out" / "export.json").read_text())["notes"]
    assert notes == ([PRE_TOKENIZERS[name].note] if odd else [])
    assert_same_ids(tokenizer, own, tuple(text.replace(odd or "\0", "") for text in TEXTS))
