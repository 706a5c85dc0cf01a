"""Comparison of runs and of evaluations: settings that differ, losses and zeros, and which numbers are comparable."""

from sparsify.compare.runs import compare
from sparsify.compare.schema import Comparison, read_comparison
from sparsify.compare.write import check_folder, default_folder, write_comparison

__all__ = [
    "Comparison",
    "check_folder",
    "compare",
    "default_folder",
    "read_comparison",
    "write_comparison",
]
