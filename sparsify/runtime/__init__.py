"""Sparse decoding: feed-forward blocks that read only the rows of neurons that fire, and models that use them."""

from sparsify.runtime.accelerate import Acceleration, accelerate
from sparsify.runtime.activations import KERNEL_ACTIVATIONS, KernelActivation
from sparsify.runtime.ffn import FfnWeights, Predictor, RowsRead, sparse_ffn

__all__ = [
    "KERNEL_ACTIVATIONS",
    "Acceleration",
    "FfnWeights",
    "KernelActivation",
    "Predictor",
    "RowsRead",
    "accelerate",
    "sparse_ffn",
]
