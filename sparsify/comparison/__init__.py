"""Runs side by side: what differs between them, what it did to loss and zeros, and what may be compared."""

from sparsify.comparison.compare import compare
from sparsify.comparison.schema import Comparison, read_comparison
from sparsify.comparison.table import comparison_summary
from sparsify.comparison.write import check_folder, default_folder, write_comparison

__all__ = [
    "Comparison",
    "check_folder",
    "compare",
    "comparison_summary",
    "default_folder",
    "read_comparison",
    "write_comparison",
]
