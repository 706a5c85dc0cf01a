"""Published scores, for reference columns: marked as published, since nobody here measured them."""

from __future__ import annotations

from functools import cache

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict

from sparsify.catalogue import folder


class PublishedSuite(BaseModel):
    """Published rows of one suite."""

    model_config = ConfigDict(extra="forbid")

    source: str
    columns: list[str]
    models: dict[str, list[float]]
    """Per cent, as printed."""
    caveat: str


@cache
def published() -> dict[str, PublishedSuite]:
    """Published rows by the name of the suite."""
    suites = OmegaConf.to_container(
        OmegaConf.load(folder("eval") / "published" / "turbosparse.yaml")
    )
    assert isinstance(suites, dict)
    return {str(name): PublishedSuite.model_validate(rows) for name, rows in suites.items()}


def published_scores(suite: str) -> tuple[PublishedSuite, dict[str, dict[str, float]]] | None:
    """The published rows of a suite: for each model, the score of each task as a share; None if there are none."""
    rows = published().get(suite)
    if rows is None:
        return None
    scores = {
        model: {task: value / 100 for task, value in zip(rows.columns, values, strict=True)}
        for model, values in rows.models.items()
    }
    return rows, scores
