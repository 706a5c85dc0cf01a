"""Sparse decoding: feed-forward blocks that read only the rows of neurons that fire, and models that use them."""

from sparsify.models.quantised import BlockMatrix, quantise
from sparsify.runtime.accelerate import WEIGHT_FORMATS, Acceleration, accelerate
from sparsify.runtime.ffn import FfnWeights, Predictor, RowsRead, sparse_ffn
from sparsify.runtime.weights import LayerPredictors

__all__ = [
    "WEIGHT_FORMATS",
    "Acceleration",
    "BlockMatrix",
    "FfnWeights",
    "LayerPredictors",
    "Predictor",
    "RowsRead",
    "accelerate",
    "quantise",
    "sparse_ffn",
]
