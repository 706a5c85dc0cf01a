"""What the words of a sparsity report mean. Printed on every report, as published numbers differ in these choices."""

from __future__ import annotations

FORMULAS = {
    "swiglu": "silu(gate) × up",
    "reglu": "max(0, gate) × up",
    "drelu": "max(0, gate) × max(0, up)",
}
"""`ffn_activation` to its two factors, in the notation of the page."""


def definitions(
    *, ffn_activation: str, dtype: str, num_tokens: int, num_experts: int, experts_per_token: int
) -> dict[str, str]:
    """Term to meaning, with the facts of one measurement filled in."""
    terms = {
        "Neuron activation": f"One entry of {FORMULAS[ffn_activation]}, the vector that a feed-forward block multiplies "
        "with its down projection. Its two factors are called gate and up.",
        "Exact zero": f"A value that the model itself, computing in {dtype}, made equal to 0. No threshold is applied; "
        "values that are merely small count as non-zero.",
        "Share of zeros": "Zero values divided by all values, every token with equal weight.",
        "p5, p50, p95": "Percentiles over tokens of the share of zeros that a single token has in that block.",
        "Firing": "A neuron fires on a token when its activation is not an exact zero.",
        "Dead neuron": f"Fired on none of the tokens that reached it. Measured on {num_tokens:,} tokens: "
        "a rare neuron may fire on a longer text.",
        "Always-on neuron": "Fired on every token that reached it.",
        "Tokens": f"{num_tokens:,}: every position of the measured windows, with or without a label.",
        "Loss": "Cross-entropy of the next token, computed in float32, in nats per token; "
        "perplexity is its exponential.",
    }
    if num_experts > 1:
        terms["Experts"] = (
            f"Each token is computed by {experts_per_token} of {num_experts} experts, and counts only in those. Shares of "
            "a layer weigh its experts by the tokens routed to them. An expert without tokens has no dead neurons."
        )
    return terms
