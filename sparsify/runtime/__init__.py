"""Sparse decoding: feed-forward blocks that read only the rows of neurons that fire, and models that use them."""

from sparsify.runtime.activations import KERNEL_ACTIVATIONS, KernelActivation
from sparsify.runtime.ffn import FfnWeights, Predictor, RowsRead, sparse_ffn

__all__ = [
    "KERNEL_ACTIVATIONS",
    "FfnWeights",
    "KernelActivation",
    "Predictor",
    "RowsRead",
    "sparse_ffn",
]
