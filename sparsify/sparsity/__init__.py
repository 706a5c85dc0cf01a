"""Measurement of activation sparsity: probe, statistics, error curves, report."""

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
