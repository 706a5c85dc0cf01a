"""What the words of a sparsity report mean. Printed on every report, as published numbers differ in these choices."""

from __future__ import annotations

from sparsify.models.activations import ACTIVATIONS


def formula(ffn_activation: str, ffn_thresholds: str) -> str:
    """What a neuron's activation is, in the notation of the page."""
    above = ", where that exceeds its neuron's threshold in size, else 0"
    return ACTIVATIONS[ffn_activation].formula + (above if ffn_thresholds == "neuron" else "")


def definitions(
    *,
    ffn_activation: str,
    ffn_thresholds: str,
    dtype: str,
    num_tokens: int,
    num_experts: int,
    experts_per_token: int,
    dead_rate_bound: float,
) -> dict[str, str]:
    """Term to meaning, with the facts of one measurement filled in."""
    terms = {
        "Neuron activation": f"One entry of {formula(ffn_activation, ffn_thresholds)}, the vector that a feed-forward block multiplies "
        "with its down projection. Its two factors are called gate and up.",
        "Exact zero": f"A value that the model itself, computing in {dtype}, made equal to 0. Nothing else is counted as one; "
        "values that are merely small count as non-zero.",
        "Share of zeros": "Zero values divided by all values, every token with equal weight.",
        "p5, p50, p95": "Percentiles over tokens of the share of zeros that a single token has in that block.",
        "Firing": "A neuron fires on a token when its activation is not an exact zero.",
        "Dead neuron": f"Fired on none of the tokens that reached it. Measured on {num_tokens:,} tokens: "
        f"a rare neuron may fire on a longer text. With 95% confidence a dead neuron fires on less than {dead_rate_bound:.2g} of "
        "all tokens (1 − 0.05^(1/n) for the n tokens that reached it, about 3/n), if tokens were drawn independently; "
        "neighbouring tokens are not, so read it as a lower limit of the doubt.",
        "Always-on neuron": "Fired on every token that reached it; the same bound holds for its silent share.",
        "Zeros by cause": "A product is zero because its gate factor is, its up factor is, or both are. A product of two "
        "non-zero factors is counted apart: one that is too small for the dtype, or does not exceed its neuron's threshold.",
        "Position": "Distance from the first token of the document, or of the sequence where a document was cut.",
        "Union, consecutive": "Share of a layer's neurons (of all its experts) that fire on at least one token of a chunk of "
        "consecutive tokens of one document; chunks are cut from the sequence's start, mean over chunks and layers.",
        "Union, unrelated": "The same for tokens drawn from anywhere in the text: the exact mean over every choice of that "
        "many different tokens, C(N − f, n) / C(N, n) being the chance that a neuron that fired on f of N tokens is missing.",
        "Reuse": "Of the neurons that fire on a token, the share that fired on at least one of the 1 to 5 tokens before it, "
        "over tokens with five tokens of their document before them.",
        "Co-activation gap": "Of the tokens on which a neuron fires, the share on which its most frequent partner fires minus "
        "the mean share of all partners; averaged over an even sample of each expert's neurons.",
        "CETT": "Norm of the sum of the neuron outputs that are left out, divided by the norm of the block's output, averaged over "
        "tokens (ReLU² Wins). A layer leaves out the neurons whose output norm |h| · ‖W_down column‖ does not exceed its "
        "threshold; thresholds are searched until every layer has the target error on the inputs of the untouched model. "
        "Experts are judged by their own outputs.",
        "CETT-PPL-p%": "Zeros with such thresholds in all layers at once, at the highest CETT where the perplexity is at most p% "
        "above that of the untouched model (Sparsing Law).",
        "Top-k, threshold": "Top-k leaves out a share of every token's neurons of a block, those of the smallest |h| (TurboSparse, "
        "table 3); the threshold leaves out every |h| below a fixed number of its layer.",
        "Law of training": "Activation ratio (1 − zeros) against training tokens D of this run, Sparsing Law: exp(−c·D^α + b) + A0 for "
        "ReLU-like activations, −c / D^α + A0 for SiLU. The band is that of the law, from the covariance of its coefficients; where "
        "too few validations determine a law none is shown.",
        "Active parameters": "What one token needs. Perfect predictor: gate, up and down of the neurons that fire, and no "
        "others. Gate first: the whole gate of the computed experts, up where the gate is not zero, down where the product is "
        "not. A tied head counts once, as the embedding.",
        "Tokens": f"{num_tokens:,}: every position of the measured sequences, with or without a label.",
        "Loss": "Cross-entropy of the next token, computed in float32, in nats per token; "
        "perplexity is its exponential.",
    }
    if num_experts > 1:
        terms["Experts"] = (
            f"Each token is computed by {experts_per_token} of {num_experts} experts, and counts only in those. Shares of "
            "a layer weigh its experts by the tokens routed to them. An expert without tokens has no dead neurons."
        )
    return terms
