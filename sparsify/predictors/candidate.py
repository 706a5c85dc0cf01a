"""Predictors in training: one candidate per block and rank, the choice of ranks, and the saved training state."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from sparsify.errors import RunError
from sparsify.files import write_bytes
from sparsify.metadata import parse_json
from sparsify.predictors.format import Block, BlockPredictor

RECALL_GAIN = 0.5
"""How much the weight of firing neurons grows, in nats, for a recall that is 1 too low."""
WEIGHT_NATS = (-6.0, 12.0)
"""Bounds of that weight's logarithm."""
RANK_MULTIPLE = 32
"""Rows of a multiple of 32 can be quantised in blocks of 32, as every GGUF type needs it."""
RANK_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


class Candidate:
    """A predictor of one rank, its optimiser, and the weight that firing neurons have in its loss.

    Few neurons fire, and a missed one costs more than one that is read in vain. So a firing neuron gets a larger
    weight in the cross-entropy. The weight is adjusted after every batch so that the wanted recall is reached at a score of
    0. The threshold 0 is then right in every layer, and an engine needs only the signs of the scores.

    `shape` is rank, hidden size and neurons.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        wanted_recall: float,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        rank, hidden, neurons = shape
        self.A = nn.Parameter((torch.randn(rank, hidden, generator=generator) / math.sqrt(hidden)).to(device))
        self.B = nn.Parameter((torch.randn(neurons, rank, generator=generator) * 0.1 / math.sqrt(rank)).to(device))
        self.optimizer = torch.optim.Adam([self.A, self.B])
        self.log_weight: float | None = None
        self.recall = 0.0
        self._wanted_recall = wanted_recall

    @property
    def predictor(self) -> BlockPredictor:
        return BlockPredictor(self.A.detach(), self.B.detach())

    def step(self, x: torch.Tensor, fired: torch.Tensor, learning_rate: float) -> None:
        """Makes one optimiser step on normed inputs [rows, hidden] and which neurons fired, bool [rows, neurons]."""
        num_fired = int(fired.sum())
        if self.log_weight is None:  # start with the weight that balances the two classes
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
            # An integral controller: the weight grows while the recall is too low.
            moved = self.log_weight + RECALL_GAIN * (self._wanted_recall - self.recall)
            self.log_weight = min(max(moved, WEIGHT_NATS[0]), WEIGHT_NATS[1])

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = {"A": self.A.detach(), "B": self.B.detach()}
        for name, parameter in (("A", self.A), ("B", self.B)):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{key}"] = value.detach()
        return tensors, {"log_weight": self.log_weight, "recall": self.recall}

    def restore(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in (("A", self.A), ("B", self.B)):
                parameter.copy_(tensors[name])
                kept = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
                if kept:
                    self.optimizer.state[parameter] = {
                        key: value.to("cpu" if key == "step" else parameter.device) for key, value in kept.items()
                    }
        self.log_weight, self.recall = numbers["log_weight"], numbers["recall"]


def candidate_ranks(hidden: int) -> list[int]:
    """Ranks to try: shares of the hidden size in multiples of RANK_MULTIPLE."""
    ranks = (round(hidden * share / RANK_MULTIPLE) * RANK_MULTIPLE for share in RANK_SHARES)
    return sorted({max(RANK_MULTIPLE, rank) for rank in ranks})


@dataclass(frozen=True)
class RankCost:
    """Size and reading cost of one rank for one block.

    Attributes:
        predictor: Parameters of the predictor.
        read: Mean parameters that a token reads: the predictor's and those of the neurons it switches on.
    """

    rank: int
    predictor: int
    read: float


def choose_ranks(choices: Mapping[Block, list[RankCost]], budget: int) -> dict[Block, int]:
    """Ranks with which a token reads least while all predictors together stay within the budget.

    Greedy: starts with every block's best rank, and lowers the rank where each parameter saved adds the least reading.

    Raises:
        RunError: If the smallest ranks exceed the budget already.
    """
    ladders: dict[Block, list[RankCost]] = {}
    for block, options in choices.items():
        best = min(options, key=lambda option: (option.read, option.predictor))
        smaller = [option for option in options if option.predictor <= best.predictor]
        ladders[block] = sorted(smaller, key=lambda option: option.predictor)
    # A rank that is larger than the best one saves nothing, so a ladder ends at the best rank.
    smallest = sum(ladder[0].predictor for ladder in ladders.values())
    if smallest > budget:
        raise RunError(
            f"Predictors of the smallest ranks have {smallest:,} parameters together, more than the budget of {budget:,}.",
            next_step="Raise --budget-share, or give a smaller --rank.",
        )
    while sum(ladder[-1].predictor for ladder in ladders.values()) > budget:
        block = min(
            (block for block, ladder in ladders.items() if len(ladder) > 1),
            key=lambda block: (
                (ladders[block][-2].read - ladders[block][-1].read)
                / (ladders[block][-1].predictor - ladders[block][-2].predictor)
            ),
        )
        ladders[block].pop()
    return {block: ladder[-1].rank for block, ladder in ladders.items()}


def write_state(path: Path, key: dict[str, Any], tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    """Writes a state under a temporary name, then renames it; `key` is the identity of the training."""
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"key": json.dumps(key), "numbers": json.dumps(numbers)}
    write_bytes(path, save(kept, metadata=metadata))


def read_state(path: Path, key: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The state that an interrupted training with the same key saved, or None.

    Raises:
        RunError: If it belongs to another training, or is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        there, numbers = parse_json(metadata["key"]), parse_json(metadata["numbers"])
        wanted = json.loads(json.dumps(key))
        other = [name for name in wanted if there.get(name) != wanted[name]]
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise RunError(
            f"The state of an interrupted training, {path}, is damaged: {error}",
            next_step="Remove it to start over.",
        ) from error
    if other:
        raise RunError(
            f"{path} is the state of a training with another {', '.join(other)}.",
            allowed="The same settings, model and text, to resume it.",
            next_step="Remove it to start over, or choose another folder with --to.",
        )
    return tensors, numbers
