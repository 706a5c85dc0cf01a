"""The dense source of a run as its teacher: frozen, whole on every rank, answering the micro-batches that the run trains on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from sparsify.conversion.calibrated import read_record
from sparsify.conversion.folder import load_sparse
from sparsify.conversion.source import read_checkpoint
from sparsify.models import SparseModel
from sparsify.recipe import Recipe
from sparsify.training.run_folder import RunFolder


@dataclass
class Answers:
    """What the dense source makes of one micro-batch; what is not asked for is not here.

    Attributes:
        logits: [windows, tokens, vocabulary]
        ffn_outputs: Of each layer's feed-forward block. [windows, tokens, hidden] each
    """

    logits: torch.Tensor | None = None
    ffn_outputs: list[torch.Tensor] = field(default_factory=list)


class Teacher:
    """Answers without gradients.

    Args:
        model: The dense source, in the precision and on the device that it is to work in; frozen here.
        logits: Whether its logits are asked for.
        ffn_outputs: Whether the answers of its feed-forward blocks are.
    """

    def __init__(self, model: SparseModel, *, logits: bool, ffn_outputs: bool) -> None:
        self._model, self._logits = model.eval().requires_grad_(False), logits
        self._answers = Answers()
        if ffn_outputs:
            for block in answering_blocks(model):
                block.register_forward_hook(self._keep)

    @torch.no_grad()
    def answer(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Answers:
        """Its answers to a micro-batch, with the documents of a window kept apart as the run keeps them.

        Args:
            input_ids: [windows, tokens] int64
            position_ids: Position within the document. [windows, tokens] int64
        """
        answers = self._answers = Answers()
        hidden = self._model.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        if self._logits:
            answers.logits = self._model.lm_head(hidden)
        self._answers = Answers()  # the caller's alone, who knows when they are done with
        return answers

    def _keep(self, block: nn.Module, _: object, output: torch.Tensor) -> None:
        self._answers.ffn_outputs.append(output)


def answering_blocks(model: SparseModel) -> list[nn.Module]:
    """The module of every layer whose output is what the feed-forward block adds to the residual stream.

    In a mixture of experts that is the block around the router and its experts: [windows, tokens, hidden], as in a dense one.
    """
    return [layer.mlp for layer in model.model.layers]  # pyright: ignore[reportReturnType]


def load_teacher(recipe: Recipe, run: RunFolder, device: torch.device) -> Teacher | None:
    """Loads the dense source with its own activation; None where the recipe distils nothing.

    After a bare swap its weights are those that training starts from; a calibrated swap has changed those, and the run folder has
    both. A rank loads all of it, under ZeRO-3 too: call it when no model is being partitioned.

    Args:
        recipe: The run's recipe.
        run: Its folder.
        device: Where to answer.
    """
    settings = recipe.distillation
    if not settings.is_on:
        return None
    is_calibrated = read_record(run.initial) is not None
    folder = run.teacher if is_calibrated else run.initial
    config = read_checkpoint(folder).config
    model = load_sparse(
        folder,
        config["base_ffn_activation"],
        torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32,
        gate_threshold=config["base_ffn_gate_threshold"],
    )
    model.set_attn_implementation(recipe.engine.attention)
    model.to(device=device)  # pyright: ignore[reportCallIssue]
    return Teacher(model, logits=settings.logits_weight > 0, ffn_outputs=settings.ffn_weight > 0)
