"""Predictors of firing neurons, which let an engine skip the weights of the others."""

from sparsify.predictors.format import (
    BlockPredictor,
    PredictorFacts,
    Predictors,
    read_predictors,
    write_predictors,
)

__all__ = [
    "BlockPredictor",
    "PredictorFacts",
    "Predictors",
    "read_predictors",
    "write_predictors",
]
