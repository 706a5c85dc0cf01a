"""GGUF files: the logits of the model that they were written from, or a refusal that names what cannot be held."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sparsify.conversion.gguf_file import gguf_tokenizer
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import ModelError
from tests.conftest import TOKENIZER
from tests.conversion.test_sources import IDS, as_it_is

HIDDEN, NEURONS, HEADS, HEAD_DIM = 32, 64, 4, 8
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TYPES = gguf.GGMLQuantizationType
DTYPES = {
    TYPES.F32: torch.float32,
    TYPES.F16: torch.float16,
    TYPES.BF16: torch.bfloat16,
    TYPES.Q8_0: torch.bfloat16,
}
"""Types of matrices in a file, and the dtype that they are read to."""


def model_of(**fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 2048,
        "hidden_size": HIDDEN,
        "intermediate_size": NEURONS,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes | fields)).eval()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As convert_hf_to_gguf.py permutes query and key rows."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_tensors(model: Any, *, one_by_one: bool = False) -> dict[str, torch.Tensor]:
    config, tensors = model.config, {}
    for name, value in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem in WHOLE:
            tensors[f"{WHOLE[stem]}.weight"] = value
            continue
        _, _, layer, part = stem.split(".", 3)
        if part in NAMES:
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": config.num_key_value_heads}.get(part)
            tensors[f"blk.{layer}.{NAMES[part]}.weight"] = value if heads is None else interleaved(value, heads)
            continue
        half = config.intermediate_size
        split = {"down": value} if part.endswith("down_proj") else {"gate": value[:, :half], "up": value[:, half:]}
        for kind, experts in split.items():
            if one_by_one:
                tensors |= {f"blk.{layer}.ffn_{kind}.{i}.weight": one for i, one in enumerate(experts)}
            else:
                tensors[f"blk.{layer}.ffn_{kind}_exps.weight"] = experts
    if config.tie_word_embeddings:
        del tensors["output.weight"]
    return tensors


def write_gguf(path: Path, model: Any, tensors: dict[str, torch.Tensor], kind: Any = TYPES.F32, **keys: Any) -> None:
    """Writes what convert_hf_to_gguf.py would; `keys` beside those of every model."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(NEURONS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(2048)
    writer.add_file_type(0)
    for key, value in keys.items():
        name = f"llama.{key.replace('__', '.')}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    for name, tensor in tensors.items():
        values = tensor.detach().float().numpy().copy()
        stored = _stored_type(name, values, kind)
        writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored_type(name: str, values: np.ndarray, kind: Any) -> Any:
    """Norms and routers are stored in fp32."""
    return TYPES.F32 if values.ndim == 1 or "gate_inp" in name or name.endswith("mlp.gate.weight") else kind


def rope_factors(model: Any) -> torch.Tensor:
    """What convert_hf_to_gguf.py stores of Llama 3's scaling: by how much each frequency is divided."""
    plain = 1.0 / model.config.rope_parameters["rope_theta"] ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return plain / ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))[0]


def check_law(data: st.DataObject, folder: Path) -> None:
    draw = data.draw
    fields: dict[str, Any] = {
        "model_type": draw(st.sampled_from(["llama", "mistral", "mixtral"])),
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
    }
    keys: dict[str, Any] = {}
    if fields["model_type"] != "llama":
        fields["sliding_window"] = draw(st.sampled_from([None, 5]))
        if fields["sliding_window"]:
            keys["attention__sliding_window"] = 5
    if fields["model_type"] == "mixtral":
        fields |= {"num_local_experts": 3, "num_experts_per_tok": 2}
        keys |= {"expert_count": 3, "expert_used_count": 2}
    rope = draw(st.sampled_from(["default", "linear", "old linear", "yarn", "llama3"]))
    parameters: dict[str, Any] = {"rope_theta": draw(st.sampled_from([500.0, 10_000.0])), "rope_type": "default"}
    if rope.endswith("linear"):
        parameters |= {"rope_type": "linear", "factor": 4.0}
        named = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
        keys |= {"rope__scale_linear": 4.0} if rope == "old linear" else named
    elif rope == "yarn":
        parameters |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
        keys |= {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
        keys["rope__scaling__original_context_length"] = 32
    elif rope == "llama3":
        parameters |= {"rope_type": "llama3", "factor": draw(st.sampled_from([8.0, 32.0])), "low_freq_factor": 1.0}
        parameters |= {"high_freq_factor": draw(st.sampled_from([2.0, 4.0])), "original_max_position_embeddings": 64}
    model = model_of(**fields, rope_parameters=parameters)
    tensors = gguf_tensors(model, one_by_one=draw(st.booleans()))
    if rope == "llama3":
        tensors["rope_freqs.weight"] = rope_factors(model)
    kind = draw(st.sampled_from(list(DTYPES)))
    path = folder / "model.gguf"
    write_gguf(path, model, tensors, kind, **keys)
    folder = as_it_is(path, folder / "out", tokenizer=str(TOKENIZER))
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        stored = _stored_type(name, values, kind)
        values = gguf.dequantize(gguf.quantize(values, stored), stored)
        parameter.data = torch.from_numpy(values.copy()).to(DTYPES[kind]).float()
    with torch.no_grad():
        ours = load_sparse(folder, dtype=torch.float32)(IDS).logits
        torch.testing.assert_close(ours, model(IDS).logits, atol=1e-5, rtol=1e-4)


def check_one(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_law(data, Path(folder))


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_gguf_file_has_the_logits_of_the_model_that_it_was_written_from(data: st.DataObject) -> None:
    check_one(data)


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_law_of_gguf_files_on_many_models(data: st.DataObject) -> None:
    check_one(data)


@pytest.mark.parametrize(
    ("extra", "keys", "said"),
    [
        ({"blk.0.attn_q.bias": torch.ones(HIDDEN)}, {}, "blk.0.attn_q.bias"),
        ({"blk.1.attn_q_norm.weight": torch.ones(HEAD_DIM)}, {}, "blk.1.attn_q_norm.weight"),
        ({"rope_factors_long.weight": torch.ones(4)}, {}, "rope_factors_long.weight"),
        ({}, {"rope__scaling__type": "longrope", "rope__scaling__factor": 4.0}, "llama.rope.scaling.type='longrope'"),
        ({}, {"rope__scaling__attn_factor": 0.5}, "llama.rope.scaling.attn_factor"),
        ({}, {"attention__sliding_window_pattern": 2}, "llama.attention.sliding_window_pattern"),
        ({}, {"logit_scale": 0.5}, "llama.logit_scale"),
        ({"blk.0.attn_v.weight": torch.full((16, HIDDEN), float("nan"))}, {}, "layers.0.self_attn.v_proj.weight of"),
        ({"output.weight": torch.ones(1000, HIDDEN)}, {}, "lm_head.weight [1000, 32] instead of [2048, 32]"),
    ],
)
def test_what_a_gguf_file_holds_and_no_model_here_can_is_refused_by_name(
    extra: dict[str, torch.Tensor], keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = model_of(model_type="mistral", num_key_value_heads=2)
    write_gguf(tmp_path / "model.gguf", model, gguf_tensors(model) | extra, **keys)
    with pytest.raises(ModelError) as refusal:
        as_it_is(tmp_path / "model.gguf", tmp_path / "out", tokenizer=str(TOKENIZER))
    assert said in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("space", [True, False])
def test_the_tokenizer_of_a_gguf_file_puts_a_space_before_a_text_where_the_file_says_so(
    space: bool, tmp_path: Path
) -> None:
    base = AutoTokenizer.from_pretrained(TOKENIZER)
    vocabulary = sorted(base.get_vocab().items(), key=lambda pair: pair[1])
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_scores([float(-number) for _, number in vocabulary])
    bytes_from = next(number for token, number in vocabulary if token == "<0x00>")
    types = np.full(len(vocabulary), gguf.TokenType.NORMAL.value)
    types[:3] = gguf.TokenType.CONTROL.value
    types[bytes_from : bytes_from + 256] = gguf.TokenType.BYTE.value
    writer.add_token_types(types.tolist())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(space)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = gguf_tokenizer(tmp_path / "model.gguf")
    # The base's own puts no space before a text.
    for text in ("Once upon a time", "two  spaces\nand 12 lines"):
        ids = tokenizer(text)["input_ids"]
        assert ids == base(f" {text}" if space else text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
