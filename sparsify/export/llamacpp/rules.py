"""What stock llama.cpp computes as the model does, and what it would compute otherwise.

`llama` is Mistral, Llama and Mixtral with SwiGLU. `smallthinker` is the only decoder there whose gated block has a ReLU: it is a mixture
of experts, which with one expert is a dense block. None has a ReLU on both factors.
"""

from __future__ import annotations

from typing import Any

from gguf import GGMLQuantizationType as Type

from sparsify.errors import ExportError, check_choice
from sparsify.export.context import context_reasons
from sparsify.models import ACTIVATIONS, SparseConfig, site_rules
from sparsify.models.masking import has_experts, head_size

LLAMA = "llama"
SMALLTHINKER = "smallthinker"
MODEL_TYPES = ("sparse_mistral", "sparse_llama", "sparse_mixtral")
"""What both architectures compute, apart from the activation."""
TYPES = {"bf16": Type.BF16, "fp16": Type.F16, "fp32": Type.F32, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
"""By the value of --dtype."""
BLOCKS = ("q8_0", "q4_0")
BLOCK_VALUES = 32
MOST_EXPERTS = 512
ROPE_SETTINGS = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "yarn": {"rope_theta", "factor", "original_max_position_embeddings"},
    "llama3": {
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}
"""Settings of rotary positions that a file holds, by type; any other must have its default."""
ROPE_DEFAULTS = {
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": None,
    "truncate": True,
    "partial_rotary_factor": 1.0,
}


def architecture(config: SparseConfig) -> str | None:
    """llama.cpp's name of the architecture that computes the model; None if there is none."""
    kinds = ACTIVATIONS[config.ffn_activation].gate, ACTIVATIONS[config.ffn_activation].up
    if config.model_type not in MODEL_TYPES:
        return None
    if kinds == ("silu", "identity"):
        return LLAMA
    return SMALLTHINKER if kinds == ("relu", "identity") and not has_experts(config) else None


def check_holdable(config: SparseConfig, dtype: str, context_tokens: int | None) -> None:
    """Raises ExportError, with the reasons, if llama.cpp would compute another function than the model."""
    check_choice("--dtype", dtype, tuple(TYPES))
    reasons = [*_activation(config), *_shapes(config, dtype), *_rope(config), *context_reasons(config, context_tokens)]
    if reasons:
        raise ExportError(
            "llama.cpp would compute another function than this model:\n"
            + "\n".join(f"- {reason}" for reason in reasons),
            allowed="Mistral, Llama and Mixtral with swiglu, Mistral and Llama with reglu, without masks; see docs/llamacpp.md.",
            next_step="`sparsify export RUN --to DIR` writes the Hugging Face bundle of any model; "
            "`--format powerinfer` a file for dReLU models.",
        )


def _activation(config: SparseConfig) -> list[str]:
    reasons = []
    activation = ACTIVATIONS[config.ffn_activation]
    if config.model_type not in MODEL_TYPES:
        reasons.append(f"it is a {config.model_type}, which this export does not write")
    elif architecture(config) is None and (activation.gate, activation.up) == ("relu", "identity"):
        reasons.append(
            f"its experts' activation is {activation.name}: llama.cpp's only such architecture routes a token by the residual "
            "before the attention, Mixtral by the one after it"
        )
    elif architecture(config) is None:
        reasons.append(
            f"its activation is {activation.name}, {activation.formula}, which none of llama.cpp's architectures computes"
        )
    if config.quantisation:
        reasons.append(
            f"it holds integers with a scale for each output, by {config.quantisation['method']}, whose inputs are rounded; llama.cpp "
            "has others"
        )
    if config.sparsification:
        sites = ", ".join(site_rules(config))
        reasons.append(
            f"it stores a mask of {config.sparsification['method']} on {sites}, which llama.cpp would not apply"
        )
    return reasons


def _shapes(config: SparseConfig, dtype: str) -> list[str]:
    reasons = []
    heads = config.num_attention_heads * head_size(config)
    rows = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size, "heads x head_dim": heads}
    odd = [f"{name} {size}" for name, size in rows.items() if size % BLOCK_VALUES]
    if dtype in BLOCKS and odd:
        reasons.append(f"{dtype} has blocks of {BLOCK_VALUES} values; {' and '.join(odd)} must be a multiple of that")
    if getattr(config, "num_local_experts", 0) > MOST_EXPERTS:
        reasons.append(f"it has {config.num_local_experts} experts, llama.cpp at most {MOST_EXPERTS}")  # pyright: ignore[reportAttributeAccessIssue]
    return reasons


def rope_parameters(config: SparseConfig) -> dict[str, Any]:
    """Settings of the rotary positions, with `rope_type` and `rope_theta`."""
    return {"rope_type": "default"} | dict(config.rope_parameters)


def _rope(config: SparseConfig) -> list[str]:
    parameters = rope_parameters(config)
    kind = parameters.pop("rope_type")
    parameters.pop("type", None)
    if kind not in ROPE_SETTINGS:
        return [f"its rotary positions are scaled by the rule {kind!r}, which a file does not hold"]
    if kind == "llama3" and architecture(config) == SMALLTHINKER:
        return [
            "its rotary positions are scaled by the rule 'llama3', which the architecture smallthinker does not apply"
        ]
    other = {
        name: value
        for name, value in parameters.items()
        if name not in ROPE_SETTINGS[kind] and ROPE_DEFAULTS.get(name) != value
    }
    return [f"its rotary positions set {name} to {value}, which a file does not hold" for name, value in other.items()]
