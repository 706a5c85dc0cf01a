"""What is measured while a run trains: validation loss and zeros by source, samples, and the suite at checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from sparsify.conversion.source_tensors import check_base_loss
from sparsify.errors import MixtureError
from sparsify.methods.calibrate import CalibrationStage
from sparsify.methods.calibrated_checkpoint import read_calibration
from sparsify.methods.live_model import Engine, evaluating
from sparsify.mixture.sequences.reader import NO_LOSS, PackedSequence, collate
from sparsify.recipe.evaluation import EvalSection
from sparsify.sparsity.probe import SparsityProbe
from sparsify.sparsity.statistics import ActivationStatistics
from sparsify.training.kernels.activation import fuse_activation
from sparsify.training.session import Session
from sparsify.training.suite_results import suite_is_due
from sparsify.training.telemetry import Validation, loss_words

logger = logging.getLogger(__name__)


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


def mean_loss(losses: Mapping[str, float | None], shares: Mapping[str, float]) -> float | None:
    """Mean of the sources' losses, weighted by their token shares; a source without labels is not part of it. None if
    no source with a share has labels.
    """
    known = {source: loss for source, loss in losses.items() if loss is not None}
    weights = {source: shares.get(source, 0.0) for source in known}
    total = sum(weights.values())
    return sum(weights[source] * loss for source, loss in known.items()) / total if total else None


def check_labels(held_out: Mapping[str, Sequence[PackedSequence]], shares: Mapping[str, float]) -> list[str]:
    """One warning for each source whose held-out sequences have no label. Raises MixtureError if no source has any."""
    labels = {
        name: sum(int((one.labels != NO_LOSS).sum()) for one in sequences) for name, sequences in held_out.items()
    }
    length = len(next(iter(held_out.values()))[0].labels)
    change = "Raise training.sequence_length, check mixture.chat_template, or set mixture.instruction_loss=all."
    if not any(number and shares.get(name, 0.0) for name, number in labels.items()):
        raise MixtureError(
            f"No held-out sequence of {length:,} tokens has a token that carries loss, in none of the sources "
            f"{', '.join(labels)}: the run would train on nothing.",
            next_step=change,
        )
    return [
        f"Source {name!r}: none of its {len(held_out[name]):,} held-out sequences of {length:,} tokens has a token that "
        f"carries loss. It has no validation loss, and trains on little or nothing. {change}"
        for name, number in labels.items()
        if not number
    ]


@torch.no_grad()
def validate(
    engine: Engine,
    sequences: Mapping[str, Sequence[PackedSequence]],
    shares: Mapping[str, float],
    micro_batch_size: int,
) -> Validation:
    """Runs the held-out sequences through the live model; every rank calls it with the same sequences."""
    losses: dict[str, float | None] = {}
    statistics = {}
    for source, held_out in sequences.items():
        with evaluating(engine), SparsityProbe(engine.module) as probe:
            losses[source] = _source_loss(engine, probe, held_out, micro_batch_size)
        statistics[source] = probe.statistics().reduce()
    return Validation(
        loss=mean_loss(losses, shares),
        losses=losses,
        zeros={source: counts.zero_share("product") for source, counts in statistics.items()},
        statistics=reduce(ActivationStatistics.merge, statistics.values()),
    )


def _source_loss(
    engine: Engine, probe: SparsityProbe, sequences: Sequence[PackedSequence], micro_batch_size: int
) -> float | None:
    """Nats per label; None if there is no label. Ranks take turns sequence by sequence; all of them make the same number of passes, which ZeRO-3 needs."""
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
        logits = engine(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        totals[0] += sequence_losses(logits, batch["labels"]).double().sum()
        totals[1] += (batch["labels"] != NO_LOSS).sum()
    dist.all_reduce(totals)
    return float(totals[0] / totals[1]) if totals[1] else None


@torch.no_grad()
def continue_prompts(engine: Engine, tokenizer: PreTrainedTokenizerFast, settings: EvalSection) -> list[str]:
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


def validate_start(session: Session) -> None:
    """Before any training: the base with its own activation, then what the activation replacement alone made of it."""
    for warning in check_labels(session.held_out, session.shares):
        if dist.get_rank() == 0:
            logger.warning(warning)
    model, activation = session.engine.module, session.recipe.activation.ffn_activation
    base = model.config.base_ffn_activation
    source = session.recipe.model.source or "the random weights"
    calibration = read_calibration(session.run.initial)
    if calibration is not None:
        # The weights are no longer the base's, which was measured on the same sequences while it was calibrated.
        _record_base(session, calibration.stages[0])
        _validate(session, "after_replacement")
    elif session.recipe.model.init == "pretrained" and activation != base:
        model.set_ffn_activation(base, model.config.base_ffn_gate_threshold)
        check_base_loss(_validate(session, "base"), source)
        model.set_ffn_activation(activation, session.recipe.activation.model_gate_threshold)
        fuse_activation(model, session.recipe)
        _validate(session, "after_replacement")
    else:
        check_base_loss(_validate(session, "base"), source)


def validate_session(session: Session) -> None:
    """The model after the newest step."""
    fields: dict[str, Any] = {"label": "training"}
    for objective in session.objectives:
        fields |= objective.before_validation()
    _validate(session, **fields)


def sample(session: Session) -> None:
    """Continues `eval.sample_prompts`."""
    state, settings = session.state, session.recipe.eval
    if settings.sample_prompts:
        texts = continue_prompts(session.engine, session.tokenizer, settings)
        session.telemetry.samples(state.step, state.seen_tokens, settings.sample_prompts, texts)


def evaluate_suite(session: Session) -> bool:
    """Runs the suite on the newest checkpoint where it is due.

    Returns:
        False when a rank has to stop before that is done.
    """
    if session.suite is None or not suite_is_due(session.recipe, session.state):
        return True
    return session.suite.measure(session)


def _validate(session: Session, label: str, **fields: Any) -> float | None:
    size, state = session.recipe.training.micro_batch_size, session.state
    result = validate(session.engine, session.held_out, session.shares, size)
    session.telemetry.validation(state.step, state.seen_tokens, result, label, **fields)
    session.state = replace(state, held_out_loss=result.loss)
    return result.loss


def _record_base(session: Session, stage: CalibrationStage) -> None:
    """Records the validation losses of the dense base that a calibration measured."""
    loss = mean_loss(stage.losses, session.shares)
    session.record(
        "validation",
        f"validation base: loss {loss_words(loss)}, measured during calibration",
        label="base",
        loss=loss,
        sources=stage.losses,
        zeros=stage.zeros,
        source_zeros={},
    )
