"""Distillation: what a step learns from the dense source in addition to the text, and how far from it the model is.

Three terms (Hinton et al., arXiv 1503.02531, at temperature 1; hidden states as in arXiv 1908.09355; SquareHead, arXiv 2310.06927):
the divergence of the next token's distribution, the error of every feed-forward block's output, and that of the residual stream
after every layer. All count the positions that have a label, as the cross-entropy does, so that empty positions of a sequence and
prompts count in none of them.

The dense source of a run as its teacher: frozen, whole on every rank, run on the micro-batches that the run trains on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from sparsify.conversion.source_checkpoint import read_checkpoint
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.methods.calibrated_checkpoint import read_calibration
from sparsify.methods.objective import MicroBatch, Objective, TrainingRun, objective
from sparsify.mixture.sequences.reader import NO_LOSS
from sparsify.models import SparseModel
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.sparsification import DistillationSection
from sparsify.runs.run_folder import RunFolder


@dataclass
class TeacherOutputs:
    """What the dense source computes for one micro-batch; what is not needed is not here.

    Attributes:
        logits: [sequences, tokens, vocabulary]
        ffn_outputs: Of each layer's feed-forward block. [sequences, tokens, hidden] each
        states: The residual stream after each layer. [sequences, tokens, hidden] each
    """

    logits: torch.Tensor | None = None
    ffn_outputs: list[torch.Tensor] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)


class Teacher:
    """The dense source in the precision and on the device that it is to work in; its weights are frozen here."""

    def __init__(self, model: SparseModel, settings: DistillationSection) -> None:
        self._model, self._logits = model.eval().requires_grad_(False), settings.logits_weight > 0
        self._outputs = TeacherOutputs()
        if settings.ffn_weight:
            for block in output_blocks(model):
                block.register_forward_hook(self._keep)
        if settings.squarehead_weight:
            for layer in model.model.layers:
                layer.register_forward_hook(self._keep_state)

    @torch.no_grad()
    def outputs(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> TeacherOutputs:
        """Its outputs for a micro-batch [sequences, tokens]; by the positions it keeps the documents of a sequence
        apart as the run does.
        """
        outputs = self._outputs = TeacherOutputs()
        hidden = self._model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        if self._logits:
            outputs.logits = self._model.lm_head(hidden)
        self._outputs = TeacherOutputs()  # the caller's alone, who knows when they are no longer needed
        return outputs

    def _keep(self, block: nn.Module, _: object, output: torch.Tensor) -> None:
        self._outputs.ffn_outputs.append(output)

    def _keep_state(self, layer: nn.Module, _: object, output: torch.Tensor) -> None:
        self._outputs.states.append(output)


def output_blocks(model: SparseModel) -> list[nn.Module]:
    """The module of every layer whose output is what the feed-forward block adds to the residual stream.

    In a mixture of experts that is the block around the router and its experts: [sequences, tokens, hidden], as in a dense one.
    """
    return [layer.mlp for layer in model.model.layers]  # pyright: ignore[reportReturnType]


def has_own_teacher(run: RunFolder) -> bool:
    """Whether the dense source is not what training starts from: a calibration changed its weights, it stores a mask, or it is another."""
    is_other = run.recipe.is_file() and run.load_recipe().model.dense_source is not None
    return is_other or read_calibration(run.initial) is not None or run.has_source_mask


def load_teacher(recipe: Recipe, run: RunFolder, device: torch.device) -> Teacher | None:
    """Loads the dense source with its own activation and without a mask; None where the recipe distils nothing.

    After a bare replacement its weights are those that training starts from; otherwise the run folder has both. A rank
    loads all of it, under ZeRO-3 too: call it when no model is being partitioned.
    """
    settings = recipe.distillation
    if not settings.is_on:
        return None
    folder = run.teacher if has_own_teacher(run) else run.initial
    config = read_checkpoint(folder).config
    model = load_sparse(
        folder,
        config["base_ffn_activation"],
        torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32,
        gate_threshold=config["base_ffn_gate_threshold"],
    )
    model.set_attn_implementation(recipe.engine.attention)
    model.to(device=device)  # pyright: ignore[reportCallIssue]
    return Teacher(model, settings)


class Distiller:
    """Context manager around the forward and backward passes of one step.

    It watches activations, never weights, so partitioned weights (ZeRO-3) do not matter to it. A block's error is taken as soon
    as the block has run: where activations are checkpointed, only the teacher's output is kept for the backward pass. What is
    computed again there is not counted again.
    """

    def __init__(
        self,
        settings: DistillationSection,
        teacher: Teacher,
        model: SparseModel,
        device: torch.device,
    ) -> None:
        self._settings, self._teacher, self._model = settings, teacher, model
        self._outputs = TeacherOutputs()
        self._counted = torch.zeros(0)
        self._errors: list[torch.Tensor] = []
        self._distances: list[torch.Tensor] = []
        self._in_forward = False
        # Summed divergence, error of blocks and of the stream, and labels.
        self._totals = torch.zeros(4, dtype=torch.float64, device=device)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        if self._settings.ffn_weight:
            for layer, block in enumerate(output_blocks(self._model)):
                hook = partial(self._take_layer, layer)
                self._handles.append(block.register_forward_hook(hook))
        if self._settings.squarehead_weight:
            for number, layer in enumerate(self._model.model.layers):
                self._handles.append(layer.register_forward_hook(partial(self._take_state, number)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._outputs, self._errors, self._distances = TeacherOutputs(), [], []

    def run_teacher(self, tensors: dict[str, torch.Tensor]) -> None:
        """Runs the teacher on the micro-batch that the model is about to see: `input_ids`, `position_ids` and `labels`,
        [sequences, tokens].
        """
        # Frees the last ones before there are others.
        self._outputs, self._errors, self._distances = TeacherOutputs(), [], []
        self._outputs = self._teacher.outputs(tensors["input_ids"], tensors["position_ids"])
        self._counted = tensors["labels"] != NO_LOSS
        self._in_forward = True

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """All terms of the forward pass that has just ended, weighted, and summed over its labels, from the model's
        logits [sequences, tokens, vocabulary]. []
        """
        self._in_forward = False
        total = torch.zeros((), device=self._totals.device)
        self._totals[3] += self._counted.sum()
        if self._outputs.logits is not None:
            by_token = divergence(logits.flatten(0, 1), self._outputs.logits.flatten(0, 1))
            self._outputs.logits = None  # autograd keeps it as long as it needs it
            nats = (by_token * self._counted.flatten()).sum()
            self._totals[0] += nats.detach()
            total = total + self._settings.logits_weight * nats
        if self._errors:
            error = torch.stack(self._errors).mean()
            self._errors = []
            self._totals[1] += error.detach()
            total = total + self._settings.ffn_weight * error
        if self._distances:
            distance = torch.stack(self._distances).sum()
            self._distances = []
            self._totals[2] += distance.detach()
            total = total + self._settings.squarehead_weight * distance
        return total

    def reduce(self) -> dict[str, float]:
        """What a step's line says, over all ranks; every rank calls it.

        `logits` in nats a label, `ffn` as a part of the teacher's output, `squarehead` as a part of the teacher's stream, summed over
        layers; each before its weight and only where it has one. `added` in nats, as it was added to the loss.
        """
        dist.all_reduce(self._totals)
        *sums, labels = self._totals.tolist()
        settings = self._settings
        weights = {
            "logits": settings.logits_weight,
            "ffn": settings.ffn_weight,
            "squarehead": settings.squarehead_weight,
        }
        means = {key: total / max(labels, 1) for key, total in zip(weights, sums, strict=True)}
        line = {key: mean for key, mean in means.items() if weights[key]}
        line["added"] = sum(weights[key] * mean for key, mean in line.items())
        return line

    def _take_layer(self, layer: int, block: nn.Module, _: object, output: torch.Tensor) -> None:
        wanted = self._outputs.ffn_outputs[layer]
        error = (relative_error(output, wanted) * self._counted).sum()
        if self._in_forward:
            self._errors.append(error)

    def _take_state(self, number: int, layer: nn.Module, _: object, output: torch.Tensor) -> None:
        distance = squarehead(output, self._outputs.states[number], self._counted)
        if self._in_forward:
            self._distances.append(distance)


@objective
class Distillation(Objective):
    name: ClassVar[str] = "distillation"

    def __init__(self, run: TrainingRun, teacher: Teacher) -> None:
        self._run, self._teacher = run, teacher
        self._distiller = self._new_distiller()

    @classmethod
    def of(cls, run: TrainingRun) -> Self | None:
        teacher = load_teacher(run.recipe, run.run, run.engine.device)
        return None if teacher is None else cls(run, teacher)

    @contextmanager
    def step(self) -> Iterator[None]:
        self._distiller = self._new_distiller()
        with self._distiller:
            yield

    def before_forward(self, batch: MicroBatch) -> None:
        self._distiller.run_teacher(batch.tensors)

    def loss(self, batch: MicroBatch, output: Any) -> torch.Tensor:
        return self._distiller.loss(output.logits) * batch.label_weight

    def after_step(self, loss: float) -> dict[str, Any]:
        return {self.name: self._distiller.reduce()}

    def _new_distiller(self) -> Distiller:
        engine, settings = self._run.engine, self._run.recipe.distillation
        return Distiller(settings, self._teacher, engine.module, engine.device)


def relative_error(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared distance of each token's vector from the one that is wanted, as a part of that one's square. [...]

    Relative for each token, since a few tokens of a language model have outputs many times as long as all others'.

    Args:
        output: [..., hidden]
        wanted: [..., hidden], without a gradient.
    """
    wide = torch.promote_types(output.dtype, torch.float32)
    wanted = wanted.to(wide)
    size = wanted.square().sum(-1).clamp_min(torch.finfo(wide).tiny)
    return (output.to(wide) - wanted).square().sum(-1) / size


SMALLEST_MEAN_SQUARE = torch.finfo(torch.bfloat16).eps
"""What SquareHead adds to the teacher's mean square."""


def squarehead(state: torch.Tensor, wanted: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Squared distance of a residual stream from the teacher's, relative to the mean square of that, summed over tokens. []

    The mean square is of a sequence's counted tokens. In the paper it is of a batch: then a loss would depend on what is computed
    together, on the micro-batch and on the ranks.

    Args:
        state: [sequences, tokens, hidden]
        wanted: Of the same shape, without a gradient.
        counted: Bool [sequences, tokens].
    """
    wide = torch.promote_types(state.dtype, torch.float32)
    wanted = wanted.to(wide)
    counts = counted.sum(1).clamp_min(1)
    size = (wanted.square().mean(-1) * counted).sum(1) / counts + SMALLEST_MEAN_SQUARE
    distance = ((state.to(wide) - wanted).square().mean(-1) * counted).sum(1)
    return (distance / size).sum()


def divergence(logits: torch.Tensor, teacher_logits: torch.Tensor, chunk_values: int = 1 << 22) -> torch.Tensor:
    """Kullback-Leibler divergence of each token's distribution from the teacher's, in nats. [tokens]

    Widened piece by piece, forward and back, so that in addition to the two logits only their gradient is ever whole.

    Args:
        logits: [tokens, vocabulary]
        teacher_logits: [tokens, vocabulary], without a gradient.
        chunk_values: Logits that are widened at a time; by default 16 MB for each copy in fp32.
    """
    return cast(torch.Tensor, _Divergence.apply(logits, teacher_logits, chunk_values))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, teacher_logits: torch.Tensor, chunk_values: int) -> torch.Tensor:
        ctx.save_for_backward(logits, teacher_logits)
        ctx.chunk_values = chunk_values
        wide = torch.promote_types(logits.dtype, torch.float32)
        nats = torch.empty(len(logits), dtype=wide, device=logits.device)
        for rows in _pieces(logits, chunk_values):
            own = logits[rows].to(wide).log_softmax(-1)
            wanted = teacher_logits[rows].to(wide).log_softmax(-1)
            nats[rows] = (wanted.exp() * (wanted - own)).sum(-1)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, teacher_logits = ctx.saved_tensors
        logits_grad = torch.empty_like(logits)
        for rows in _pieces(logits, ctx.chunk_values):
            difference = logits[rows].to(grad.dtype).softmax(-1)
            difference -= teacher_logits[rows].to(grad.dtype).softmax(-1)
            logits_grad[rows] = (difference * grad[rows, None]).to(logits.dtype)
        return logits_grad, None, None


def _pieces(logits: torch.Tensor, chunk_values: int) -> Iterator[slice]:
    rows = max(1, chunk_values // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))
