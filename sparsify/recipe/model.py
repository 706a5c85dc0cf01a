"""The section `model`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from sparsify.errors import RecipeError
from sparsify.recipe.fields import Section


@dataclass
class ModelSection(Section):
    """Where the weights come from."""

    source: str | None = None
    """A checkpoint folder, a Hub id, a GGUF file, or `package:NAME/PATH` inside an installed Python package."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`pretrained` reads `source`; `random` builds `architecture` from `training.seed`."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """transformers config fields with `model_type` of a family that can be held. For `random` it is the model; for `pretrained`
    it is what the checkpoint must be (checked on load) and what `plan` uses before the checkpoint is downloaded."""
    tokenizer: str | None = None
    """Where the tokenizer comes from; null takes `source`."""
    dense_source: str | None = None
    """The dense model that a source with sparse weights was made from: the dense baseline and the teacher of a distillation are made
    from it. null takes `source`."""
    upcycle_experts: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Turn a dense Mistral or Llama into a Mixtral with this many experts, each a copy of the FFN."""
    upcycle_experts_per_token: Annotated[int, Field(ge=1, le=4096)] = 2


def check_model(model: ModelSection) -> None:
    """Refuses a model without a source of its weights, or with two.

    Raises:
        RecipeError: Naming the setting.
    """
    if model.init == "pretrained" and model.source is None:
        raise RecipeError(
            "model.init is pretrained, but model.source is not set.",
            allowed="A checkpoint folder, a Hub id, a GGUF file or package:NAME/PATH.",
            next_step="Set model.source, or model.init=random with model.architecture.",
        )
    if model.init == "random" and model.source is not None:
        raise RecipeError(
            f"model.init is random, so model.source={model.source} would be ignored.",
            next_step="Set model.source=null, or model.init=pretrained.",
        )
    if model.init == "random" and model.dense_source is not None:
        raise RecipeError(
            f"model.init is random, so model.dense_source={model.dense_source} would be ignored.",
            next_step="Set model.dense_source=null, or model.init=pretrained.",
        )
    if model.init == "random" and not (model.architecture and model.tokenizer):
        raise RecipeError(
            "model.init is random, but model.architecture or model.tokenizer is not set.",
            allowed="A random model needs both: its config fields and a tokenizer.",
        )
    experts = model.upcycle_experts
    if experts is not None and not 1 <= model.upcycle_experts_per_token <= experts:
        raise RecipeError(
            f"model.upcycle_experts_per_token is {model.upcycle_experts_per_token}.",
            allowed=f"Allowed: 1 to model.upcycle_experts ({experts}).",
        )
