"""Learning rate as a pure function of the tokens seen, so that nothing but a counter needs to be saved for it."""

from __future__ import annotations

import math

from sparsify.recipe import OptimizerSection


def learning_rate(optimizer: OptimizerSection, seen_tokens: int, budget_tokens: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to the final rate, which is the floor.

    Args:
        optimizer: Peak, floor and length of the warm-up.
        seen_tokens: Tokens seen when the step is finished.
        budget_tokens: Tokens of the whole run.
    """
    if seen_tokens < optimizer.warmup_tokens:
        return optimizer.peak_learning_rate * seen_tokens / optimizer.warmup_tokens
    decay_tokens = max(1, budget_tokens - optimizer.warmup_tokens)
    progress = min(1.0, (seen_tokens - optimizer.warmup_tokens) / decay_tokens)
    height = optimizer.peak_learning_rate - optimizer.final_learning_rate
    return optimizer.final_learning_rate + height * 0.5 * (1 + math.cos(math.pi * progress))
