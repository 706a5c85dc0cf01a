"""One predictor while it is trained.

The state of a training of predictors: one safetensors file, whose header holds the numbers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from sparsify.errors import RunError
from sparsify.files import write_bytes
from sparsify.predictors.format import BlockPredictor

RECALL_GAIN = 0.5
"""How much the weight of firing neurons grows, in nats, for a recall that is 1 too low."""
WEIGHT_NATS = (-6.0, 12.0)


class Candidate:
    """A predictor of one rank, its optimiser, and the weight that firing neurons have in its loss.

    Few neurons fire, and one that is missed costs more than one that is read in vain. So a firing neuron weighs more in the
    cross-entropy; how much more is steered, batch by batch, so that the wanted recall is reached just at the score 0. Then
    the threshold 0 is right in every layer, and signs are all that an engine needs.

    Args:
        shape: Rank, hidden size and neurons.
        wanted_recall: Share of firing neurons that shall be predicted.
        generator: Draws the start.
        device: Where it lives.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        wanted_recall: float,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        rank, hidden, neurons = shape
        self.A = nn.Parameter(
            (torch.randn(rank, hidden, generator=generator) / math.sqrt(hidden)).to(device)
        )
        self.B = nn.Parameter(
            (torch.randn(neurons, rank, generator=generator) * 0.1 / math.sqrt(rank)).to(device)
        )
        self.optimizer = torch.optim.Adam([self.A, self.B])
        self.log_weight: float | None = None
        self.recall = 0.0
        self._wanted_recall = wanted_recall

    @property
    def predictor(self) -> BlockPredictor:
        return BlockPredictor(self.A.detach(), self.B.detach())

    def step(self, x: torch.Tensor, fired: torch.Tensor, learning_rate: float) -> None:
        """One step on the rows of a batch.

        Args:
            x: Normed inputs of the block, [rows, hidden].
            fired: Which neurons fired, bool [rows, neurons].
            learning_rate: Of this step.
        """
        num_fired = int(fired.sum())
        if self.log_weight is None:
            share = min(max(num_fired / fired.numel(), 1e-4), 1 - 1e-4)
            self.log_weight = math.log((1 - share) / share)
        with torch.enable_grad():
            scores = BlockPredictor(self.A, self.B).scores(x)
            loss = nn.functional.binary_cross_entropy_with_logits(
                scores, fired.float(), pos_weight=scores.new_tensor(math.exp(self.log_weight))
            )
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        if num_fired:
            self.recall = int(((scores > 0) & fired).sum()) / num_fired
            moved = self.log_weight + RECALL_GAIN * (self._wanted_recall - self.recall)
            self.log_weight = min(max(moved, WEIGHT_NATS[0]), WEIGHT_NATS[1])

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and numbers from which `restore` makes it what it is now."""
        tensors = {"A": self.A.detach(), "B": self.B.detach()}
        for name, parameter in (("A", self.A), ("B", self.B)):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{key}"] = value.detach()
        return tensors, {"log_weight": self.log_weight, "recall": self.recall}

    def restore(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """Takes up a state."""
        with torch.no_grad():
            for name, parameter in (("A", self.A), ("B", self.B)):
                parameter.copy_(tensors[name])
                kept = {
                    key.partition(".")[2]: value
                    for key, value in tensors.items()
                    if key.startswith(f"{name}.")
                }
                if kept:
                    self.optimizer.state[parameter] = {
                        key: value.to("cpu" if key == "step" else parameter.device)
                        for key, value in kept.items()
                    }
        self.log_weight, self.recall = numbers["log_weight"], numbers["recall"]


def write_state(
    path: Path, key: dict[str, Any], tensors: dict[str, torch.Tensor], numbers: dict[str, Any]
) -> None:
    """Writes a state under a temporary name, then renames it.

    Args:
        path: The file.
        key: What the state belongs to.
        tensors: By name.
        numbers: Anything that JSON holds.
    """
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"key": json.dumps(key), "numbers": json.dumps(numbers)}
    write_bytes(path, save(kept, metadata=metadata))


def read_state(
    path: Path, key: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The state that a training of the same key left behind, or None.

    Raises:
        RunError: If it belongs to another training, or is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"The state of an interrupted training, {path}, is damaged: {error}",
            next_step="Remove it to begin again.",
        ) from error
    there, wanted = json.loads(metadata["key"]), json.loads(json.dumps(key))
    if there != wanted:
        other = [name for name in wanted if there.get(name) != wanted[name]]
        raise RunError(
            f"{path} is the state of a training with another {', '.join(other)}.",
            allowed="The same settings, model and text, to go on with it.",
            next_step="Remove it to begin again, or choose another folder with --to.",
        )
    return tensors, json.loads(metadata["numbers"])
