"""Benchmarks against a named baseline, as ratios measured in one process."""
