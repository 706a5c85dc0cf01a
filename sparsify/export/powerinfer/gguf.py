"""Writes PowerInfer's sparse GGUF: architecture `bamboo`, magic PWRI, with predictors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, quants
from numpy.typing import NDArray

from sparsify.errors import ExportError
from sparsify.export.powerinfer.vocabulary import Vocabulary
from sparsify.models import SparseMistralForCausalLM
from sparsify.predictors import BlockPredictor

MAGIC = b"PWRI"
ARCHITECTURE = "bamboo"
FILE_TYPES = {"f16": 1, "q4_0": 2}
TYPES = {"f16": Type.F16, "q4_0": Type.Q4_0}
LARGEST_F16 = 65504.0

Get = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Facts:
    """Metadata of a file.

    Attributes:
        name: Name of the model.
        ffn_type: Type of gate, up and down, `f16` or `q4_0`. Other matrices are F16, one-dimensional tensors F32.
        context_tokens: Maximum context.
        threshold: A neuron is computed if its score reaches this.
        bos, eos, unk: Token ids; None if the tokenizer has no such token.
    """

    name: str
    ffn_type: str
    context_tokens: int
    threshold: float
    bos: int | None
    eos: int | None
    unk: int | None


def write_gguf(
    path: Path,
    model: SparseMistralForCausalLM,
    predictors: list[BlockPredictor],
    vocabulary: Vocabulary,
    facts: Facts,
) -> None:
    """Writes the file, one tensor at a time.

    Args:
        path: The file.
        model: The model.
        predictors: Predictors of every layer, for the residual.
        vocabulary: A token for every row of the embedding.
        facts: Metadata of the file.

    Raises:
        ExportError: If a weight is too large for F16.
    """
    writer = GGUFWriter(path, ARCHITECTURE)
    _add_facts(writer, model, vocabulary, facts)
    tensors = [*_tensors(model, predictors, TYPES[facts.ffn_type])]
    for name, kind, get in tensors:
        shape = tuple(get().shape)
        if kind == Type.Q4_0:
            shape = quants.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
        else:
            dtype = np.dtype(np.float32 if kind == Type.F32 else np.float16)
            writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind, get in tensors:
        writer.write_tensor_data(_encoded(name, kind, get()))
    writer.close()
    # Only these four bytes tell the engine that the file is sparse and not a dense file of the same architecture.
    with path.open("r+b") as file:
        file.write(MAGIC)


def _add_facts(writer: GGUFWriter, model: SparseMistralForCausalLM, vocabulary: Vocabulary, facts: Facts) -> None:
    config = model.config
    writer.add_name(facts.name)
    writer.add_file_type(FILE_TYPES[facts.ffn_type])
    writer.add_context_length(facts.context_tokens)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope_theta(model))
    writer.add_float32("powerinfer.sparse_threshold", facts.threshold)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary.texts)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    for add, number in (
        (writer.add_bos_token_id, facts.bos),
        (writer.add_eos_token_id, facts.eos),
        (writer.add_unk_token_id, facts.unk),
    ):
        if number is not None:
            add(number)


def rope_theta(model: SparseMistralForCausalLM) -> float:
    """Base of the rotary positions; the engine assumes 10000 if the file does not have it."""
    parameters: Any = model.config.rope_parameters
    return float(parameters["rope_theta"])


def _tensors(
    model: SparseMistralForCausalLM, predictors: list[BlockPredictor], ffn: Type
) -> Iterator[tuple[str, Type, Get]]:
    """Name, type and values of every tensor, in the order of the file."""
    config, decoder = model.config, model.model
    weights = dict(model.named_parameters(remove_duplicate=False))

    def weight(name: str) -> Get:
        return lambda: weights[name].detach()

    yield "token_embd.weight", Type.F16, weight("model.embed_tokens.weight")
    yield "output_norm.weight", Type.F32, weight("model.norm.weight")
    # The engine does not support tied heads, so a tied head is written as a copy.
    yield "output.weight", Type.F16, weight("lm_head.weight")
    for index in range(len(decoder.layers)):
        theirs, ours = f"blk.{index}", f"model.layers.{index}"
        yield f"{theirs}.attn_norm.weight", Type.F32, weight(f"{ours}.input_layernorm.weight")
        yield (
            f"{theirs}.ffn_norm.weight",
            Type.F32,
            weight(f"{ours}.post_attention_layernorm.weight"),
        )
        for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            get = weight(f"{ours}.self_attn.{name}_proj.weight")
            yield f"{theirs}.attn_{name}.weight", Type.F16, _interleaved(get, heads)
        yield f"{theirs}.attn_v.weight", Type.F16, weight(f"{ours}.self_attn.v_proj.weight")
        yield f"{theirs}.attn_output.weight", Type.F16, weight(f"{ours}.self_attn.o_proj.weight")
        yield f"{theirs}.ffn_gate.weight", ffn, weight(f"{ours}.mlp.gate_proj.weight")
        yield f"{theirs}.ffn_up.weight", ffn, weight(f"{ours}.mlp.up_proj.weight")
        yield (
            f"{theirs}.ffn_down_t.weight",
            ffn,
            _transposed(weight(f"{ours}.mlp.down_proj.weight")),
        )
        # Never quantised: rounding a score near the threshold would switch neurons on or off.
        yield f"{theirs}.fc1.weight", Type.F16, _value(predictors[index].A)
        yield f"{theirs}.fc2.weight", Type.F16, _value(predictors[index].B)


def _value(tensor: torch.Tensor) -> Get:
    return lambda: tensor


def _transposed(get: Get) -> Get:
    return lambda: get().T


def _interleaved(get: Get, heads: int) -> Get:
    """Reorders rows to ggml's rotary pairs (0, 1), (2, 3), … from (0, half), (1, half + 1), …"""

    def permuted() -> torch.Tensor:
        rows = get()
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)

    return permuted


def _encoded(name: str, kind: Type, tensor: torch.Tensor) -> NDArray[np.generic]:
    values = tensor.float().cpu().contiguous().numpy()
    if kind != Type.F32 and not np.abs(values).max(initial=0.0) <= LARGEST_F16:
        raise ExportError(f"{name} has values outside the range of F16: up to {np.abs(values).max():g}.")
    return quants.quantize(values, kind)
