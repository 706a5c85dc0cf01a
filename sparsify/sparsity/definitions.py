"""Definitions of the terms of a sparsity report. Every report prints them, since publications define them differently."""

from __future__ import annotations

from collections.abc import Mapping

from sparsify.models.activations import ACTIVATIONS

KEPT = {
    "layer": "exceeds the layer's threshold in size",
    "channel": "exceeds a threshold of its own in size",
    "top_k": "is among the stored share of the largest of its token",
    "top_p": "is among the largest of its token that make up the stored share of their sum",
    "router": "has a score of the layer's router whose sigmoid exceeds the stored threshold",
    "router_top_k": "is among the stored share of those that the layer's router scores highest",
}
"""Which elements a mask keeps, in words, by what reports call it (`masks`)."""
INPUTS = {
    "attn_in": "the input of the query, key and value projections",
    "attn_in.q": "the input of the query projection",
    "attn_in.k": "the input of the key projection",
    "attn_in.v": "the input of the value projection",
    "attn_out": "the input of the attention's output projection",
    "ffn_in": "the input of the gate and up projections",
    "ffn_in.gate": "the input of the gate projection",
    "ffn_in.up": "the input of the up projection",
    "group": "the groups of a block's neurons that the layer's router drops or keeps",
}
"""COUNTED_SITES in words."""


ROUTING_DEFINITIONS = {
    "Sub-dimension": "One of equal parts of the hidden size. The shared ones are used by every token; of the others, a router in front "
    "of every attention and feed-forward block chooses the same number for each token. What is not chosen is an exact zero in what the "
    "block reads, and is not written by it. It does not count among the zeros above, which are of neurons, but it does in the weight "
    "density and the active parameters.",
    "Load": "Share of a router's choices that fell on a sub-dimension, over all tokens; the specialised ones sum to 1.",
}
"""Terms of models that route tokens to parts of the hidden size."""


def formula(ffn_activation: str, masks: Mapping[str, str]) -> str:
    parts = [ACTIVATIONS[ffn_activation].formula]
    if "group" in masks:
        parts.append(f"of the neurons whose group {KEPT[masks['group']]}, else 0")
    if "gate" in masks:
        parts.append(f"with the left factor 0 unless it {KEPT[masks['gate']]}")
    if "up" in masks:
        parts.append(f"with the right factor 0 unless it {KEPT[masks['up']]}")
    if "inter" in masks:
        own, by_proxy, _ = masks["inter"].partition(" by proxy")
        parts.append(f"where that {KEPT[own]}{', as int4 copies of gate and up say' if by_proxy else ''}, else 0")
    return ", ".join(parts)


def definitions(
    *,
    ffn_activation: str,
    masks: Mapping[str, str],
    dtype: str,
    num_tokens: int,
    num_experts: int,
    experts_per_token: int,
    dead_rate_bound: float,
) -> dict[str, str]:
    """Term to definition, with the numbers of one measurement."""
    terms = {
        "Neuron activation": f"One entry of {formula(ffn_activation, masks)}, the vector that a feed-forward block multiplies "
        "with its down projection. Its two factors are called gate and up.",
        "Exact zero": f"A value that the model, computing in {dtype}, makes equal to 0. Values that are merely small count "
        "as non-zero.",
        "Share of zeros": "Zero values divided by all values; every token has the same weight.",
        "p5, p50, p95": "Percentiles over tokens of a single token's share of zeros in that block.",
        **{
            f"{site} zeros": f"Share of exact zeros in {INPUTS[site]}, after the mask that the model stores: an element is "
            f"kept where it {KEPT[kept]}. Counted once for a token and layer{', or expert' if site == 'group' else ''}."
            for site, kept in masks.items()
            if site in INPUTS
        },
        "Firing": "A neuron fires on a token when its activation is not an exact zero.",
        "Dead neuron": f"A neuron that fired on none of the tokens routed to it. Measured on {num_tokens:,} tokens: "
        f"a rare neuron may fire on a longer text. With 95% confidence a dead neuron fires on less than {dead_rate_bound:.2g} of "
        "all tokens (1 − 0.05^(1/n) for n routed tokens, about 3/n), assuming independent tokens. Neighbouring tokens are not "
        "independent, so treat this as a lower bound on the uncertainty.",
        "Always-on neuron": "A neuron that fired on every token routed to it; the same bound holds for the share of tokens on "
        "which it does not fire.",
        "Zeros by cause": "A product is zero because its gate factor, its up factor or both are zero. Zero products of two "
        "non-zero factors are counted separately: they underflow, or do not exceed their threshold.",
        "Position": "Distance from the first token of the document, or of the sequence if the document continues from the "
        "previous sequence.",
        "Union, consecutive": "Share of a layer's neurons (of all its experts) that fire on at least one token of a chunk of "
        "consecutive tokens of one document. Chunks are cut from the start of the sequence; mean over chunks and layers.",
        "Union, unrelated": "The same for tokens from anywhere in the text: the exact mean over every choice of n different "
        "tokens, where C(N − f, n) / C(N, n) is the probability that a neuron that fired on f of N tokens does not fire.",
        "Reuse": "Share of the neurons firing on a token that also fired on at least one of the 1 to 5 tokens before it, "
        "over tokens with five preceding tokens in their document.",
        "Co-activation gap": "Of the tokens on which a neuron fires, the share on which its most frequent partner fires, minus "
        "the mean share over all partners; averaged over an even sample of each expert's neurons.",
        "CETT": "Cumulative error of tail truncation: norm of the sum of the dropped neurons' outputs divided by the norm of the "
        "block's output, averaged over tokens (ReLU² Wins). A layer drops the neurons whose output norm |h| · ‖W_down column‖ "
        "does not exceed its threshold; thresholds are searched until every layer has the target error on the inputs of the "
        "unmodified model. In a mixture of experts, the error is relative to the output of each expert.",
        "CETT-PPL-p%": "Zeros with such thresholds in all layers at once, at the highest CETT at which the perplexity is at most "
        "p% above that of the unmodified model (Sparsing Law).",
        "Top-k, threshold": "Top-k drops a fixed share of each token's neurons in a block, those with the smallest |h| "
        "(TurboSparse, table 3); threshold drops every |h| below a fixed value per layer.",
        "Scaling law": "Activation ratio (1 − zeros) against training tokens D of this run (Sparsing Law): exp(−c·D^α + b) + A0 for "
        "ReLU-like activations, −c / D^α + A0 for SiLU. The band is the confidence band of the law, from the covariance of its "
        "coefficients. No law is shown if the validations do not determine one.",
        "Active parameters": "Parameters that one token needs. Perfect predictor: gate, up and down of the neurons that fire. "
        "Gate first: the whole gate of the computed experts, up where the gate is not zero, down where the product is not. A "
        "tied head counts once, as the embedding.",
        "Weight density": "Share of the weights of the linear projections of all layers (attention and feed-forward blocks, of a "
        "mixture the experts that a token is routed to) that one token reads, if what an exact zero multiplies is not read: a "
        "projection's columns for zeros of its input, rows of up for zeros of the gate (or of the gate for zeros of up, whichever "
        "has more), columns of down for zeros of the product. What a mask reads in addition counts. Every token is masked.",
        "Tokens": f"{num_tokens:,}: every position of the measured sequences, with or without a label.",
        "Loss": "Cross-entropy of the next token, computed in float32, in nats per token; "
        "perplexity is its exponential.",
    }
    if num_experts > 1:
        terms["Experts"] = (
            f"Each token is computed by {experts_per_token} of {num_experts} experts and counts only in those. Shares of "
            "a layer weight its experts by the tokens routed to them. An expert without tokens has no dead neurons."
        )
    return terms
