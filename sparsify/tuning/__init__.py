"""Better mixture ratios from short proxy runs: what to vary, trials, a small regression, the choice."""
