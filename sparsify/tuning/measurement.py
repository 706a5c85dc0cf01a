"""What a trial's model makes of held-out text of every domain, also of those that it was not trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.mixture.heldout import mixture_windows
from sparsify.mixture.windows import NO_LOSS, Window, collate
from sparsify.models import SparseModel
from sparsify.recipe import Recipe
from sparsify.sparsity.probe import SparsityProbe
from sparsify.training.validation import window_losses as cross_entropies

HeldOut = Mapping[str, Sequence[Window]]
"""Held-out windows by domain."""


class Measurement(BaseModel):
    """Losses of one model, in nats per token.

    Attributes:
        losses: Mean loss on each domain.
        zeros: Share of exact zeros among the neuron activations, over all domains' windows.
        window_losses: Mean loss of each window of each domain; windows without labels are left out.
        held_out_fingerprint: Of the windows. Only measurements that agree in it can be compared.
    """

    losses: dict[str, float]
    zeros: float
    window_losses: dict[str, list[float]]
    held_out_fingerprint: str


def held_out_halves(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, windows_per_domain: int
) -> tuple[HeldOut, HeldOut]:
    """Held-out windows of every source of the mixture, whatever its share: to judge trials on, and to confirm on.

    Each half has `windows_per_domain` windows of each source, as far as there are that many. They do not depend on any
    share, so they are the same for all trials.

    Raises:
        MixtureError: If a source holds out fewer than two windows.
    """
    mixture = deepcopy(recipe.mixture)
    mixture.instruction_token_share, mixture.phases = None, []
    for source in mixture.sources.values():
        source.token_share = 1 / len(mixture.sources)
    window_tokens = recipe.training.window_tokens
    wanted = 2 * windows_per_domain * len(mixture.sources)
    windows: dict[str, list[Window]] = {name: [] for name in mixture.sources}
    for window in mixture_windows(
        mixture,
        tokenizer,
        num_tokens=wanted * window_tokens,
        window_tokens=window_tokens,
        cache_dir=Path(recipe.cache_dir).expanduser(),
    ):
        windows[window.source].append(window)
    for name, held_out in windows.items():
        if len(held_out) < 2:
            raise MixtureError(
                f"Source {name!r} holds out less than two windows of {window_tokens} tokens.",
                allowed="One to judge the trials on, another to confirm the choice on.",
                next_step="Raise mixture.validation_fraction, add documents, or lower training.window_tokens.",
            )
    # Neighbours in turn, so that both halves lie over all held-out documents.
    trial, confirmation = (
        {name: held_out[half::2] for name, held_out in windows.items()} for half in (0, 1)
    )
    return trial, confirmation


@torch.no_grad()
def measure_domains(model: SparseModel, held_out: HeldOut, micro_batch_windows: int) -> Measurement:
    """Loss of a model on every domain, and its zeros, in one pass.

    Raises:
        MixtureError: If a domain's windows hold no label to predict.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()  # pyright: ignore[reportArgumentType]  (transformers decorates `to`)
    losses: dict[str, float] = {}
    window_losses: dict[str, list[float]] = {}
    with SparsityProbe(model) as probe:
        for name, windows in held_out.items():
            sums, counts = _window_sums(model, windows, micro_batch_windows)
            if not counts.sum():
                raise MixtureError(
                    f"The held-out windows of source {name!r} hold no token that carries loss.",
                    next_step="Set mixture.instruction_loss=all, or raise training.window_tokens.",
                )
            losses[name] = float(sums.sum() / counts.sum())
            window_losses[name] = (sums / counts)[counts > 0].tolist()
    zeros = probe.statistics().zero_share("product")
    return Measurement(
        losses=losses,
        zeros=zeros,
        window_losses=window_losses,
        held_out_fingerprint=fingerprint(held_out),
    )


def _window_sums(
    model: SparseModel, windows: Sequence[Window], micro_batch_windows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss and number of labels of each window. Two tensors [n], float64."""
    sums, counts = [], []
    for start in range(0, len(windows), micro_batch_windows):
        batch = collate(windows[start : start + micro_batch_windows])
        batch = {key: value.to(model.device) for key, value in batch.items()}
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        sums.append(cross_entropies(logits, batch["labels"]).double().cpu())
        counts.append((batch["labels"] != NO_LOSS).double().sum(dim=1).cpu())
    return torch.cat(sums), torch.cat(counts)


def fingerprint(held_out: HeldOut) -> str:
    """Of all tokens and labels of the windows."""
    digest = hashlib.blake2b(digest_size=12)
    for name, windows in held_out.items():
        digest.update(f"{name}/{len(windows)}".encode())
        for window in windows:
            digest.update(window.input_ids.tobytes() + window.labels.tobytes())
    return digest.hexdigest()
