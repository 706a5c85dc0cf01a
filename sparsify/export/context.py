"""How much context an exported file may have."""

from __future__ import annotations

from sparsify.models import SparseConfig


def context_reasons(config: SparseConfig, context_tokens: int | None) -> list[str]:
    """Why an engine that attends to all tokens would differ from the model within a context, by default the model's own."""
    reasons = []
    context = context_tokens or config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window is not None and window < context:
        reasons.append(
            f"it attends to the last {window:,} of {context:,} tokens, but the engine to all of them; up to {window:,} tokens "
            f"they agree: --context-tokens {window}"
        )
    if context > config.max_position_embeddings:
        reasons.append(
            f"--context-tokens is {context:,}, but the model's maximum is {config.max_position_embeddings:,}"
        )
    return reasons
