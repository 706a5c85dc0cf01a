"""Writes PowerInfer's sparse GGUF: architecture `bamboo`, magic PWRI, with predictors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, quants

from sparsify.export.gguf_tensors import Entry, Get, interleaved, write_tensors
from sparsify.export.powerinfer.vocabulary import Vocabulary
from sparsify.models import SparseModel
from sparsify.predictors import BlockPredictor

MAGIC = b"PWRI"
NO_TOKEN = 2**32 - 1
"""The engine reads it as -1."""
ARCHITECTURE = "bamboo"
FILE_TYPES = {"f16": 1, "q4_0": 2}
TYPES = {"f16": Type.F16, "q4_0": Type.Q4_0, "q8_0": Type.Q8_0}
BYTES_PER_VALUE = {"f16": 2.0, "q4_0": 18 / 32}
FFN_NAMES, PREDICTOR_NAMES = ("ffn_gate", "ffn_up", "ffn_down_t"), ("fc1", "fc2")


@dataclass(frozen=True)
class Facts:
    """Metadata of a file.

    Attributes:
        ffn_type: Type of gate, up and down, `f16` or `q4_0`.
        rest_type: Type of attention, embedding and head, a key of TYPES. Predictors are F16, one-dimensional tensors F32.
        threshold: A neuron is computed if its score reaches this.
        bos, eos, unk: Token ids; None if the tokenizer has no such token.
    """

    name: str
    ffn_type: str
    rest_type: str
    context_tokens: int
    threshold: float
    bos: int | None
    eos: int | None
    unk: int | None


@dataclass
class Sizes:
    """Bytes of a file's tensors: feed-forward weights, predictors, embedding, and the rest (attention, head and norms)."""

    ffn: int = 0
    predictors: int = 0
    embedding: int = 0
    rest: int = 0

    @property
    def on_gpu(self) -> int:
        """What the engine moves to a GPU before any neuron."""
        return self.predictors + self.rest

    def add(self, name: str, num_bytes: int) -> None:
        part = name.removesuffix(".weight").rpartition(".")[2]
        if part in FFN_NAMES:
            self.ffn += num_bytes
        elif part in PREDICTOR_NAMES:
            self.predictors += num_bytes
        elif part == "token_embd":
            self.embedding += num_bytes
        else:
            self.rest += num_bytes


def write_gguf(
    path: Path,
    model: SparseModel,
    predictors: list[BlockPredictor],
    vocabulary: Vocabulary,
    facts: Facts,
) -> Sizes:
    """Writes the file, one tensor at a time. Raises ExportError if a weight is too large for F16."""
    writer = GGUFWriter(path, ARCHITECTURE)
    _add_facts(writer, model, vocabulary, facts)
    tensors = _tensors(model, predictors, TYPES[facts.ffn_type], TYPES[facts.rest_type])
    entries = [Entry(name, kind, tuple(get().shape), [get]) for name, kind, get in tensors]
    write_tensors(writer, entries)
    # Only these four bytes tell the engine that the file is sparse and not a dense file of the same architecture.
    with path.open("r+b") as file:
        file.write(MAGIC)
    sizes = Sizes()
    for name, kind, shape, _ in entries:
        sizes.add(name, math.prod(quants.quant_shape_to_byte_shape(shape, kind)))
    return sizes


def _add_facts(writer: GGUFWriter, model: SparseModel, vocabulary: Vocabulary, facts: Facts) -> None:
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
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.texts)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for add, number in (
        (writer.add_bos_token_id, facts.bos),
        (writer.add_eos_token_id, facts.eos),
        (writer.add_unk_token_id, facts.unk),
    ):
        # The engine's defaults are tokens of Llama or of Falcon.
        add(NO_TOKEN if number is None else number)


def rope_theta(model: SparseModel) -> float:
    """Base of the rotary positions; the engine assumes 10000 if the file does not have it."""
    parameters: Any = model.config.rope_parameters
    return float(parameters["rope_theta"])


def _tensors(
    model: SparseModel, predictors: list[BlockPredictor], ffn: Type, rest: Type
) -> Iterator[tuple[str, Type, Get]]:
    """Name, type and values of every tensor, in the order of the file."""
    config, decoder = model.config, model.model
    weights = dict(model.named_parameters(remove_duplicate=False))

    def weight(name: str) -> Get:
        return lambda: weights[name].detach()

    yield "token_embd.weight", rest, weight("model.embed_tokens.weight")
    yield "output_norm.weight", Type.F32, weight("model.norm.weight")
    # The engine does not support tied heads, so a tied head is written as a copy.
    yield "output.weight", rest, weight("lm_head.weight")
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
            yield f"{theirs}.attn_{name}.weight", rest, interleaved(get, heads)
        yield f"{theirs}.attn_v.weight", rest, weight(f"{ours}.self_attn.v_proj.weight")
        yield f"{theirs}.attn_output.weight", rest, weight(f"{ours}.self_attn.o_proj.weight")
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
