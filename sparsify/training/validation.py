"""Validation loss per source, with the share of zeros read in the same pass.

What the model writes while it trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.distributed as dist
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from sparsify.methods.live_model import Engine, evaluating
from sparsify.mixture.sequences.reader import NO_LOSS, PackedSequence, collate
from sparsify.recipe.evaluation import EvalSection
from sparsify.sparsity.probe import SparsityProbe
from sparsify.sparsity.statistics import ActivationStatistics


def sequence_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each sequence, summed over the positions that have a label. [batch]

    Args:
        logits: [batch, tokens, vocabulary].
        labels: [batch, tokens], already shifted; NO_LOSS where there is none.
    """
    by_token = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=NO_LOSS, reduction="none"
    )
    return by_token.view_as(labels).sum(1)


@dataclass(frozen=True)
class Validation:
    """What one validation pass found.

    Attributes:
        loss: Mean of the sources' losses, weighted by their token shares. Nats per token.
        losses: Loss of each source of the mixture, those without a share among them. Nats per token.
        zeros: Share of exact zeros of each source.
        statistics: Which neurons fired on all these sequences.
    """

    loss: float
    losses: dict[str, float]
    zeros: dict[str, float]
    statistics: ActivationStatistics


@torch.no_grad()
def validate(
    engine: Engine,
    sequences: Mapping[str, Sequence[PackedSequence]],
    shares: Mapping[str, float],
    micro_batch_size: int,
) -> Validation:
    """Runs the held-out sequences through the live model; every rank calls it with the same sequences."""
    losses, statistics = {}, {}
    for source, held_out in sequences.items():
        with evaluating(engine), SparsityProbe(engine.module) as probe:
            losses[source] = _source_loss(engine, probe, held_out, micro_batch_size)
        statistics[source] = probe.statistics().reduce()
    weights = {source: shares.get(source, 0.0) for source in losses}
    return Validation(
        loss=sum(weights[source] * loss for source, loss in losses.items()) / sum(weights.values()),
        losses=losses,
        zeros={source: counts.zero_share("product") for source, counts in statistics.items()},
        statistics=reduce(ActivationStatistics.merge, statistics.values()),
    )


def _source_loss(
    engine: Engine, probe: SparsityProbe, sequences: Sequence[PackedSequence], micro_batch_size: int
) -> float:
    """Ranks take turns sequence by sequence; all of them make the same number of passes, which ZeRO-3 needs."""
    rank, world = dist.get_rank(), dist.get_world_size()
    passes = -(-len(sequences) // (world * micro_batch_size))
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for index in range(passes):
        start = (index * world + rank) * micro_batch_size
        mine = sequences[start : start + micro_batch_size]
        batch = collate(mine or sequences[:1])
        if not mine:
            batch["labels"].fill_(NO_LOSS)
        batch = {key: value.to(engine.device) for key, value in batch.items()}
        probe.count(torch.full_like(batch["input_ids"], bool(mine), dtype=torch.bool))
        logits = engine(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        totals[0] += sequence_losses(logits, batch["labels"]).double().sum()
        totals[1] += (batch["labels"] != NO_LOSS).sum()
    dist.all_reduce(totals)
    return float(totals[0] / totals[1].clamp(min=1))


@torch.no_grad()
def continue_prompts(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, settings: EvalSection
) -> list[str]:
    """Greedy continuations of `eval.sample_prompts` by the live model.

    Every rank calls it with the same prompts. Under ZeRO-3 each forward pass gathers weights from all ranks, so they make the
    same number of passes even where rounding lets one of them end its text before the others.

    Returns:
        The continuation of each prompt, without the prompt.
    """
    prompts = [tokenizer(prompt)["input_ids"] for prompt in settings.sample_prompts]
    length = max(map(len, prompts))
    padding = tokenizer.eos_token_id
    # All prompts at once, padded on the left: a pass under ZeRO-3 costs the same for one as for all of them.
    ids = [[padding] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with evaluating(engine):
        output = engine.module.generate(  # pyright: ignore[reportAttributeAccessIssue]
            torch.tensor(ids, device=engine.device),
            attention_mask=torch.tensor(mask, device=engine.device),
            do_sample=False,
            max_new_tokens=settings.sample_tokens,
            pad_token_id=padding,
            synced_gpus=engine.zero_optimization_partition_weights(),
        )
    return tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
