"""GGUF files: the configuration and the weights that they hold.

Every key of the architecture and every tensor is either read or refused: without one the model would be another. What they are called
and how they are stored is in `gguf_layout.py`.
"""

from __future__ import annotations

import math
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

from sparsify.conversion.gguf_layout import (
    ATTENTION_FACTOR,
    FIELDS,
    LAYOUTS,
    LOCAL_BASE,
    ORIGINAL,
    OTHER_KEYS,
    WHOLE,
    GgufLayout,
    layout_of,
)
from sparsify.errors import ModelError

MAGIC = b"GGUF"
MOST_EXPERTS = 65_536
ROPE_FACTORS = "rope_freqs.weight"
ORIGINAL_CONTEXTS = (8192, *(2**power for power in range(4, 21)))
"""Tried for `llama3` scaling, of which a GGUF file stores the result alone: Llama 3's own first."""
LONGROPE_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
SUPPORTED = (
    f"Files of {', '.join(one.model_type for one in LAYOUTS)} as llama.cpp's convert_hf_to_gguf.py writes them, without biases "
    "other than Qwen2's."
)
MAX_VALUES = 8_000_000
"""Values in a file's metadata; a vocabulary of 256,000 pieces with scores, types and merges has a million."""
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)(?:\.(\d+))?\.(weight|bias)")
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
    """A tensor of a file, or one expert or projection of it. `read` gives it in fp32."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file holds.

    Attributes:
        config: Fields of a config.json.
        dtype: The dtype of its matrices; bf16 if they are quantised, fp32 if they are of several dtypes.
        tensors: By their names in stock checkpoints, projections that those store as one apart.
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
        keys = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.") or name.endswith("_token_id")
        }
    except Exception as error:  # numpy's and struct's, whatever a damaged header makes them raise
        raise _damaged(path, error) from error
    layout = layout_of(keys)
    if layout is None:
        architecture = keys.get("general.architecture")
        raise ModelError(f"{path} has the architecture {architecture!r}, which cannot be held.", allowed=SUPPORTED)
    prefix = f"{layout.name}."
    own = {name.removeprefix(prefix): value for name, value in keys.items() if name.startswith(prefix)}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    known = {*FIELDS, *layout.fields, *OTHER_KEYS, *layout.keys}
    _refuse_unknown(path, [prefix + key for key in own if key not in known])
    config = _config(path, layout, own, stored, keys)
    tensors, used = _tensors(path, layout, stored, config)
    factors = {*LONGROPE_FACTORS.values()} if layout.model_type == "phi3" else {ROPE_FACTORS}
    _refuse_unknown(path, sorted(stored.keys() - used - factors))
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


def _config(
    path: Path, layout: GgufLayout, own: dict[str, Any], stored: dict[str, gguf.ReaderTensor], tokens: dict[str, Any]
) -> dict[str, Any]:
    needed = [key for key in list(FIELDS)[:5] if key not in own]
    if needed or "token_embd.weight" not in stored:
        missing = f"{layout.name}.{needed[0]}" if needed else "token_embd.weight"
        raise ModelError(f"{path} is incomplete: it has no {missing}.", allowed=SUPPORTED)
    embedding = _shape(stored["token_embd.weight"])
    if len(embedding) != 2:
        raise ModelError(f"{path} is damaged: token_embd.weight is {list(embedding)}, not a matrix.", allowed=SUPPORTED)
    for key, value in own.items():
        own[key] = _plain(path, f"{layout.name}.{key}", value)
    fields = {**FIELDS, **layout.fields}
    # Those of one architecture say by a zero that there is none.
    config: dict[str, Any] = {fields[key]: own[key] for key in fields if own.get(key) or (key in FIELDS and key in own)}
    heads = config["num_attention_heads"]
    head_dim = config.setdefault("head_dim", int(config["hidden_size"] // max(1, heads)))
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, head_dim) != head_dim:
            raise ModelError(
                f"{path} says {layout.name}.{key}={own[key]} for attention heads of {head_dim}: such a model cannot be held.",
                allowed=SUPPORTED,
            )
    rope = _rope(path, layout, own, stored, head_dim, config["max_position_embeddings"])
    if layout.model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": float(own.get(LOCAL_BASE, 10_000.0))}
        rope = {"sliding_attention": local, "full_attention": rope}
    config |= {
        "model_type": layout.model_type,
        "num_key_value_heads": config.get("num_key_value_heads", heads),
        "vocab_size": embedding[0],
        "tie_word_embeddings": "output.weight" not in stored,
        "rope_parameters": rope,
    }
    try:
        return config | layout.more_fields(own, config) | _special_tokens(tokens, embedding[0])
    except ValueError as error:
        raise ModelError(f"{path} says {error}: such a model cannot be held.", allowed=SUPPORTED) from error


def _special_tokens(keys: dict[str, Any], vocabulary: int) -> dict[str, int | None]:
    """Ids of special tokens, of which the padding is None where the file has none: a family's own may be beyond the embedding."""
    named = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {field: keys.get(f"tokenizer.ggml.{name}_token_id") for field, name in named.items()}
    held = {field: number for field, number in ids.items() if isinstance(number, int) and 0 <= number < vocabulary}
    return {"pad_token_id": None} | held


def _plain(path: Path, key: str, value: Any) -> Any:
    """A number as a decimal of fp32 would be written; of numbers for each layer, the one that all are.

    Raises:
        ModelError: If the value is of another type than the key's, or another one in each layer.
    """
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        shown = ", ".join(sorted(map(str, values))[:5]) or "no value"
        raise ModelError(f"{path} says {key}={shown}, other values by layer.", allowed=SUPPORTED)
    one = values.pop()
    wanted = str if key.endswith("rope.scaling.type") else bool if key.endswith("scaling.finetuned") else int | float
    if not isinstance(one, wanted) or (isinstance(one, bool) and wanted is not bool) or not _is_finite(one):
        raise ModelError(f"{path} says {key}={str(one)[:80]!r}, which no model has.", allowed=SUPPORTED)
    return float(str(np.float32(one))) if isinstance(one, float) else one


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _rope(
    path: Path,
    layout: GgufLayout,
    own: dict[str, Any],
    stored: dict[str, gguf.ReaderTensor],
    head_dim: int,
    context: int,
) -> dict[str, Any]:
    theta = float(own.get("rope.freq_base", 10_000.0))
    factor = float(own.get("rope.scaling.factor", own.get("rope.scale_linear", 0.0))) or 1.0
    # Without a type, llama.cpp scales linearly.
    kind = own.get("rope.scaling.type", "linear" if factor != 1 else "none")
    original = own.get(ORIGINAL)
    if layout.model_type == "phi3" and stored.keys() & LONGROPE_FACTORS.values():
        return _longrope(path, own, stored, theta, head_dim)
    if ROPE_FACTORS in stored and theta > 0:
        if factor != 1:
            raise ModelError(
                f"{path} scales rotary embeddings twice: {ROPE_FACTORS} and factor {factor:g}.", allowed=SUPPORTED
            )
        return _llama3(_factors(path, stored, ROPE_FACTORS, head_dim), theta, head_dim, context)
    if kind == "none" or factor == 1:
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn" and original:
        settings = {"factor": factor, "original_max_position_embeddings": int(original)}
        return {"rope_type": "yarn", "rope_theta": theta, **settings}
    raise ModelError(f"{path} says {layout.name}.rope.scaling.type={kind!r}, which cannot be held.", allowed=SUPPORTED)


def _factors(path: Path, stored: dict[str, gguf.ReaderTensor], name: str, head_dim: int) -> np.ndarray:
    """By what each frequency of the rotary embeddings is divided."""
    factors = _values(path, stored[name]).double().numpy() if name in stored else np.zeros(0)
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all() or factors.min() <= 0:
        raise ModelError(f"{path} is damaged: {name} does not hold {head_dim // 2} numbers above 0.", allowed=SUPPORTED)
    return factors


def _longrope(
    path: Path, own: dict[str, Any], stored: dict[str, gguf.ReaderTensor], theta: float, head_dim: int
) -> dict[str, Any]:
    factors = {key: _factors(path, stored, name, head_dim).tolist() for key, name in LONGROPE_FACTORS.items()}
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "attention_factor": float(own.get(ATTENTION_FACTOR, 1.0)),
        "original_max_position_embeddings": int(own.get(ORIGINAL, own["context_length"])),
        **factors,
    }


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
    path: Path, layout: GgufLayout, stored: dict[str, gguf.ReaderTensor], config: dict[str, Any]
) -> tuple[dict[str, GgufTensor], set[str]]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    head_dim, neurons = config["head_dim"], config["intermediate_size"]
    queries, keys = (count * head_dim for count in heads.values())
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": neurons, "up_proj": neurons}
    norms, projections, experts, fused = layout.norms(), layout.projections(), layout.experts(), layout.fused()
    tensors: dict[str, GgufTensor] = {}
    used = set()
    for name, tensor in stored.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            continue
        layer, kind, expert, part = match.groups()
        prefix = "" if layer is None else f"model.layers.{layer}."
        shape, read = _shape(tensor), partial(_values, path, tensor)
        found: dict[str, GgufTensor] = {}
        if layer is None:
            if expert is None and part == "weight" and kind in WHOLE:
                found[WHOLE[kind]] = GgufTensor(
                    shape, partial(_norm, path, tensor, layout) if len(shape) == 1 else read
                )
        elif expert is not None:  # as files of 2023 have it
            if part == "weight" and kind in experts:
                found[expert.join(experts[kind])] = GgufTensor(shape, read)
        elif kind in norms and part == "weight":
            found[norms[kind]] = GgufTensor(shape, partial(_norm, path, tensor, layout))
        elif kind in projections and (part == "weight" or kind in layout.biases):
            permuted = heads.get(kind) if layout.interleaved else None
            found[projections[kind]] = GgufTensor(shape, partial(_unpermuted, path, tensor, permuted))
        elif kind in fused and part == "weight":
            found = _apart(path, tensor, {one: rows[one.rpartition(".")[2]] for one in fused[kind]})
        elif (one := kind.removesuffix("_exps")) in experts and part == "weight" and len(shape) == 3:
            for number in range(shape[0] if shape[0] <= MOST_EXPERTS else 0):
                values = partial(_values, path, tensor, number)
                found[str(number).join(experts[one])] = GgufTensor(shape[1:], values)
        tensors |= {f"{prefix}{key}.{part}": value for key, value in found.items()}
        used |= {name} if found else set()
    return tensors, used


def _apart(path: Path, tensor: gguf.ReaderTensor, rows: dict[str, int]) -> dict[str, GgufTensor]:
    """The projections, with the rows of each, that are stored as one."""
    shape, first, found = _shape(tensor), 0, dict[str, GgufTensor]()
    if shape[0] != sum(rows.values()):
        return {}
    for name, count in rows.items():
        part = slice(first, first + count)
        found[name] = GgufTensor((count, *shape[1:]), partial(_values, path, tensor, part))
        first += count
    return found


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _values(path: Path, tensor: gguf.ReaderTensor, part: int | slice | None = None) -> torch.Tensor:
    data = tensor.data if part is None else tensor.data[part]
    try:
        values = gguf.dequantize(data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ModelError(
            f"{path} stores {tensor.name} as {tensor.tensor_type.name}, which cannot be read.",
            next_step="Give a file of another type, or the safetensors checkpoint that it was made from.",
        ) from error
    return torch.from_numpy(np.array(values, np.float32))


def _norm(path: Path, tensor: gguf.ReaderTensor, layout: GgufLayout) -> torch.Tensor:
    return _values(path, tensor) - layout.norm_offset


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
