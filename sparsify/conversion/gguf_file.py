"""GGUF files of Llama, Mistral and Mixtral: the configuration and the weights that they hold.

Every key of the architecture and every tensor is either read or refused: without one the model would be another. The layout is
that of llama.cpp's convert_hf_to_gguf.py, which stores query and key rows for interleaved rotary embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import decoders, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparsify.errors import ModelError

MAGIC = b"GGUF"
ARCHITECTURE = "llama"
"""llama.cpp's name for all three."""
FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.key_length": "head_dim",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
OTHER_KEYS = {
    "vocab_size",  # the embedding has it
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",  # says how the model came about
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "block_sparse_moe.gate",
}
EXPERTS = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}
OLD_EXPERTS = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
MOST_EXPERTS = 65_536
ROPE_FACTORS = "rope_freqs.weight"
ORIGINAL_CONTEXTS = (8192, *(2**power for power in range(4, 21)))
"""Tried for `llama3` scaling, of which a GGUF file stores the result alone: Llama 3's own first."""
SUPPORTED = "Llama, Mistral and Mixtral as llama.cpp's convert_hf_to_gguf.py writes them, without biases."
MAX_VALUES = 8_000_000
"""Values in a file's metadata; a vocabulary of 256,000 pieces with scores, types and merges has a million."""
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)(?:\.(\d+))?\.weight")
_FULL_PRECISION = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Reader(gguf.GGUFReader):
    """gguf's reader, which would count on for ever where a file states more values than it has, or has too many."""

    _num_values = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        values = super()._get(offset, dtype, count, override_order)
        if len(values) < count:
            raise ValueError(f"it ends before byte {offset + int(count) * np.dtype(dtype).itemsize:,}")
        return values

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values besides its tensors")
        return super()._get_field_parts(orig_offs, raw_type)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file, or one expert of it. `read` gives it in fp32."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file holds.

    Attributes:
        config: Fields of a config.json.
        dtype: The dtype of its matrices; bf16 if they are quantised, fp32 if they are of several dtypes.
        tensors: By their names in stock Mistral and Mixtral checkpoints.
    """

    config: dict[str, Any]
    dtype: torch.dtype
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Reads a file's metadata; its tensors are read one by one, on demand.

    Raises:
        ModelError: If it is not a GGUF file, is damaged, or holds what cannot be held here, by name.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ModelError(
                f"{path} is a file, but no GGUF file.",
                allowed="A checkpoint folder or a GGUF file.",
            )
    try:
        reader = _Reader(path)
        keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    except Exception as error:  # numpy's and struct's, whatever a damaged header makes them raise
        raise _damaged(path, error) from error
    architecture = keys.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ModelError(f"{path} has the architecture {architecture!r}, which cannot be held.", allowed=SUPPORTED)
    own = {name.removeprefix("llama."): value for name, value in keys.items() if name.startswith("llama.")}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    _refuse_unknown(path, [f"llama.{key}" for key in own if key not in FIELDS and key not in OTHER_KEYS])
    config = _config(path, own, stored)
    tensors, used = _tensors(path, stored, config)
    _refuse_unknown(path, sorted(stored.keys() - used - {ROPE_FACTORS}))
    return GgufFile(config, _dtype(reader.tensors), tensors)


def _damaged(path: Path, error: Exception) -> ModelError:
    reason = (str(error) or type(error).__name__).partition("\n")[0]
    return ModelError(
        f"{path} is a GGUF file that cannot be read: {reason}",
        next_step="Download or copy this file again, or give the safetensors checkpoint that it was made from.",
    )


def _refuse_unknown(path: Path, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ModelError(
            f"{path} holds {', '.join(names[:5])}{more}, which cannot be held here: without it the model would be another.",
            allowed=SUPPORTED,
            next_step="Give the safetensors checkpoint that the file was made from, if that can be held.",
        )


def _dtype(tensors: list[gguf.ReaderTensor]) -> torch.dtype:
    # Norms and routers are stored in fp32 in every file.
    types = {one.tensor_type.name for one in tensors if len(one.shape) > 1 and "ffn_gate_inp" not in one.name}
    if types <= _FULL_PRECISION.keys():
        return _FULL_PRECISION[types.pop()] if len(types) == 1 else torch.float32
    return torch.bfloat16


def _config(path: Path, own: dict[str, Any], stored: dict[str, gguf.ReaderTensor]) -> dict[str, Any]:
    needed = [key for key in list(FIELDS)[:5] if key not in own]
    if needed or "token_embd.weight" not in stored:
        missing = f"llama.{needed[0]}" if needed else "token_embd.weight"
        raise ModelError(f"{path} is incomplete: it has no {missing}.", allowed=SUPPORTED)
    embedding = _shape(stored["token_embd.weight"])
    if len(embedding) != 2:
        raise ModelError(f"{path} is damaged: token_embd.weight is {list(embedding)}, not a matrix.", allowed=SUPPORTED)
    for key, value in own.items():
        own[key] = _plain(path, key, value)
    config: dict[str, Any] = {FIELDS[key]: own[key] for key in FIELDS if key in own}
    heads = config["num_attention_heads"]
    head_dim = config.setdefault("head_dim", int(config["hidden_size"] // max(1, heads)))
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, head_dim) != head_dim:
            raise ModelError(
                f"{path} says llama.{key}={own[key]} for attention heads of {head_dim}: such a model cannot be held.",
                allowed=SUPPORTED,
            )
    experts = config.get("num_local_experts", 0)
    if not experts:
        config.pop("num_local_experts", None)
        config.pop("num_experts_per_tok", None)
    return config | {
        "model_type": "mixtral" if experts else "mistral",
        "num_key_value_heads": config.get("num_key_value_heads", heads),
        "sliding_window": config.get("sliding_window") or None,
        "vocab_size": embedding[0],
        "tie_word_embeddings": "output.weight" not in stored,
        "rope_parameters": _rope(path, own, stored, head_dim, config["max_position_embeddings"]),
    }


def _plain(path: Path, key: str, value: Any) -> Any:
    """A number as a decimal of fp32 would be written; of numbers for each layer, the one that all are.

    Raises:
        ModelError: If the value is of another type than the key's, or another one in each layer.
    """
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        shown = ", ".join(sorted(map(str, values))[:5]) or "no value"
        raise ModelError(f"{path} says llama.{key}={shown}, other values by layer.", allowed=SUPPORTED)
    one = values.pop()
    wanted = str if key == "rope.scaling.type" else bool if key == "rope.scaling.finetuned" else int | float
    if not isinstance(one, wanted) or (isinstance(one, bool) and wanted is not bool) or one != one:
        raise ModelError(f"{path} says llama.{key}={str(one)[:80]!r}, which no model has.", allowed=SUPPORTED)
    return float(str(np.float32(one))) if isinstance(one, float) else one


def _rope(
    path: Path, own: dict[str, Any], stored: dict[str, gguf.ReaderTensor], head_dim: int, context: int
) -> dict[str, Any]:
    theta = float(own.get("rope.freq_base", 10_000.0))
    factor = float(own.get("rope.scaling.factor", own.get("rope.scale_linear", 0.0))) or 1.0
    # Without a type, llama.cpp scales linearly.
    kind = own.get("rope.scaling.type", "linear" if factor != 1 else "none")
    original = own.get("rope.scaling.original_context_length")
    if ROPE_FACTORS in stored:
        if factor != 1:
            raise ModelError(
                f"{path} scales rotary embeddings twice: {ROPE_FACTORS} and factor {factor:g}.", allowed=SUPPORTED
            )
        factors = _values(path, stored[ROPE_FACTORS]).double().numpy()
        if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all() or factors.min() <= 0 or theta <= 0:
            raise ModelError(
                f"{path} is damaged: {ROPE_FACTORS} does not hold {head_dim // 2} numbers above 0.", allowed=SUPPORTED
            )
        return _llama3(factors, theta, head_dim, context)
    if kind == "none" or factor == 1:
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn" and original:
        settings = {"factor": factor, "original_max_position_embeddings": int(original)}
        return {"rope_type": "yarn", "rope_theta": theta, **settings}
    raise ModelError(f"{path} says llama.rope.scaling.type={kind!r}, which cannot be held.", allowed=SUPPORTED)


def _llama3(factors: np.ndarray, theta: float, head_dim: int, context: int) -> dict[str, Any]:
    """Rotary embeddings whose frequencies are divided by stored factors: Llama 3's rule where it gives these."""
    lengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    largest = float(factors.max())
    for original in ORIGINAL_CONTEXTS:
        low, high = 1.0, 4.0
        smooth = np.clip((original / lengths - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / largest + smooth), factors, rtol=1e-5):
            rule = {"rope_type": "llama3", "factor": largest, "low_freq_factor": low, "high_freq_factor": high}
            return rule | {"rope_theta": theta, "original_max_position_embeddings": original}
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _tensors(
    path: Path, stored: dict[str, gguf.ReaderTensor], config: dict[str, Any]
) -> tuple[dict[str, GgufTensor], set[str]]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, GgufTensor] = {}
    used = set()
    for name, tensor in stored.items():
        kind, prefix, number = name.removesuffix(".weight"), "", None
        if match := _BLOCK.fullmatch(name):
            kind, prefix, number = match[2], f"model.layers.{match[1]}.", match[3]
        elif kind not in ("token_embd", "output_norm", "output"):
            continue
        moe = f"{prefix}block_sparse_moe.experts."
        shape = _shape(tensor)
        if number is not None and kind in OLD_EXPERTS:
            key = f"{moe}{number}.{OLD_EXPERTS[kind]}.weight"
            tensors[key] = GgufTensor(shape, partial(_values, path, tensor))
        elif number is None and kind in EXPERTS and len(shape) == 3 and shape[0] <= MOST_EXPERTS:
            for expert in range(shape[0]):
                key = f"{moe}{expert}.{EXPERTS[kind]}.weight"
                tensors[key] = GgufTensor(shape[1:], partial(_values, path, tensor, expert))
        elif number is None and kind in NAMES:
            key = f"{prefix}{NAMES[kind]}.weight"
            tensors[key] = GgufTensor(shape, partial(_unpermuted, path, tensor, heads.get(kind)))
        else:
            continue
        used.add(name)
    return tensors, used


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _values(path: Path, tensor: gguf.ReaderTensor, expert: int | None = None) -> torch.Tensor:
    data = tensor.data if expert is None else tensor.data[expert]
    try:
        values = gguf.dequantize(data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ModelError(
            f"{path} stores {tensor.name} as {tensor.tensor_type.name}, which cannot be read.",
            next_step="Give a file of another type, or the safetensors checkpoint that it was made from.",
        ) from error
    return torch.from_numpy(np.array(values, np.float32))


def _unpermuted(path: Path, tensor: gguf.ReaderTensor, heads: int | None) -> torch.Tensor:
    """Values with the rows of each head from pairs of interleaved rotary embeddings to halves."""
    values = _values(path, tensor)
    if heads is None:
        return values
    rows, columns = values.shape
    return values.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file.

    Raises:
        ModelError: If there is none that can be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        prefix = gguf.GGUFReader(path).fields.get("tokenizer.ggml.add_space_prefix")
    except Exception as error:  # whatever a file's content makes transformers raise
        raise _damaged(path, error) from error
    backend = tokenizer.backend_tokenizer
    if prefix is not None and not prefix.contents() and isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        # transformers reads every SentencePiece vocabulary as one with a space before the text.
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer
