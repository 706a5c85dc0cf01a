"""`sparsify predictors`: trains predictors on held-out text, and evaluates them on other held-out text."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsify.commands.report import held_out_sequences
from sparsify.errors import RunError, check_choice
from sparsify.files import refuse_foreign_folder
from sparsify.mixture.sequences.held_out import check_text_or_mixture
from sparsify.mixture.sequences.reader import PackedSequence, collate
from sparsify.predictors.format import (
    FACTS_FILE,
    INPUTS,
    Predictors,
    read_predictors,
    write_predictors,
)
from sparsify.predictors.quality import evaluate_predictors
from sparsify.predictors.report import write_evaluation
from sparsify.predictors.schema import PredictorEvaluation
from sparsify.predictors.train import Settings, train_predictors
from sparsify.runs.load import Loaded, load

logger = logging.getLogger(__name__)

SPLIT = 8
"""Of every eight sequences of a source, one is kept for the choice of ranks and one for evaluation; six are trained on."""
VALIDATED, EVALUATED = 3, 7


def train(
    model_or_run: str,
    on: str | None,
    num_tokens: int,
    to: Path | None,
    settings: Settings,
    on_progress: Callable[[str], None],
) -> tuple[Predictors, Path]:
    """Trains the predictors of a model or a run and writes them.

    Args:
        model_or_run: Model folder, Hub id, run folder or checkpoint.
        on: Text file, mixture name or mixture path; default: the run's own mixture, or the quickstart's.
        num_tokens: Held-out tokens to use, including those kept for evaluation.
        to: Output folder; default: RUN/predictors or predictors/NAME.
        settings: Training settings.
        on_progress: Called often with a line of progress.

    Raises:
        RunError: If a setting is out of range, or the text is too short.
    """
    _check(settings, num_tokens, on)
    loaded = load(model_or_run)
    folder = to or _default_folder(loaded)
    refuse_foreign_folder(folder, FACTS_FILE, "folder of predictors")
    sequences, text = held_out_sequences(loaded, on, num_tokens)
    trained = _part(sequences, lambda place: place not in (VALIDATED, EVALUATED))
    validation = _part(sequences, lambda place: place == VALIDATED)
    logger.info(f"Training predictors of {loaded.name} on {_count(trained):,} tokens: {text}")

    def on_step(step: int, num_steps: int, recall: float) -> None:
        on_progress(f"step {step:,} of {num_steps:,}, recall {recall:.1%}")

    state = folder.with_name(f".{folder.name}.training.safetensors")
    predictors = train_predictors(
        loaded.model,
        [collate([sequence]) for sequence in trained],
        [collate([sequence]) for sequence in validation],
        settings,
        text=text,
        state_path=state,
        on_step=on_step,
    )
    predictors.facts.command = " ".join(["sparsify", *sys.argv[1:]])
    write_predictors(predictors, folder)
    state.unlink(missing_ok=True)
    return predictors, folder


def evaluate(
    model_or_run: str,
    predictors_folder: Path | None,
    on: str | None,
    num_tokens: int,
    max_loss_rise: float,
    thresholds: Sequence[float],
    on_progress: Callable[[str], None],
) -> tuple[PredictorEvaluation, Path]:
    """Evaluates predictors, writes the evaluation next to their folder, and sets their threshold to the chosen one.

    Args:
        model_or_run: The model that they were trained for.
        predictors_folder: Folder of the predictors; default: where `train` writes them.
        on: Text as in `train`. Only sequences that training does not use are evaluated.
        num_tokens: Approximate number of tokens to evaluate on.
        max_loss_rise: Limit on the rise of the loss, nats per token.
        thresholds: Thresholds to try; by default chosen by recall.
        on_progress: Called often with a line of progress.

    Raises:
        RunError: If a number is out of range, or the text is too short.
    """
    if num_tokens < 1 or max_loss_rise < 0:
        raise RunError(
            f"Predictors cannot be evaluated on {num_tokens} tokens with a limit of {max_loss_rise} nats.",
            allowed="--tokens 1 or more, --max-loss-rise 0 or more.",
        )
    if on is not None:
        check_text_or_mixture(on)
    loaded = load(model_or_run)
    folder = predictors_folder or _default_folder(loaded)
    predictors = read_predictors(folder)
    predictors.check_model(loaded.model, str(folder))
    sequences, text = held_out_sequences(loaded, on, num_tokens * SPLIT, predictors.facts.sequence_length)
    evaluated = _part(sequences, lambda place: place == EVALUATED)
    logger.info(f"Evaluating {folder} on {_count(evaluated):,} tokens that it was not trained on: {text}")
    evaluation = evaluate_predictors(
        loaded.model,
        predictors,
        [collate([sequence]) for sequence in evaluated],
        name=loaded.name,
        folder=str(folder),
        text=text,
        max_loss_rise=max_loss_rise,
        thresholds=thresholds,
        on_progress=lambda done, of: on_progress(f"pass {done} of {of}"),
    )
    evaluation.command = " ".join(["sparsify", *sys.argv[1:]])
    page = _evaluation_folder(folder)
    write_evaluation(evaluation, page)
    if evaluation.chosen is not None:
        predictors.facts.threshold = evaluation.chosen
        predictors.facts.threshold_reason = evaluation.verdict
        write_predictors(predictors, folder)
    return evaluation, page


def refuse_useless(evaluation: PredictorEvaluation) -> None:
    """Refuses predictors without a usable threshold.

    Raises:
        RunError: If no threshold could be chosen, with the reason.
    """
    if evaluation.chosen is None:
        raise RunError(
            evaluation.verdict,
            allowed="A threshold with a rise of the loss of at most "
            f"{evaluation.max_loss_rise} nats that reads less than an exact kernel.",
            next_step="Train longer or with more text (--tokens, --passes), with another --recall or --rank; "
            "or raise --max-loss-rise. The predictors keep the threshold that they had.",
        )


def _evaluation_folder(folder: Path) -> Path:
    # Next to the predictors, not inside: their folder is replaced as a whole.
    return folder.with_name(f"{folder.name}-evaluated")


def _default_folder(loaded: Loaded) -> Path:
    if loaded.trained is not None:
        return loaded.trained.run.path / "predictors"
    name = re.sub("[^-.0-9A-Za-z_]+", "-", loaded.name).strip("-.")
    return Path("predictors") / name


def _check(settings: Settings, num_tokens: int, on: str | None) -> None:
    check_choice("--input", settings.input, INPUTS)
    if on is not None:
        check_text_or_mixture(on)
    allowed = {
        "--tokens": (num_tokens, num_tokens >= 1, "1 or more"),
        "--recall": (settings.wanted_recall, 0 < settings.wanted_recall < 1, "between 0 and 1"),
        "--budget-share": (settings.budget_share, settings.budget_share > 0, "above 0"),
        "--passes": (settings.passes, settings.passes >= 1, "1 or more"),
        "--learning-rate": (settings.learning_rate, settings.learning_rate > 0, "above 0"),
        "--rank": (list(settings.ranks), all(rank >= 1 for rank in settings.ranks), "1 or more"),
    }
    for option, (value, is_allowed, words) in allowed.items():
        if not is_allowed:
            raise RunError(f"{option} is {value}.", allowed=f"{option} {words}.")


def _part(sequences: Sequence[PackedSequence], wanted: Callable[[int], bool]) -> list[PackedSequence]:
    """Sequences of one part of the split, numbered within each source so that more text moves no sequence."""
    seen: Counter[str] = Counter()
    chosen = []
    for sequence in sequences:
        if wanted(seen[sequence.source] % SPLIT):
            chosen.append(sequence)
        seen[sequence.source] += 1
    if not chosen:
        raise RunError(
            f"{len(sequences)} sequences of {len(sequences[0].input_ids)} tokens are too few: of every {SPLIT} of a source, one is kept "
            "for the choice of ranks and one for evaluation.",
            next_step="Raise --tokens, or give a longer text with --on.",
        )
    return chosen


def _count(sequences: Sequence[PackedSequence]) -> int:
    return sum(len(sequence.input_ids) for sequence in sequences)
