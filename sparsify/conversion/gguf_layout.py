"""What GGUF files of each architecture call things: the layouts of llama.cpp's convert_hf_to_gguf.py.

Names of tensors follow from the `Family` that a file is held as; here is what the converter changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsify.models import FAMILIES, Family

FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
}
"""Keys of every architecture, with their fields of a config.json. The first five must be there."""
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
WINDOW = {"attention.sliding_window": "sliding_window"}
NORMS = {
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
    "post_attention_norm": "attention_output_norm",
    "post_ffw_norm": "ffn_output_norm",
}
"""Norms of a layer, as a `Family` names them."""
PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FUSED = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_up": ("ffn_gate", "ffn_up"),
}
"""What an architecture with fused projections stores as one, in the order of rows."""
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class GgufLayout:
    """How one architecture of llama.cpp stores the checkpoints of one family.

    Attributes:
        model_type: Of these checkpoints.
        name: In `general.architecture`, and in front of the architecture's keys.
        fields: Keys that it has in addition to FIELDS, with their fields of a config.json.
        keys: Keys in addition to OTHER_KEYS, of which the configuration is computed.
        norms_heads: Whether queries and keys are normed.
        biases: Projections that have a bias.
        interleaved: Whether rows of queries and keys are stored in the order of interleaved rotary embeddings.
        norm_offset: By how much its norms are larger than those of checkpoints.
    """

    model_type: str
    name: str
    fields: Mapping[str, str] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    norms_heads: bool = False
    biases: tuple[str, ...] = ()
    interleaved: bool = False
    norm_offset: float = 0.0

    @property
    def family(self) -> Family:
        return next(one for one in FAMILIES.values() if self.model_type in one.stock)

    def norms(self) -> dict[str, str]:
        """Norms of a layer by their kinds, as checkpoints call them."""
        named = {kind: getattr(self.family, norm) for kind, norm in NORMS.items()}
        heads = {f"attn_{one}_norm": f"self_attn.{one}_norm" for one in "qk"} if self.norms_heads else {}
        return {kind: name for kind, name in named.items() if name is not None} | heads

    def projections(self) -> dict[str, str]:
        """Projections of a layer by their kinds, as checkpoints call them, but those of experts and fused ones."""
        family = self.family
        kept = {kind: name for kind, name in PROJECTIONS.items() if not (family.expert_block and "ffn" in kind)}
        if family.expert_block:
            kept["ffn_gate_inp"] = f"{family.blocks_on_disk}.gate"
        fused = {one for parts in FUSED.values() for one in parts} if family.fused else set()
        return {kind: name for kind, name in kept.items() if kind not in fused}

    def experts(self) -> dict[str, tuple[str, str]]:
        """The parts of a checkpoint's names before and after the number of an expert, by kinds; none in a dense model."""
        family = self.family
        names = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
        return {
            kind: (f"{family.blocks_on_disk}.experts.", f".{family.expert_projections[projection]}")
            for kind, projection in (names.items() if family.expert_block else ())
        }

    def fused(self) -> dict[str, tuple[str, ...]]:
        """Checkpoints' names of the projections that are stored as one, by its kind."""
        if not self.family.fused:
            return {}
        return {kind: tuple(PROJECTIONS[one] for one in parts) for kind, parts in FUSED.items()}

    def more_fields(self, keys: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of a config.json that follow from others, or that the converter takes for granted.

        Raises:
            ValueError: If no model has such others.
        """
        if self.name == "llama":
            # Zeros say that there is none.
            return {key: None for key in ("sliding_window",) if self.model_type != "llama" and not config.get(key)}
        if self.model_type == "qwen3_moe":
            return {"norm_topk_prob": True}
        if self.model_type == "phi3":
            return {"original_max_position_embeddings": keys.get(ORIGINAL, config["max_position_embeddings"])}
        if self.model_type != "gemma3_text":
            return {}
        layers, period = config["num_hidden_layers"], keys.get(PERIOD, 6)
        if not (isinstance(layers, int) and isinstance(period, int) and period > 0 and 0 < layers <= MOST_LAYERS):
            raise ValueError(f"{layers} layers, of which every {period}. attends to everything")
        kinds = ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)]
        width = config["hidden_size"] // max(1, config["num_attention_heads"])
        scaled_by = width if layers == GEMMA3_27B_LAYERS else config["head_dim"]
        return {"layer_types": kinds, "query_pre_attn_scalar": scaled_by}


ORIGINAL = "rope.scaling.original_context_length"
PERIOD = "attention.sliding_window_pattern"
LOCAL_BASE = "rope.freq_base_swa"
ATTENTION_FACTOR = "rope.scaling.attn_factor"
MOST_LAYERS = 10_000
GEMMA3_27B_LAYERS = 62
"""llama.cpp knows the one Gemma 3 whose scores are scaled otherwise by its number of layers."""
EXPERTS_OF_MIXTRAL = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
EXPERTS_OF_QWEN = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
LAYOUTS = (
    *(
        GgufLayout(one, "llama", WINDOW | EXPERTS_OF_MIXTRAL, interleaved=True)
        for one in ("llama", "mistral", "mixtral")
    ),
    GgufLayout("qwen2", "qwen2", biases=("attn_q", "attn_k", "attn_v")),
    GgufLayout("qwen3", "qwen3", norms_heads=True),
    GgufLayout("qwen3_moe", "qwen3moe", EXPERTS_OF_QWEN, norms_heads=True),
    GgufLayout("phi3", "phi3", WINDOW, frozenset({ATTENTION_FACTOR})),
    GgufLayout("gemma3_text", "gemma3", WINDOW, frozenset({PERIOD, LOCAL_BASE}), norms_heads=True, norm_offset=1.0),
)


def layout_of(keys: Mapping[str, Any]) -> GgufLayout | None:
    """The layout of a file with these keys; None if none of LAYOUTS is.

    llama.cpp has one architecture for Llama, Mistral and Mixtral: experts make a Mixtral of it, a sliding window a Mistral.
    """
    name = keys.get("general.architecture")
    found = {one.model_type: one for one in LAYOUTS if one.name == name}
    if name != "llama":
        return next(iter(found.values()), None)
    has_window = bool(keys.get("llama.attention.sliding_window"))
    return found["mixtral" if keys.get("llama.expert_count") else "mistral" if has_window else "llama"]
