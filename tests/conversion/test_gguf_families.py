"""GGUF files of every family that transformers reads from them, named as llama.cpp's converter names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsify.conversion.convert import convert
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import ModelError
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection
from tests.conftest import FAMILY_STOCK, SHAPE, TOKENIZER
from tests.conversion.test_gguf_file import interleaved
from tests.models.test_families import IDS, family_of

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "attention_factor": 1.25,
}
MORE: dict[str, dict[str, Any]] = {
    # What a file does not say, and the converter takes for granted of Gemma 3: the period of its global layers.
    "gemma3_text": {
        "num_hidden_layers": 7,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    },
    "llama": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
}


def stock(kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    given = SHAPE | {"vocab_size": 2064} | FAMILY_STOCK[kind] | MORE.get(kind, {}) | fields
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.7, 0.2)
    return model


def one_by_one(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Fused experts as converters stack them: all of one projection in one tensor."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: value}
    stem = name.rpartition(".")[0]
    if name.endswith("down_proj"):
        return {f"{stem}.down_proj.weight": value}
    return dict(zip((f"{stem}.gate_proj.weight", f"{stem}.up_proj.weight"), value.chunk(2, dim=1), strict=True))


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """By llama.cpp's own table of names, with what its converter does to values."""
    config, kind = model.config, model.config.model_type
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], config.num_hidden_layers)
    given = {key: one for name, value in model.state_dict().items() for key, one in one_by_one(name, value).items()}
    found = {}
    for name, value in given.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        called = names.get_name(name, (".weight", ".bias"))
        assert called is not None, name
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if ARCHITECTURES[kind] == gguf.MODEL_ARCH.LLAMA and heads:
            value = interleaved(value, heads)
        found[called] = value + 1 if kind == "gemma3_text" and name.endswith("norm.weight") else value
    return found


def write(path: Path, model: Any, tensors: dict[str, torch.Tensor], **keys: Any) -> Path:
    """The keys that convert_hf_to_gguf.py writes for the architecture, and others."""
    config, kind = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[kind]])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    if kind == "gemma3_text":
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if FAMILY_STOCK[kind].get("head_dim"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if kind == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if kind in ("mistral", "phi3", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window or 0)
    if kind in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
    if kind == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(7)
    writer.add_pad_token_id(99_999)  # beyond the embedding
    for key, value in keys.items():
        name = f"{gguf.MODEL_ARCH_NAMES[ARCHITECTURES[kind]]}.{key.replace('__', '.')}"
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_it_is(source: Path, to: Path, kind: str) -> Path:
    section = ModelSection(source=str(source), tokenizer=str(TOKENIZER))
    activation = ActivationSection(family_of(kind).base_activation)
    return convert(section, activation, to, seed=0, dtype=torch.float32).folder


def check(model: Any, path: Path, tmp_path: Path) -> dict[str, Any]:
    """That the file has the model's logits; returns the config.json of what it is held as."""
    folder = as_it_is(path, tmp_path / "out", model.config.model_type)
    with torch.no_grad():
        ours = load_sparse(folder, dtype=torch.float32)(IDS).logits
        torch.testing.assert_close(ours, model(IDS).logits, atol=2e-5, rtol=1e-4)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_file_of_a_family_has_its_logits_and_is_held_as_that_family(kind: str, tmp_path: Path) -> None:
    model = stock(kind)
    config = check(model, write(tmp_path / "model.gguf", model, tensors_of(model)), tmp_path)
    assert config["model_type"] == f"sparse_{kind}"
    assert (config["bos_token_id"], config["eos_token_id"], config.get("pad_token_id")) == (1, 7, None)


def test_phi3_with_longrope_and_gemma3_with_settings_of_later_converters(tmp_path: Path) -> None:
    model = stock("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=32, max_position_embeddings=64)
    factors = {f"rope_factors_{one}.weight": torch.tensor(LONGROPE[f"{one}_factor"]) for one in ("short", "long")}
    path = write(tmp_path / "phi3.gguf", model, tensors_of(model) | factors, rope__scaling__attn_factor=1.25)
    check(model, path, tmp_path / "phi3")
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 8.0},
    }
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = stock("gemma3_text", rope_parameters=rope, num_hidden_layers=3, layer_types=kinds)
    keys = {"attention__sliding_window_pattern": 2, "rope__freq_base_swa": 700.0}
    check(model, write(tmp_path / "gemma.gguf", model, tensors_of(model), **keys), tmp_path / "gemma")


@pytest.mark.parametrize(
    ("kind", "extra", "keys", "said"),
    [
        ("qwen2", {"blk.0.ffn_up.bias": torch.ones(64)}, {}, "holds blk.0.ffn_up.bias"),
        ("qwen3", {}, {"attention__sliding_window": 16}, "qwen3.attention.sliding_window"),
        ("qwen3_moe", {"blk.0.ffn_up_shexp.weight": torch.ones(48, 32)}, {}, "blk.0.ffn_up_shexp.weight"),
        ("qwen3_moe", {"blk.1.ffn_gate_exps.weight": torch.ones(3, 48, 32)}, {}, "layers.1.mlp.experts.3.gate_proj"),
        ("phi3", {}, {"rope__dimension_count": 4}, "phi3.rope.dimension_count=4"),
        ("phi3", {"blk.0.attn_qkv.weight": torch.ones(60, 32)}, {}, "blk.0.attn_qkv.weight"),
        ("phi3", {"rope_factors_long.weight": torch.ones(4)}, {}, "rope_factors_short.weight does not hold 4 numbers"),
        ("gemma3_text", {}, {"final_logit_softcapping": 30.0}, "gemma3.final_logit_softcapping"),
    ],
)
def test_what_a_file_of_a_family_holds_and_no_model_here_can_is_refused_by_name(
    kind: str, extra: dict[str, torch.Tensor], keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = stock(kind)
    path = write(tmp_path / "model.gguf", model, tensors_of(model) | extra, **keys)
    with pytest.raises(ModelError) as refusal:
        as_it_is(path, tmp_path / "out", kind)
    assert said in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused_with_those_that_can_be_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"architecture 'gemma2'(.|\n)*gemma3_text"):
        as_it_is(tmp_path / "model.gguf", tmp_path / "out", "gemma3_text")
