"""Decodes texts token by token with cache-aware masks (DIP-CA, arXiv 2412.01380), and measures what that costs.

The masks depend on the caches, so there is one sequence at a time, caches are empty when it begins, and the whole text is decoded
token by token: nothing is a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from sparsify.errors import RunError
from sparsify.mixture.sequences.reader import NO_LOSS, PackedSequence
from sparsify.models import SparseModel
from sparsify.models.masking import has_experts, kept_count, site_rules
from sparsify.runtime.cache_aware import CacheAwareTopK
from sparsify.runtime.cache_policies import cache_policy
from sparsify.simulation.trace import LayerTrace, RecordedTrace

CACHE_AWARE_SITES = ("ffn_in", "inter")


@dataclass(frozen=True)
class CacheAwareDecode:
    """One text.

    Attributes:
        trace: The masks that were chosen.
        loss: Summed over the labels, nats.
        labels: How many tokens were predicted.
    """

    trace: RecordedTrace
    loss: float
    labels: int


def check_cache_aware(config: Any) -> None:
    """Refuses a model whose masks cannot depend on caches.

    Raises:
        RunError: With the reason.
    """
    rules = site_rules(config)
    fits = {site: rules[site].rule == "top_k" and not rules[site].weighted for site in rules}
    if tuple(rules) != CACHE_AWARE_SITES or not all(fits.values()) or any(one.rotated for one in rules.values()):
        raise RunError(
            "--gamma needs top-k masks on ffn_in and inter, which this model does not store.",
            next_step="Convert it with `sparsify convert MODEL --method dip --target-zeros 0.5`, for example.",
        )
    if has_experts(config):
        raise RunError(
            "--gamma is for dense models: the experts of a token share one mask of the inputs, but not one cache.",
            next_step="Omit --gamma, or give a dense model.",
        )


@torch.no_grad()
def decode_cache_aware(
    model: SparseModel,
    sequences: Sequence[PackedSequence],
    *,
    gamma: float,
    policy: str,
    capacities: Sequence[int],
    warm_up: bool = True,
    fixed_top: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> list[CacheAwareDecode]:
    """Decodes each sequence from empty caches.

    Args:
        model: One that `check_cache_aware` lets pass.
        sequences: Their tokens and labels; documents in one sequence see each other.
        gamma: Factor of the sizes of what is not resident; 1 is plain DIP.
        policy: An online cache policy without a hot set.
        capacities: Slots that a layer's caches of inputs and of neurons hold.
        warm_up: As in `CacheAwareTopK`.
        fixed_top: As in `CacheAwareTopK`.
        tell: Gets a line of progress before each sequence.
    """
    decoder = _Decoder(model, gamma, policy, capacities, warm_up, fixed_top)
    found = []
    for number, sequence in enumerate(sequences, 1):
        tell(f"γ {gamma:g}: decoding sequence {number} of {len(sequences)}")
        found.append(decoder.run(sequence))
    return found


class _Decoder:
    def __init__(
        self, model: SparseModel, gamma: float, policy: str, capacities: Sequence[int], warm_up: bool, fixed_top: int
    ) -> None:
        self._model = model
        self._blocks: list[Any] = model.ffn_blocks()
        self._choices: list[list[CacheAwareTopK]] = []
        for block in self._blocks:
            sizes = model.config.hidden_size, model.config.intermediate_size
            own = []
            for mask, slots, capacity in zip(self._masks(block), sizes, capacities, strict=True):
                cache = cache_policy(policy, slots, capacity)
                kept = kept_count(float(mask.kept_share), slots)
                own.append(CacheAwareTopK(cache, kept, gamma, warm_up=warm_up, fixed_top=fixed_top))
            self._choices.append(own)
        self._chosen: list[list[list[np.ndarray]]] = []

    @staticmethod
    def _masks(block: Any) -> tuple[Any, Any]:
        return block.input_mask, block.ffn_activation.inter_mask

    def run(self, sequence: PackedSequence) -> CacheAwareDecode:
        for choice in (one for own in self._choices for one in own):
            choice.reset()
        self._chosen = [[[], []] for _ in self._blocks]
        hooks = [
            mask.register_forward_hook(partial(self._choose, layer, unit))
            for layer, block in enumerate(self._blocks)
            for unit, mask in enumerate(self._masks(block))
        ]
        loss, labels, cache = 0.0, 0, None
        try:
            for token, label in zip(sequence.input_ids.tolist(), sequence.labels.tolist(), strict=True):
                output = self._model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                if label != NO_LOSS:
                    loss += float(functional.cross_entropy(output.logits[0, -1:].float(), torch.tensor([label])))
                    labels += 1
        finally:
            for hook in hooks:
                hook.remove()
        recorded = [LayerTrace([np.stack(masks) for masks in own]) for own in self._chosen]
        return CacheAwareDecode(RecordedTrace(recorded), loss, labels)

    def _choose(self, layer: int, unit: int, mask: Any, args: tuple[torch.Tensor, ...], output: Any) -> torch.Tensor:
        x = args[0]
        chosen, _ = self._choices[layer][unit].choose(x.detach().abs().float().flatten().numpy())
        self._chosen[layer][unit].append(chosen)
        return torch.where(torch.from_numpy(chosen).view_as(x), x, 0.0)
