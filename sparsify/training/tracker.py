"""What wandb gets of a run: every number of its lines, its samples, and a picture of the zeros."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.recipe.recipe import Recipe
from sparsify.runs.run_folder import RunFolder

CELL_PIXELS = 12


class Tracker:
    """A wandb run; offline unless `tracking.wandb=online`."""

    def __init__(self, recipe: Recipe, run: RunFolder) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # takes a second, which runs without it need not wait for

        self._wandb = wandb
        self._run = wandb.init(
            project=recipe.tracking.wandb_project,
            name=recipe.name,
            dir=str(run.path),
            mode=recipe.tracking.wandb,  # pyright: ignore[reportArgumentType]  (validated by recipe.py)
            config=asdict(recipe),
        )

    def numbers(self, record: dict[str, Any]) -> None:
        self._run.log(
            dict(_numbers(record, str(record.get("kind", "sparsity")))), step=record["step"]
        )

    def samples(self, step: int, pairs: list[dict[str, str]]) -> None:
        rows: list[Any] = [[step, pair["prompt"], pair["continuation"]] for pair in pairs]
        table = self._wandb.Table(columns=["step", "prompt", "continuation"], data=rows)
        self._run.log({"samples": table}, step=step)

    def heat_map(self, step: int, layers: list[list[float]]) -> None:
        caption = "share of zeros: layers from top to bottom, validations from left to right"
        image = self._wandb.Image(heat_map(layers), caption=caption)
        self._run.log({"sparsity/heat_map": image}, step=step)

    def close(self) -> None:
        self._run.finish()


def heat_map(layers: list[list[float]]) -> NDArray[np.uint8]:
    """Share of zeros of every layer (rows) at every validation (columns) as a picture, white at 0 and dark at 1.

    Returns:
        Grey levels, with `CELL_PIXELS` a cell each way. [layers * cell, validations * cell]
    """
    grey = np.round(255 * (1 - np.array(layers).T)).astype(np.uint8)
    return np.kron(grey, np.ones((CELL_PIXELS, CELL_PIXELS), np.uint8))


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _numbers(item, f"{name}/{key}")
