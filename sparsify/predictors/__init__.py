"""Predictors of firing neurons, which let an engine skip the weights of the others."""

from sparsify.predictors.format import (
    BlockPredictor,
    EvaluationFacts,
    PredictorFacts,
    Predictors,
    read_predictors,
    write_predictors,
)

__all__ = [
    "BlockPredictor",
    "EvaluationFacts",
    "PredictorFacts",
    "Predictors",
    "read_predictors",
    "write_predictors",
]
