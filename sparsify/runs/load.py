"""From what a user names (a model, a run, one checkpoint of a run) to a model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from sparsify.conversion.manifest import MANIFEST, damage
from sparsify.conversion.source_checkpoint import locate
from sparsify.conversion.sparse_folder import check_activation, load_sparse
from sparsify.conversion.tokenizer import check_tokenizer, load_tokenizer
from sparsify.errors import RunError
from sparsify.metadata import user_path
from sparsify.models import SparseModel
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.state import STATE, consolidated_weights, latest_checkpoint


@dataclass(frozen=True)
class Trained:
    run: RunFolder
    checkpoint: Path


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and where it came from."""

    model: SparseModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    trained: Trained | None


def find_trained(path: Path) -> Trained | None:
    """The run and checkpoint that a path names, or None when it names no run.

    Raises:
        RunError: If the run has no checkpoint yet, or the tokenizer and configuration that it began with are damaged.
    """
    if (path / STATE).is_file():
        return _undamaged(Trained(RunFolder(path.parent.parent), path))
    run = RunFolder(path)
    if not run.recipe.is_file():
        return None
    checkpoint = latest_checkpoint(run.checkpoints)
    if checkpoint is None:
        raise RunError(
            f"{path} has no checkpoint yet.",
            next_step="`sparsify train` with the same recipe continues to the first one.",
        )
    return _undamaged(Trained(run, checkpoint))


def _undamaged(trained: Trained) -> Trained:
    """Checks what is read from `initial` besides the weights, which are the checkpoint's."""
    initial = trained.run.initial
    if not (initial / MANIFEST).is_file():
        return trained
    reason = damage(initial, {path.name for path in initial.iterdir() if path.suffix != ".safetensors"})
    if reason is not None:
        raise RunError(
            f"{initial} is damaged: {reason}.",
            next_step="Restore it from a copy. `sparsify train` with the same recipe makes it again, if its source is still there.",
        )
    return trained


def load(model_or_run: str) -> Loaded:
    """Loads a model folder, a Hub id, a run folder or one checkpoint of a run.

    Raises:
        ModelError: If it is none of these, or damaged.
        RunError: If it is a run without a checkpoint.
    """
    trained = find_trained(user_path(model_or_run))
    if trained is not None:
        model = load_trained(trained)
        return Loaded(model, load_tokenizer(trained.run.initial), model_or_run, trained)
    folder = locate(model_or_run)
    model, tokenizer = load_sparse(folder), load_tokenizer(folder)
    check_tokenizer(tokenizer, model.config, model_or_run)
    return Loaded(model, tokenizer, model_or_run, None)


def load_trained(trained: Trained) -> SparseModel:
    """Loads the weights of a run's checkpoint, in the dtype that its forward passes had."""
    recipe = trained.run.load_recipe()
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    model = load_sparse(trained.run.initial, recipe.activation.ffn_activation, dtype)
    weights = consolidated_weights(trained.checkpoint)
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
        expected.pop("lm_head.weight", None)
    if weights.keys() != expected.keys():
        raise RunError(
            f"{trained.checkpoint} does not hold the model's tensors: {sorted(weights.keys() ^ expected.keys())[:5]}",
            next_step="Use another checkpoint of the run.",
        )
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(weights[name].contiguous())
    check_activation(model, recipe.activation.ffn_activation)
    return model
