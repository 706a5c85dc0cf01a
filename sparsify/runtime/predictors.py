"""Reads a folder of predictors: predictors.safetensors and predictors.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparsify.errors import ModelError
from sparsify.runtime.weights import Predictor

WEIGHTS, FACTS = "predictors.safetensors", "predictors.json"
DEFAULT_THRESHOLD = 0.5
INPUTS = ("normed", "residual")


@dataclass(frozen=True)
class Predictors:
    """Predictors of a whole model.

    Args:
        input: `normed`: they look at the input of the block; `residual`: at what the RMS norm before it gets.
        threshold: A neuron is on where its score is larger.
        tensors: `layers.{L}.A`, `layers.{L}.B`, or with `.experts.{E}` between.
        num_experts: Experts of a layer; None in a dense model.
    """

    input: str
    threshold: float
    tensors: dict[str, torch.Tensor]
    num_experts: int | None

    def layer(self, layer: int) -> list[Predictor]:
        """The predictor of a layer, or those of its experts in order."""
        return [
            Predictor(self.tensors[f"{name}.A"], self.tensors[f"{name}.B"], self.threshold)
            for name in _names(layer, self.num_experts)
        ]


def read_predictors(folder: Path, model: Any) -> Predictors:
    """Reads the predictors of a model.

    Raises:
        ModelError: If a file is missing or damaged, or they are another model's.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        found = Predictors(
            facts["input"],
            float(facts.get("threshold", DEFAULT_THRESHOLD)),
            tensors,
            getattr(model.config, "num_local_experts", None),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{folder} holds no predictors that can be read: {type(error).__name__}: {error}",
            allowed=f"A folder with {WEIGHTS} and {FACTS}.",
            next_step="Train them: sparsify predictors train MODEL",
        ) from error
    if found.input not in INPUTS:
        raise ModelError(
            f"{folder / FACTS} says input={found.input!r}.", allowed=f"{', '.join(INPUTS)}."
        )
    _check(found, model, folder)
    return found


def _check(found: Predictors, model: Any, folder: Path) -> None:
    config = model.config
    neurons, hidden = config.intermediate_size, config.hidden_size
    names = [
        name
        for layer in range(config.num_hidden_layers)
        for name in _names(layer, found.num_experts)
    ]
    expected = {f"{name}.{part}" for name in names for part in "AB"}
    wrong = sorted(expected ^ set(found.tensors))
    wrong += [
        f"{name} {list(found.tensors[name].shape)}"
        for name in sorted(expected & set(found.tensors))
        if found.tensors[name].ndim != 2
        or (name.endswith("A") and found.tensors[name].shape[1] != hidden)
        or (name.endswith("B") and found.tensors[name].shape[0] != neurons)
    ]
    if wrong:
        raise ModelError(
            f"{folder} belongs to another model; first differences: {', '.join(wrong[:3])}.",
            allowed=f"For each of {len(names)} blocks, A [rank, {hidden}] and B [{neurons}, rank].",
            next_step="Train predictors for this model.",
        )


def _names(layer: int, num_experts: int | None) -> list[str]:
    if num_experts is None:
        return [f"layers.{layer}"]
    return [f"layers.{layer}.experts.{expert}" for expert in range(num_experts)]
