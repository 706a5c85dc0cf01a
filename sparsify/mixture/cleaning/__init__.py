"""Exact duplicates, contamination with evaluation items, and what they removed."""
