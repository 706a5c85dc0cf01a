"""What is measured while a run trains: validation loss and zeros by source, samples, and the suite at checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from sparsify.methods.calibrated_checkpoint import read_record
from sparsify.methods.live_model import Engine, evaluating
from sparsify.mixture.sequences.reader import NO_LOSS, PackedSequence, collate
from sparsify.recipe.evaluation import EvalSection
from sparsify.sparsity.probe import SparsityProbe
from sparsify.sparsity.statistics import ActivationStatistics
from sparsify.training.kernels.activation import fuse_activation
from sparsify.training.session import Session
from sparsify.training.suite_results import suite_is_due
from sparsify.training.telemetry import Validation


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
        logits = engine(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        totals[0] += sequence_losses(logits, batch["labels"]).double().sum()
        totals[1] += (batch["labels"] != NO_LOSS).sum()
    dist.all_reduce(totals)
    return float(totals[0] / totals[1].clamp(min=1))


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
    model, activation = session.engine.module, session.recipe.activation.ffn_activation
    base = model.config.base_ffn_activation
    calibration = read_record(session.run.initial)
    if calibration is not None:
        # The weights are no longer the base's, which was measured on the same sequences while it was calibrated.
        _record_base(session, calibration["stages"][0])
        _validate(session, "after_replacement")
    elif session.recipe.model.init == "pretrained" and activation != base:
        model.set_ffn_activation(base, model.config.base_ffn_gate_threshold)
        _validate(session, "base")
        model.set_ffn_activation(activation, session.recipe.activation.model_gate_threshold)
        fuse_activation(model, session.recipe)
        _validate(session, "after_replacement")
    else:
        _validate(session, "base")


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


def _validate(session: Session, label: str, **fields: Any) -> None:
    size, state = session.recipe.training.micro_batch_size, session.state
    result = validate(session.engine, session.held_out, session.shares, size)
    session.telemetry.validation(state.step, state.seen_tokens, result, label, **fields)


def _record_base(session: Session, stage: Mapping[str, Any]) -> None:
    """Records the validation losses of the dense base that a calibration measured: `losses` by source, and `zeros`."""
    losses: dict[str, float] = stage["losses"]
    weights = {source: session.shares.get(source, 0.0) for source in losses}
    loss = sum(weights[name] * value for name, value in losses.items()) / sum(weights.values())
    session.record(
        "validation",
        f"validation base: loss {loss:.3f}, measured during calibration",
        label="base",
        loss=loss,
        sources=losses,
        zeros=stage["zeros"],
        source_zeros={},
    )
