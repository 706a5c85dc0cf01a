"""`sparsify report`: measures a model or a run on held-out text."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import RunError
from sparsify.evaluation.metrics import Score, difference
from sparsify.metadata import user_path
from sparsify.methods.blending import Blending, blended_share
from sparsify.mixture.sequences.held_out import (
    check_text_or_mixture,
    mixture_sequences,
    sequences_from,
)
from sparsify.mixture.sequences.reader import PackedSequence, collate
from sparsify.recipe.recipe import CACHE_DIR
from sparsify.runs.history import stages, trajectory
from sparsify.runs.load import Loaded, load
from sparsify.runs.state import read_state
from sparsify.sparsity.curves import measure_curves
from sparsify.sparsity.measure import as_against, summed_loss
from sparsify.sparsity.report import SparsityReport, measure, write_report
from sparsify.sparsity.scaling import fit_trajectory
from sparsify.sparsity.schema import PairedDifference
from sparsify.sparsity.statistics import ActivationStatistics

logger = logging.getLogger(__name__)


def make_report(
    model_or_run: str,
    on: str | None,
    num_tokens: int,
    to: Path | None,
    *,
    curve_tokens: int = 0,
    against: str | None = None,
) -> tuple[SparsityReport, Path]:
    """Measures a model or a run, and another one on the same sequences if `against` names it, and writes its report.
    Without `on`: the run's own mixture, or the quickstart's. Raises RunError if a number of tokens is out of range, or
    the other model has another tokenizer.
    """
    _check_tokens(num_tokens, curve_tokens)
    if on is not None:
        check_text_or_mixture(on)
    loaded = load(model_or_run)
    other = load(against) if against is not None else None
    if other is not None and other.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise RunError(
            f"{against} has another tokenizer than {model_or_run}: their losses are not per the same tokens.",
            next_step="Compare models of one tokenizer, or make two reports.",
        )
    sequences, text = held_out_sequences(loaded, on, num_tokens)
    text += blend_note(loaded)
    logger.info(f"Measuring {loaded.name} on {sum(len(w.input_ids) for w in sequences):,} tokens: {text}")
    report, statistics, scores = _measure(loaded, sequences, text, curve_tokens)
    if other is not None:
        logger.info(f"Measuring {other.name} on the same tokens")
        theirs, _, their_scores = _measure(other, sequences, text, curve_tokens)
        report.against = as_against(theirs)
        report.against.difference = paired_difference(scores, their_scores)
    report.command = " ".join(["sparsify", *sys.argv[1:]])
    if loaded.trained is not None:
        report.stages = stages(loaded.trained.run)
        report.trajectory = trajectory(loaded.trained.run)
        report.scaling = fit_trajectory(report.trajectory, report.ffn_activation)
    name = re.sub("[^-.0-9A-Za-z_]+", "-", model_or_run).strip("-.")
    default = loaded.trained.run.report if loaded.trained else Path("reports") / name
    folder = to or default
    write_report(report, statistics, folder)
    return report, folder


def _measure(
    loaded: Loaded, sequences: list[PackedSequence], text: str, curve_tokens: int
) -> tuple[SparsityReport, ActivationStatistics, list[Score]]:
    scores: list[Score] = []
    report, statistics = measure(
        loaded.model,
        (collate([sequence]) for sequence in sequences),
        name=loaded.name,
        text=text,
        sources=[sequence.source for sequence in sequences],
        on_batch=lambda loss, num_labels: scores.append(Score(loss, num_labels)),
    )
    if curve_tokens:
        chosen = spread(sequences, curve_tokens)
        curve_sequences = sum(len(sequence.input_ids) for sequence in chosen)
        logger.info(f"Curves on {curve_sequences:,} of them, about 35 passes; --curve-tokens 0 skips them")
        batches = (collate([sequence]) for sequence in chosen)
        report.curves = measure_curves(loaded.model, batches, summed_loss)
    return report, statistics, scores


def paired_difference(ours: Sequence[Score], theirs: Sequence[Score]) -> PairedDifference | None:
    """Of two models on the same sequences, those without labels aside; None if there are no others."""
    first, second = (
        {str(number): score for number, score in enumerate(scores) if score.weight} for scores in (ours, theirs)
    )
    paired = difference("perplexity", first, second)
    if paired is None:
        return None
    return PairedDifference(value=paired.value, low=paired.low, high=paired.high, num_sequences=paired.items)


def blend_note(loaded: Loaded) -> str:
    """A note on a checkpoint that was saved during the blending of its activation; empty for others."""
    if loaded.trained is None:
        return ""
    recipe = loaded.trained.run.load_recipe()
    state = read_state(loaded.trained.checkpoint)
    refits = state.methods.get(Blending.name, {}).get("refits", 0)
    share = blended_share(recipe, state.seen_tokens, refits)
    if share == 1:
        return ""
    activation = recipe.activation.ffn_activation
    return f" (saved {share:.0%} of the way to {activation}, measured with {activation} itself)"


def _check_tokens(num_tokens: int, curve_tokens: int) -> None:
    if num_tokens < 1 or curve_tokens < 0:
        raise RunError(
            f"Invalid --tokens {num_tokens} or --curve-tokens {curve_tokens}.",
            allowed="--tokens 1 or more, --curve-tokens 0 or more.",
        )


def spread(sequences: list[PackedSequence], num_tokens: int) -> list[PackedSequence]:
    """Evenly spaced sequences of about that many tokens in total, so that every part of the text is represented."""
    total = sum(len(sequence.input_ids) for sequence in sequences)
    wanted = min(len(sequences), max(1, round(len(sequences) * num_tokens / max(total, 1))))
    chosen = [sequences[index * len(sequences) // wanted] for index in range(wanted)]
    return chosen if any((sequence.labels >= 0).any() for sequence in chosen) else sequences


def held_out_sequences(
    loaded: Loaded, on: str | None, num_tokens: int, sequence_length: int | None = None
) -> tuple[list[PackedSequence], str]:
    """Sequences to measure a model or a run on, about `num_tokens` or fewer if there are fewer, and a phrase that says
    what they are.
    """
    recipe = loaded.trained.run.load_recipe() if loaded.trained else None
    if sequence_length is None:
        sequence_length = min(512, loaded.model.config.max_position_embeddings)
        if recipe is not None:
            sequence_length = recipe.training.sequence_length
    settings: dict[str, Any] = {
        "num_tokens": num_tokens,
        "sequence_length": sequence_length,
        "cache_dir": user_path(recipe.cache_dir if recipe else CACHE_DIR),
    }
    if on is None and recipe is not None:
        sequences = mixture_sequences(recipe.mixture, loaded.tokenizer, **settings)
        return sequences, f"held-out sequences of mixture {recipe.mixture.name}"
    return sequences_from(on or "quickstart", loaded.tokenizer, **settings)
