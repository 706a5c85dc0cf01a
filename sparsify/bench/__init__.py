"""Benchmarks: what this package does beside what people use otherwise, in the same process, as ratios."""
