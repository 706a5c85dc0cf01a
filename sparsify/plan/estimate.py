"""What a recipe will need and do, estimated before it costs anything.

Arithmetic on the recipe and the model's configuration: no weights, no GPU, no network.
"""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field

from sparsify.errors import RecipeError
from sparsify.plan.memory import DeviceMemory, HostMemory, checkpoint_bytes, memory
from sparsify.plan.parameters import Architecture, Parameters, count_parameters
from sparsify.recipe import ModelSection, Recipe, share_phases, token_shares


class PlannedPhase(BaseModel):
    """Shares of one phase of the mixture, at its beginning and its end."""

    model_config = ConfigDict(frozen=True)

    until_tokens: int
    first: dict[str, float]
    last: dict[str, float]


class Plan(BaseModel):
    """An estimate; `plan_table` lays it out, `model_dump()` is its JSON.

    Attributes:
        parameters: All parameters, by part of the model.
        active_parameters: Parameters that work on one token; fewer than all in a mixture of experts.
        device: Bytes of each process on its GPU (on a CPU machine: in its memory).
        host: Bytes in this machine's memory for what ZeRO-Offload moves there, all processes together.
        checkpoint_bytes: One checkpoint. `checkpoint.keep_last` of them and one being written lie on the disk.
        num_tokens: `training.budget_tokens` rounded down to whole steps.
        tokens_per_source: `num_tokens` divided by token share.
    """

    model_config = ConfigDict(frozen=True)

    recipe: str
    ffn_activation: str
    precision: str
    zero_stage: int
    processes: int
    parameters: Parameters
    active_parameters: int
    device: DeviceMemory
    host: HostMemory
    checkpoint_bytes: int
    keep_checkpoints: int
    num_steps: int
    step_tokens: int
    accumulation_steps: int
    num_windows: int
    window_tokens: int
    num_tokens: int
    warmup_steps: int
    peak_learning_rate: float
    final_learning_rate: float
    tokens_per_source: dict[str, int]
    phases: list[PlannedPhase]
    """Empty when the shares stay the same all the way."""

    @computed_field
    @property
    def disk_bytes(self) -> int:
        """Checkpoints at their fullest: those kept and the one being written."""
        return self.checkpoint_bytes * (self.keep_checkpoints + 1)


def make_plan(recipe: Recipe, model_config: Any = None) -> Plan:
    """Estimates a recipe's memory and lays out its steps and tokens.

    Args:
        recipe: A composed recipe.
        model_config: The model's transformers configuration. Otherwise `model.source`'s config.json counts where it
            is on this machine, and `model.architecture` where it is not.

    Raises:
        RecipeError: If none of them says what the model looks like.
    """
    architecture = _architecture(recipe, model_config)
    parameters = count_parameters(architecture)
    device, host = memory(recipe, architecture, parameters)
    num_tokens = recipe.num_steps * recipe.step_tokens
    return Plan(
        recipe=recipe.name,
        ffn_activation=recipe.activation.ffn_activation,
        precision=recipe.training.precision,
        zero_stage=recipe.engine.zero_stage,
        processes=recipe.launch.processes,
        parameters=parameters,
        active_parameters=parameters.active(architecture),
        device=device,
        host=host,
        checkpoint_bytes=checkpoint_bytes(recipe, parameters.total),
        keep_checkpoints=recipe.checkpoint.keep_last,
        num_steps=recipe.num_steps,
        step_tokens=recipe.step_tokens,
        accumulation_steps=recipe.accumulation_steps,
        num_windows=recipe.num_steps * recipe.training.batch_windows,
        window_tokens=recipe.training.window_tokens,
        num_tokens=num_tokens,
        warmup_steps=math.ceil(recipe.optimizer.warmup_tokens / recipe.step_tokens),
        peak_learning_rate=recipe.optimizer.peak_learning_rate,
        final_learning_rate=recipe.optimizer.final_learning_rate,
        tokens_per_source=_divide(num_tokens, token_shares(recipe.mixture)),
        phases=[
            PlannedPhase(until_tokens=round(end * num_tokens), first=first, last=last)
            for end, first, last in share_phases(recipe.mixture)
            if recipe.mixture.phases
        ],
    )


def _architecture(recipe: Recipe, model_config: Any) -> Architecture:
    model = recipe.model
    fields = model_config.to_dict() if model_config is not None else _local_config(model)
    fields = fields or model.architecture
    if not fields:
        raise RecipeError(
            f"Nothing here says how large {model.source} is.",
            allowed="A local checkpoint folder, or the fields of its config.json under model.architecture.",
            next_step="Download the checkpoint and set model.source to its folder, or set model.architecture.",
        )
    return Architecture.of(fields, model.upcycle_experts, model.upcycle_experts_per_token)


def _local_config(model: ModelSection) -> dict[str, Any]:
    """Content of the config.json that `source` has on this machine; empty when there is none."""
    source = model.source or ""
    folder = Path(source).expanduser()
    if source.startswith("package:"):
        package, _, inside = source.removeprefix("package:").partition("/")
        spec = find_spec(package)  # finds without importing
        places = spec.submodule_search_locations if spec else None
        folder = Path(next(iter(places))) / inside if places else folder
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if source and path.is_file() else {}


def _divide(num_tokens: int, shares: dict[str, float]) -> dict[str, int]:
    """Whole tokens for each source that add up to all tokens."""
    ends = [0]
    for count in range(1, len(shares) + 1):
        ends.append(round(num_tokens * math.fsum(list(shares.values())[:count])))
    return {
        source: end - start for source, (start, end) in zip(shares, pairwise(ends), strict=True)
    }
