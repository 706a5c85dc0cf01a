"""The reconstruction of the attention's output projection under a mask: ridge regression as for down projections.

The new W_o reproduces, from the masked inputs, what the attention without masks adds to the stream, and so much of the error of the
layers before it as `conversion.refit_target` says. It is kept only if that is better on held-out tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from sparsify.methods.layerwise import Attention
from sparsify.methods.reconstruction import Errors, Gram

OUTPUT = "o_proj"


@dataclass(frozen=True)
class Sequences:
    """Some calibration sequences before a layer.

    Attributes:
        dense: The dense model's residual stream, [sequences, tokens, hidden]; None where it is not computed.
        converted: The converted model's, of the same shape.
        position_ids: [sequences, tokens].
        fit: Tokens that a method may look at, bool [sequences * tokens].
        held_out: Held-out tokens, bool [sequences * tokens].
    """

    dense: torch.Tensor | None
    converted: torch.Tensor
    position_ids: torch.Tensor
    fit: torch.Tensor
    held_out: torch.Tensor


@dataclass(frozen=True)
class AttentionLayer:
    """The attention of a layer as a method rewrites it: its masks are fitted.

    Attributes:
        number: Of the layer.
        attention: Is changed.
        dtype: Dtype on disk: new weights are rounded to it.
        sequences: Gives all calibration sequences, again on each call.
    """

    number: int
    attention: Attention
    dtype: torch.dtype
    sequences: Callable[[], Iterator[Sequences]]


def refit_output(layer: AttentionLayer, *, ridge: float, repaired: float) -> dict[str, float | str | None]:
    """Gives an attention whose masks are fitted another output projection, where that is better on held-out tokens.

    Args:
        layer: Its attention is changed.
        ridge: As in `Gram.solve`.
        repaired: Part of the accumulated error of the stream that is corrected.

    Returns:
        `error_before` and `error_refitted`, relative, on held-out tokens; and `kept_because` if the old one is kept.
    """
    attention, sequences, dtype = layer.attention, layer.sequences, layer.dtype
    old = attention.weight(OUTPUT).clone()
    gram = Gram(old.shape[1], old.shape[0], old.device)
    for part in sequences():
        x, wanted = _rows(attention, part, part.fit, repaired)
        gram.add(x, wanted)
    new = gram.solve(old, ridge).to(dtype).float()
    errors = Errors(("before", "refitted"), old.device)
    for part in sequences():
        if part.held_out.any():
            x, wanted = _rows(attention, part, part.held_out, repaired)
            errors.add(wanted, before=x @ old.T, refitted=x @ new.T)
    before, after = errors.relative("before"), errors.relative("refitted")
    reason = None
    if before is None or after is None:
        reason = "no held-out token to evaluate the refit on"
    elif not after < before:
        reason = "the refit was worse on held-out tokens"
    else:
        attention.refit(OUTPUT, new, dtype)
    return {"error_before": before, "error_refitted": after, "kept_because": reason}


def _rows(
    attention: Attention, part: Sequences, rows: torch.Tensor, repaired: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the output projection reads under the masks, and what it should make of that; of some tokens."""
    attention.masked = False
    own = attention.attention_output(part.converted, part.position_ids)
    wanted = own
    if repaired:
        assert part.dense is not None
        dense = attention(part.dense, part.position_ids)
        wanted = own + repaired * attention.attention_gap(dense, part.converted, own)
    x = attention.reads([OUTPUT], part.converted, part.position_ids)[OUTPUT]
    return x.flatten(0, -2)[rows], wanted.flatten(0, -2)[rows] - attention.constant(OUTPUT)
