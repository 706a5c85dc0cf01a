"""Which neurons will fire: predictors that engines ask before they read a neuron's weights."""

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
