"""How sparse a model is, where, and how reliably."""

from sparsify.sparsity.probe import SparsityProbe
from sparsify.sparsity.report import LayerRow, SparsityReport, measure, read_report, write_report
from sparsify.sparsity.statistics import ActivationStatistics

__all__ = [
    "ActivationStatistics",
    "LayerRow",
    "SparsityProbe",
    "SparsityReport",
    "measure",
    "read_report",
    "write_report",
]
