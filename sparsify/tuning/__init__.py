"""Finds better mixture ratios from short proxy runs: search space, trials, regression, decision."""
