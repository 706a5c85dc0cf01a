"""Evaluations that a model card shows: read, and held against the weights that are exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

from sparsify.errors import ExportError
from sparsify.evaluation.model import model_hash, predictors_hash
from sparsify.evaluation.results import EvaluationResults, read_results
from sparsify.evaluation.table import markdown, own_rows
from sparsify.evaluation.write import model_index
from sparsify.export.weights import Trained, load_trained
from sparsify.predictors import Predictors


@dataclass(frozen=True)
class CardEvaluations:
    """What a card shows of evaluations: the Hub's part of its header, and tables."""

    header: str
    tables: list[str]


def read_evaluations(
    folders: Sequence[Path], trained: Trained, predictors: Predictors | None
) -> list[EvaluationResults]:
    """Reads evaluations and refuses those that are not of this checkpoint.

    Args:
        folders: That `sparsify evaluate` wrote.
        trained: The checkpoint.
        predictors: That the bundle holds.

    Raises:
        EvaluationError: If one cannot be read.
        ExportError: If one is of other weights, or of predictors that the bundle does not hold.
    """
    found = [read_results(folder.expanduser()) for folder in folders]
    hashes = {dtype: _hash(trained, dtype) for dtype in {results.dtype for results in found}}
    for folder, results in zip(folders, found, strict=True):
        if results.model_hash != hashes[results.dtype]:
            raise ExportError(
                f"{folder} measured {results.model}, whose weights are not those of {trained.checkpoint}.",
                allowed="Evaluations of the checkpoint that is exported.",
                next_step=f"sparsify evaluate {trained.checkpoint} --suite {results.suite}",
            )
        own = None if predictors is None else predictors_hash(predictors)
        if results.predictors is not None and results.predictors.hash != own:
            raise ExportError(
                f"{folder} was masked by predictors that the bundle does not hold, or with another threshold: "
                f"{results.predictors.folder}, {results.predictors.threshold:g}.",
                next_step="Export with --predictors of that folder, or evaluate with the bundle's predictors.",
            )
    return found


def card_evaluations(name: str, found: Sequence[EvaluationResults]) -> CardEvaluations:
    """Evaluations as a card shows them.

    Args:
        name: The model's, as the Hub shall show it.
        found: The evaluations.
    """
    tables = []
    for results in found:
        rows = own_rows(results)
        title = f"Suite {results.suite}, {results.dtype}"
        if results.predictors is not None:
            title += f", with the predictors above {results.predictors.threshold:g}"
        tables.append("#" + markdown(replace(rows, title=title)))
    header = OmegaConf.to_yaml({"model-index": model_index(name, found)})
    return CardEvaluations(header, tables)


def _hash(trained: Trained, dtype: str) -> str:
    """Of the checkpoint's weights in the type that an evaluation computed in."""
    model = load_trained(trained)
    torch.nn.Module.to(model, getattr(torch, dtype))
    return model_hash(model)
