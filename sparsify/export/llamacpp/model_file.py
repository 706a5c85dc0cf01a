"""Writes a model as a GGUF file of stock llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGML_QUANT_VERSION, ExpertGatingFuncType, GGUFWriter, LlamaFileType, RopeScalingType
from gguf import GGMLQuantizationType as Type
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sparsify.export.gguf_tensors import Entry, Get, interleaved, write_tensors
from sparsify.export.gguf_tokens import Tokens
from sparsify.export.llamacpp.rules import BLOCKS, LLAMA, SMALLTHINKER, TYPES, architecture, rope_parameters
from sparsify.models import SparseConfig
from sparsify.models.masking import has_experts, head_size

FILE_TYPES = {
    "fp32": LlamaFileType.ALL_F32,
    "fp16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
FEED_FORWARD = {"gate": "w1", "down": "w2", "up": "w3"}
"""llama.cpp's matrices, and Mixtral's names of them on disk."""

Read = Callable[[str], torch.Tensor]
"""Gives a tensor by its name in stock Mistral and Mixtral checkpoints."""


@dataclass(frozen=True)
class Facts:
    """Metadata of a file.

    Attributes:
        dtype: A key of TYPES. Vectors and routers are F32; in q4_0 the output matrix is Q8_0.
        unk, end_of_turn: Token ids; None if the tokenizer has no such token.
    """

    name: str
    dtype: str
    context_tokens: int
    eos: int
    unk: int | None
    end_of_turn: int | None
    chat_template: str | None


def write_gguf(
    path: Path,
    config: SparseConfig,
    read: Read,
    tokens: Tokens,
    facts: Facts,
    on_tensor: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Writes the file, one tensor at a time; `on_tensor` gets how many of how many are written. Raises ExportError if a
    weight is not finite, or too large for its type.
    """
    writer = GGUFWriter(path, str(architecture(config)))
    _add_facts(writer, config, facts)
    _add_rope(writer, config)
    _add_tokens(writer, tokens, facts)
    write_tensors(writer, [*_entries(config, read, facts.dtype)], on_tensor)


def _add_facts(writer: GGUFWriter, config: SparseConfig, facts: Facts) -> None:
    writer.add_name(facts.name)
    writer.add_file_type(FILE_TYPES[facts.dtype])
    if facts.dtype in BLOCKS:
        writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(facts.context_tokens)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if has_experts(config):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    elif architecture(config) == SMALLTHINKER:
        # The one expert's weight is normalised to 1, whatever the router says.
        writer.add_expert_count(1)
        writer.add_expert_used_count(1)
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


def _add_rope(writer: GGUFWriter, config: SparseConfig) -> None:
    parameters = rope_parameters(config)
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(float(parameters["rope_theta"]))
    kinds = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}
    if parameters["rope_type"] in kinds:
        writer.add_rope_scaling_type(kinds[parameters["rope_type"]])
        writer.add_rope_scaling_factor(float(parameters["factor"]))
    if parameters["rope_type"] == "yarn":
        original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))


def _add_tokens(writer: GGUFWriter, tokens: Tokens, facts: Facts) -> None:
    writer.add_tokenizer_model(tokens.model)
    if tokens.pre is not None:
        writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.texts)
    writer.add_token_types(tokens.types)
    if tokens.model == "llama":
        writer.add_token_scores(tokens.scores)
        writer.add_add_space_prefix(tokens.adds_space)
    else:
        writer.add_token_merges(tokens.merges)
    writer.add_eos_token_id(facts.eos)
    # Without these numbers the engine takes those of other models.
    writer.add_bos_token_id(facts.eos if tokens.bos is None else tokens.bos)
    if facts.unk is not None:
        writer.add_unk_token_id(facts.unk)
    if facts.end_of_turn is not None:
        writer.add_eot_token_id(facts.end_of_turn)
    writer.add_add_bos_token(tokens.adds_bos)
    writer.add_add_eos_token(False)
    if facts.chat_template is not None:
        writer.add_chat_template(facts.chat_template)


def _entries(config: SparseConfig, read: Read, dtype: str) -> Iterator[Entry]:
    kind = TYPES[dtype]
    hidden, vocabulary = config.hidden_size, config.vocab_size
    queries, keys = config.num_attention_heads * head_size(config), config.num_key_value_heads * head_size(config)
    # Errors in the output matrix weigh most.
    output = Type.Q8_0 if kind == Type.Q4_0 else kind

    def of(name: str) -> Get:
        return lambda: read(f"{name}.weight")

    tied = config.tie_word_embeddings
    yield Entry("token_embd.weight", output if tied else kind, (vocabulary, hidden), [of("model.embed_tokens")])
    yield Entry("output_norm.weight", Type.F32, (hidden,), [of("model.norm")])
    if not tied:
        yield Entry("output.weight", output, (vocabulary, hidden), [of("lm_head")])
    if rope_parameters(config)["rope_type"] == "llama3":
        yield Entry("rope_freqs.weight", Type.F32, (head_size(config) // 2,), [lambda: rope_factors(config)])
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"blk.{layer}", f"model.layers.{layer}"
        yield Entry(f"{theirs}.attn_norm.weight", Type.F32, (hidden,), [of(f"{ours}.input_layernorm")])
        yield Entry(f"{theirs}.ffn_norm.weight", Type.F32, (hidden,), [of(f"{ours}.post_attention_layernorm")])
        for name, rows, heads in (
            ("q", queries, config.num_attention_heads),
            ("k", keys, config.num_key_value_heads),
        ):
            get = of(f"{ours}.self_attn.{name}_proj")
            # smallthinker rotates halves, as transformers does; llama rotates neighbours.
            get = interleaved(get, heads) if architecture(config) == LLAMA else get
            yield Entry(f"{theirs}.attn_{name}.weight", kind, (rows, hidden), [get])
        yield Entry(f"{theirs}.attn_v.weight", kind, (keys, hidden), [of(f"{ours}.self_attn.v_proj")])
        yield Entry(f"{theirs}.attn_output.weight", kind, (hidden, queries), [of(f"{ours}.self_attn.o_proj")])
        yield from _feed_forward(config, of, layer, kind)


def _feed_forward(config: SparseConfig, of: Callable[[str], Get], layer: int, kind: Type) -> Iterator[Entry]:
    theirs, ours = f"blk.{layer}", f"model.layers.{layer}"
    hidden, neurons = config.hidden_size, config.intermediate_size
    moe = f"{ours}.block_sparse_moe"
    is_dense = not has_experts(config)
    if not is_dense:
        experts = config.num_local_experts
        yield Entry(f"{theirs}.ffn_gate_inp.weight", Type.F32, (experts, hidden), [of(f"{moe}.gate")])
    elif architecture(config) == SMALLTHINKER:
        experts = 1
        yield Entry(f"{theirs}.ffn_gate_inp.weight", Type.F32, (1, hidden), [lambda: torch.zeros(1, hidden)])
    else:
        experts = 0
    for name, matrix in FEED_FORWARD.items():
        shape = (hidden, neurons) if name == "down" else (neurons, hidden)
        if is_dense:
            parts = [of(f"{ours}.mlp.{name}_proj")]
        else:
            parts = [of(f"{moe}.experts.{expert}.{matrix}") for expert in range(experts)]
        if experts:
            yield Entry(f"{theirs}.ffn_{name}_exps.weight", kind, (experts, *shape), parts)
        else:
            yield Entry(f"{theirs}.ffn_{name}.weight", kind, shape, parts)


def rope_factors(config: SparseConfig) -> torch.Tensor:
    """What each frequency of the rotary positions is divided by under Llama 3's rule, fp32 [head_dim / 2]."""
    exponents = torch.arange(0, head_size(config), 2, dtype=torch.float32) / head_size(config)
    plain = 1.0 / rope_parameters(config)["rope_theta"] ** exponents
    return plain / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
