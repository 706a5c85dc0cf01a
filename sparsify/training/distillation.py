"""Distillation: what a step learns from the dense source beside the text, and how far from it the model still is.

Two terms (Hinton et al., arXiv 1503.02531, at temperature 1; hidden states as in arXiv 1908.09355): the divergence of the next
token's distribution, and the error of every feed-forward block's answer. Both count the positions that have a label, as the
cross-entropy does, so that empty positions of a window and prompts count in none of the three.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from sparsify.mixture.windows import NO_LOSS
from sparsify.models import SparseModel
from sparsify.recipe import DistillationSection
from sparsify.training.teacher import Answers, Teacher, answering_blocks

CHUNK_VALUES = 1 << 22
"""Logits that are widened at a time: 16 MB for each copy in fp32."""


class Distiller:
    """Context manager around the forward and backward passes of one step.

    It watches activations, never weights, so partitioned weights (ZeRO-3) do not matter to it. A block's error is taken as soon
    as the block has answered: where activations are checkpointed, only the teacher's answer is kept for the backward pass. What is
    computed again there is not counted again.

    Args:
        settings: The terms' weights.
        teacher: Whom to learn from.
        model: The model that trains.
        device: Where to count.
    """

    def __init__(
        self,
        settings: DistillationSection,
        teacher: Teacher,
        model: SparseModel,
        device: torch.device,
    ) -> None:
        self._settings, self._teacher, self._model = settings, teacher, model
        self._answers = Answers()
        self._counted = torch.zeros(0)
        self._errors: list[torch.Tensor] = []
        self._in_forward = False
        # Summed divergence and error, and labels.
        self._totals = torch.zeros(3, dtype=torch.float64, device=device)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        if self._settings.ffn_weight:
            for layer, block in enumerate(answering_blocks(self._model)):
                hook = partial(self._take_layer, layer)
                self._handles.append(block.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._answers, self._errors = Answers(), []

    def ask(self, tensors: dict[str, torch.Tensor]) -> None:
        """Has the teacher answer the micro-batch that the model is about to see.

        Args:
            tensors: `input_ids`, `position_ids` and `labels`, [windows, tokens] each, on the model's device.
        """
        self._answers, self._errors = (
            Answers(),
            [],
        )  # lets go of the last ones before there are others
        self._answers = self._teacher.answer(tensors["input_ids"], tensors["position_ids"])
        self._counted = tensors["labels"] != NO_LOSS
        self._in_forward = True

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """Both terms of the forward pass that has just ended, weighted, and summed over its labels. []

        Args:
            logits: The model's. [windows, tokens, vocabulary]
        """
        self._in_forward = False
        total = torch.zeros((), device=self._totals.device)
        self._totals[2] += self._counted.sum()
        if self._answers.logits is not None:
            by_token = divergence(logits.flatten(0, 1), self._answers.logits.flatten(0, 1))
            self._answers.logits = None  # autograd keeps it as long as it needs it
            nats = (by_token * self._counted.flatten()).sum()
            self._totals[0] += nats.detach()
            total = total + self._settings.logits_weight * nats
        if self._errors:
            error = torch.stack(self._errors).mean()
            self._errors = []
            self._totals[1] += error.detach()
            total = total + self._settings.ffn_weight * error
        return total

    def reduce(self) -> dict[str, float]:
        """What a step's line says, over all ranks; every rank calls it.

        `logits` in nats a label, `ffn` as a part of the teacher's answer, each before its weight and only where it has one;
        `added` in nats, as it was added to the loss.
        """
        dist.all_reduce(self._totals)
        nats, error, labels = self._totals.tolist()
        means = {"logits": nats / max(labels, 1), "ffn": error / max(labels, 1)}
        weights = {"logits": self._settings.logits_weight, "ffn": self._settings.ffn_weight}
        line = {key: mean for key, mean in means.items() if weights[key]}
        line["added"] = sum(weights[key] * mean for key, mean in line.items())
        return line

    def _take_layer(self, layer: int, block: nn.Module, _: object, output: torch.Tensor) -> None:
        wanted = self._answers.ffn_outputs[layer]
        error = (relative_error(output, wanted) * self._counted).sum()
        if self._in_forward:
            self._errors.append(error)


def relative_error(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared distance of each token's vector from the one that is wanted, as a part of that one's square. [...]

    Relative for each token, since a few tokens of a language model have answers many times as long as all others'.

    Args:
        output: [..., hidden]
        wanted: [..., hidden], without a gradient.
    """
    wide = torch.promote_types(output.dtype, torch.float32)
    wanted = wanted.to(wide)
    size = wanted.square().sum(-1).clamp_min(torch.finfo(wide).tiny)
    return (output.to(wide) - wanted).square().sum(-1) / size


def divergence(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of each token's distribution from the teacher's, in nats. [tokens]

    Widened piece by piece, forward and back, so that beside the two logits only their gradient is ever whole.

    Args:
        logits: [tokens, vocabulary]
        teacher_logits: [tokens, vocabulary], without a gradient.
    """
    return cast(torch.Tensor, _Divergence.apply(logits, teacher_logits))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, teacher_logits)
        wide = torch.promote_types(logits.dtype, torch.float32)
        nats = torch.empty(len(logits), dtype=wide, device=logits.device)
        for rows in _pieces(logits):
            own = logits[rows].to(wide).log_softmax(-1)
            wanted = teacher_logits[rows].to(wide).log_softmax(-1)
            nats[rows] = (wanted.exp() * (wanted - own)).sum(-1)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, teacher_logits = ctx.saved_tensors
        logits_grad = torch.empty_like(logits)
        for rows in _pieces(logits):
            difference = logits[rows].to(grad.dtype).softmax(-1)
            difference -= teacher_logits[rows].to(grad.dtype).softmax(-1)
            logits_grad[rows] = (difference * grad[rows, None]).to(logits.dtype)
        return logits_grad, None


def _pieces(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_VALUES // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))
