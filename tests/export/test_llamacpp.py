"""A file for llama.cpp holds the model's weights, vocabulary and settings; what it would compute otherwise is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from sparsify.cli import main
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import ExportError, RecipeError
from sparsify.export.gguf_pre_tokenizers import PRE_TOKENIZERS
from sparsify.export.gguf_tokens import read_tokens
from sparsify.export.llamacpp.export import SPEED_NOTE, export_llamacpp
from sparsify.export.llamacpp.rules import check_holdable
from sparsify.export.weight_shards import read_sums, sha256
from sparsify.mixture.lock import read_lock
from sparsify.runs.load import find_trained, load_trained
from tests.conftest import TOKENIZER, Setup
from tests.conversion.test_gguf_file import interleaved
from tests.conversion.test_sources import as_it_is
from tests.export.llamacpp_models import MODELS, byte_level, config_of, sentence_piece, with_tokenizer, written_model

IDS = torch.randint(3, 2000, (1, 40), generator=torch.Generator().manual_seed(0))
DENSE = [name for name in MODELS if MODELS[name]["ffn_activation"] == "swiglu"]


def exported(folder: Path, to: Path, *more: Any) -> Path:
    written = export_llamacpp(str(folder), to, *more)
    return to / written.model_file


def keys_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def tensors_of(file: Path) -> dict[str, tuple[str, np.ndarray]]:
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape([*map(int, reversed(tensor.shape))])
        found[tensor.name] = tensor.tensor_type.name, values
    return found


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_file_read_back_has_the_models_logits(name: str, tmp_path: Path) -> None:
    model = written_model(tmp_path / "model", name)
    file = exported(tmp_path / "model", tmp_path / "out", "fp32")
    back = as_it_is(file, tmp_path / "back", tokenizer=str(TOKENIZER))
    with torch.no_grad():
        ours = load_sparse(back, dtype=torch.float32)(IDS).logits
        torch.testing.assert_close(ours, model(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "q8_0", "q4_0"])
def test_every_type_holds_the_weights_rounded_to_it(dtype: str, tmp_path: Path) -> None:
    model = written_model(tmp_path / "model", "mixtral")
    tensors = tensors_of(exported(tmp_path / "model", tmp_path / "out", dtype))
    kind = {"fp16": "F16", "fp32": "F32"}.get(dtype, dtype.upper())
    own = model.model.layers[1]
    half = model.config.intermediate_size
    expected = {
        "token_embd": (kind, model.model.embed_tokens.weight),
        "output": ("Q8_0" if dtype == "q4_0" else kind, model.lm_head.weight),
        "output_norm": ("F32", model.model.norm.weight),
        "blk.1.attn_q": (kind, interleaved(own.self_attn.q_proj.weight, 4)),
        "blk.1.attn_v": (kind, own.self_attn.v_proj.weight),
        "blk.1.ffn_gate_inp": ("F32", own.mlp.gate.weight),
        "blk.1.ffn_gate_exps": (kind, own.mlp.experts.gate_up_proj[:, :half]),
        "blk.1.ffn_up_exps": (kind, own.mlp.experts.gate_up_proj[:, half:]),
        "blk.1.ffn_down_exps": (kind, own.mlp.experts.down_proj),
    }
    for name, (stored, weight) in expected.items():
        found, values = tensors[f"{name}.weight"]
        assert found == stored, name
        type_ = gguf.GGMLQuantizationType[stored]
        rounded = gguf.dequantize(gguf.quantize(weight.detach().numpy(), type_), type_).reshape(weight.shape)
        np.testing.assert_array_equal(values, rounded, err_msg=name)
    assert len(tensors) == 3 + 2 * 10


def test_a_reglu_model_is_one_expert_of_smallthinker(tmp_path: Path) -> None:
    model = written_model(tmp_path / "model", "reglu")
    written = export_llamacpp(str(tmp_path / "model"), tmp_path / "out", "fp32")
    assert written.notes == [SPEED_NOTE]
    keys = keys_of(tmp_path / "out" / written.model_file)
    assert keys["general.architecture"] == "smallthinker"
    own = {
        name.removeprefix("smallthinker."): value for name, value in keys.items() if name.startswith("smallthinker.")
    }
    assert own["expert_count"] == own["expert_used_count"] == 1
    assert own["expert_gating_func"] == 2
    assert own["expert_feed_forward_length"] == 64
    assert "attention.sliding_window" not in own
    tensors = tensors_of(tmp_path / "out" / written.model_file)
    assert not tensors["blk.0.ffn_gate_inp.weight"][1].any()
    layer = model.model.layers[0]
    for name, weight in (
        ("attn_q", layer.self_attn.q_proj.weight),  # in transformers' order
        ("attn_k", layer.self_attn.k_proj.weight),
        ("ffn_gate_exps", layer.mlp.gate_proj.weight[None]),
        ("ffn_up_exps", layer.mlp.up_proj.weight[None]),
        ("ffn_down_exps", layer.mlp.down_proj.weight[None]),
    ):
        np.testing.assert_array_equal(tensors[f"blk.0.{name}.weight"][1], weight.detach().numpy(), err_msg=name)


def test_the_weights_have_the_dtype_of_the_model_unless_another_is_given(tmp_path: Path) -> None:
    model = written_model(tmp_path / "model", "mistral")
    model.bfloat16().save_pretrained(tmp_path / "half")
    shutil.copytree(
        tmp_path / "model", tmp_path / "half", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors")
    )
    for folder, kind in (("model", "F32"), ("half", "BF16")):
        file = exported(tmp_path / folder, tmp_path / f"{folder}-out")
        assert tensors_of(file)["blk.0.ffn_up.weight"][0] == kind


def test_a_run_is_exported_from_its_checkpoint(finished: Callable[[Setup], tuple[Path, dict]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished(Setup("mistral", 2, 2, "bf16"))[0], run)
    with pytest.raises(ExportError, match=r"its activation is drelu, max\(0, gate\) × max\(0, up\), which none of"):
        export_llamacpp(str(run), tmp_path / "out")
    # The same weights under an activation that llama.cpp has.
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("ffn_activation: drelu", "ffn_activation: reglu"))
    file = exported(run, tmp_path / "out")
    trained = find_trained(run)
    assert trained is not None
    model: Any = load_trained(trained)
    tensors = tensors_of(file)
    kind, values = tensors["blk.1.ffn_down_exps.weight"]
    assert kind == "BF16"
    np.testing.assert_array_equal(values[0], model.model.layers[1].mlp.down_proj.weight.detach().float().numpy())
    assert keys_of(file)["tokenizer.chat_template"] == read_lock(run / "mixture.lock.json").chat_template


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"ffn_activation": "drelu"}, r"drelu, max\(0, gate\) × max\(0, up\), which none of llama.cpp's"),
    ("mistral", {"ffn_activation": "relu2"}, "its activation is relu2"),
    ("mistral", {"ffn_activation": "fatrelu"}, "its activation is fatrelu"),
    ("mixtral", {"ffn_activation": "reglu"}, "routes a token by the residual before the attention"),
    ("mistral", {"sliding_window": 64}, "up to 64 tokens they agree: --context-tokens 64"),
    ("mistral", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "the rule 'dynamic'"),
    ("yarn", {"rope_parameters": MODELS["yarn"]["rope_parameters"] | {"beta_fast": 16}}, "set beta_fast to 16"),
    ("reglu", {"rope_parameters": MODELS["llama3"]["rope_parameters"]}, "smallthinker does not apply"),
    ("mistral", {"intermediate_size": 72}, "intermediate_size 72 must be a multiple of that"),
    (
        "reglu",
        {"sparsification": {"method": "thresholds", "sites": {"inter": {"rule": "threshold", "per": "channel"}}}},
        "a mask of thresholds on inter",
    ),
]


@pytest.mark.parametrize(("name", "change", "words"), REFUSED, ids=[words[:30] for _, _, words in REFUSED])
def test_what_llamacpp_would_compute_otherwise_is_refused(name: str, change: dict[str, Any], words: str) -> None:
    check_holdable(config_of(name), "q4_0", None)
    with pytest.raises(ExportError, match=words):
        check_holdable(config_of(name, **change), "q4_0", None)


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    written_model(tmp_path / "model", "mistral", sliding_window=64)
    keys = keys_of(exported(tmp_path / "model", tmp_path / "out", None, 64))
    assert keys["llama.context_length"] == 64
    assert "llama.attention.sliding_window" not in keys
    with pytest.raises(ExportError, match="the model's maximum is 128"):
        check_holdable(config_of("mistral"), "bf16", 129)
    with pytest.raises(RecipeError, match="--dtype"):
        check_holdable(config_of("mistral"), "int4", None)


def test_tokens_keep_their_ids_types_and_order_of_merges() -> None:
    tokenizer = sentence_piece("prepended")
    tokens = read_tokens(tokenizer, 2050, "llama.cpp")
    assert (tokens.model, tokens.pre, tokens.adds_space, tokens.adds_bos) == ("llama", None, True, True)
    assert tokens.types[:8] == [2, 3, 3, 4, 4, 4, 4, 6]  # unknown, control, user-defined, byte
    assert tokens.texts[-2:] == ["[PAD2048]", "[PAD2049]"]
    assert tokens.types[-2:] == [5, 5]
    by_text = dict(zip(tokens.texts, tokens.scores, strict=True))
    assert by_text["▁▁"] > by_text["se"] > by_text["self"] > by_text["<0x00>"]
    bytes_ = read_tokens(byte_level("smollm", bos=False), 800, "llama.cpp")
    assert (bytes_.model, bytes_.pre, bytes_.adds_bos) == ("gpt2", "smollm", False)
    assert len(bytes_.merges[0].split(" ")) == 2


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_are_told_apart(name: str) -> None:
    assert read_tokens(byte_level(name), 800, "llama.cpp").pre == name


UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}
OTHER_TOKENIZERS: list[tuple[dict[str, Any], str]] = [
    ({"normalizer": {"type": "Lowercase"}}, "it normalises text by Lowercase|treats spaces in another way"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "treats spaces in another way"),
    (
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}},
        "it splits text",
    ),
    ({"model": UNIGRAM, "added_tokens": []}, "its model is Unigram, not BPE"),
]


@pytest.mark.parametrize(("change", "words"), OTHER_TOKENIZERS)
def test_a_tokenizer_that_llamacpp_does_not_have_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        read_tokens(sentence_piece("none", **change), 2048, "llama.cpp")


def test_an_unknown_pre_tokenizer_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written_model(tmp_path / "model", "mistral")
    tokenizer = byte_level("qwen2")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W+"
    tokenizer = tokenizer.__class__(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(content)), eos_token="</s>"
    )
    with_tokenizer(tmp_path / "model", tokenizer)
    assert run_cli(str(tmp_path / "model"), "--to", str(tmp_path / "out"), "--format", "llamacpp") == 2
    said = "".join(capsys.readouterr())
    assert "its pre-tokenizer is not one of those" in said
    assert "llama-bpe" in said
    assert not (tmp_path / "out").exists()


def test_tokens_that_only_whole_words_give_need_a_tokenizer_that_takes_them() -> None:
    for name, merges in (("tekken", False), ("qwen2", True)):
        tokenizer = byte_level(name, ignore_merges=merges)
        assert read_tokens(tokenizer, 800, "llama.cpp").pre == name, "its merges give every token"
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        word = max((token for token in content["model"]["vocab"] if token.isalpha()), key=len)
        content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != word]
        changed = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
        with pytest.raises(ExportError, match="tokens that its merges do not give"):
            read_tokens(tokenizer.__class__(tokenizer_object=changed), 800, "llama.cpp")


def run_cli(*arguments: str) -> int | str | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sparsify", "export", *arguments])
        try:
            main.main()
        except SystemExit as end:
            return end.code
    return 0


def test_the_command_writes_a_folder_with_its_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written_model(tmp_path / "model", "mistral")
    options = ["--format", "llamacpp", "--dtype", "q8_0", "--context-tokens", "96"]
    assert run_cli(str(tmp_path / "model"), "--to", str(tmp_path / "out"), *options) == 0
    assert "out.gguf" in capsys.readouterr().out
    sums = read_sums(tmp_path / "out")
    assert sums.keys() == {"out.gguf", "README.md", "export.json"}
    assert all(sha256(tmp_path / "out" / name) == digest for name, digest in sums.items())
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "-m out.gguf -c 96" in readme
    assert json.loads((tmp_path / "out" / "export.json").read_text())["dtype"] == "q8_0"
    assert run_cli(str(tmp_path / "model"), "--to", str(tmp_path / "out"), *options) == 2
    assert "never overwrites" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "options", [["--ffn-type", "q4_0"], ["--predictors", "p"], ["--shard-gb", "1"], ["--push-to-hub", "a/b"]]
)
def test_options_of_other_formats_are_refused(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("model", "--to", str(tmp_path / "out"), "--format", "llamacpp", *options) == 2
    assert f"--format llamacpp does not take {options[0]}" in "".join(capsys.readouterr())


def test_a_weight_that_is_not_finite_leaves_nothing_behind(tmp_path: Path) -> None:
    model = written_model(tmp_path / "model", "mistral")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_up\.weight has values that are not finite"):
        export_llamacpp(str(tmp_path / "model"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
