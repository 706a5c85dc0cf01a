"""`sparsify predictors`: trains predictors on held-out text, and evaluates them on other held-out text."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsify.commands.report import held_out_sequences, spread
from sparsify.errors import ExportError, RunError, check_choice
from sparsify.export.powerinfer.export import check_model
from sparsify.export.powerinfer.rules import FFN_TYPES, supported_context
from sparsify.files import refuse_foreign_folder
from sparsify.mixture.sequences.held_out import check_text_or_mixture
from sparsify.mixture.sequences.reader import PackedSequence, collate
from sparsify.predictors.engines import ENGINES, OWN, POWERINFER
from sparsify.predictors.format import (
    FACTS_FILE,
    INPUTS,
    EvaluationFacts,
    Predictors,
    read_predictors,
    write_predictors,
)
from sparsify.predictors.quality import evaluate_predictors
from sparsify.predictors.report import write_evaluation
from sparsify.predictors.schema import PredictorEvaluation
from sparsify.predictors.trainer import Settings, train_predictors
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
    """Trains the predictors of a model or a run and writes them; `num_tokens` includes those kept for evaluation.
    Without `on`: the run's own mixture, or the quickstart's. Raises RunError if a setting is out of range, or the text
    is too short.
    """
    _check(settings, num_tokens, on)
    loaded = load(model_or_run)
    folder = to or _default_folder(loaded)
    refuse_foreign_folder(folder, FACTS_FILE, "folder of predictors")
    if settings.input == "residual":
        _warn_of_powerinfer(loaded)
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


def _warn_of_powerinfer(loaded: Loaded) -> None:
    """Says before the training that an export for PowerInfer would refuse the model."""
    try:
        check_model(loaded, FFN_TYPES[0], supported_context(loaded.model.config))
    except ExportError as error:
        logger.warning(f"{error.given}\nThe predictors serve `sparsify generate` and `evaluate` only.")


def evaluate(
    model_or_run: str,
    predictors_folder: Path | None,
    on: str | None,
    num_tokens: int,
    max_loss_rise: float,
    thresholds: Sequence[float],
    engine: str,
    on_progress: Callable[[str], None],
) -> tuple[PredictorEvaluation, Path]:
    """Evaluates predictors for an engine on sequences that training did not use, writes the evaluation next to their folder,
    and its result into their facts, with the chosen threshold. Raises RunError if a number is out of range, or the text is
    too short; ExportError if the engine does not support the model.
    """
    check_choice("--engine", engine, tuple(ENGINES))
    if num_tokens < 1 or max_loss_rise < 0:
        raise RunError(
            f"Predictors cannot be evaluated on {num_tokens} tokens with a limit of {max_loss_rise} nats.",
            allowed="--tokens 1 or more, --max-loss-rise 0 or more.",
        )
    if on is not None:
        check_text_or_mixture(on)
    loaded = load(model_or_run)
    if engine == POWERINFER:
        check_model(loaded, FFN_TYPES[0], supported_context(loaded.model.config))
    folder = predictors_folder or _default_folder(loaded)
    predictors = read_predictors(folder)
    predictors.check_model(loaded.model, str(folder))
    if engine == POWERINFER and predictors.facts.input == "normed" and set(thresholds) - {0.0}:
        raise RunError(
            "--threshold: PowerInfer's input is the residual, for which predictors of the normed input are exact at 0 alone.",
            next_step="Omit --threshold, or train predictors with --input residual.",
        )
    sequences, text = held_out_sequences(loaded, on, num_tokens * SPLIT, predictors.facts.sequence_length)
    evaluated = spread(_part(sequences, lambda place: place == EVALUATED), num_tokens)
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
        engine=engine,
        on_progress=lambda done, of: on_progress(f"pass {done} of {of}"),
    )
    evaluation.command = " ".join(["sparsify", *sys.argv[1:]])
    page = _evaluation_folder(folder, engine)
    write_evaluation(evaluation, page)
    predictors.facts.evaluations[engine] = _facts(evaluation)
    if engine == OWN and evaluation.chosen is not None:
        predictors.facts.threshold = evaluation.chosen
        predictors.facts.threshold_reason = evaluation.verdict
    write_predictors(predictors, folder)
    return evaluation, page


def _facts(evaluation: PredictorEvaluation) -> EvaluationFacts:
    chosen = evaluation.chosen_point
    return EvaluationFacts(
        threshold=evaluation.chosen,
        verdict=evaluation.verdict,
        loss=evaluation.references[0].loss,
        loss_rise=None if chosen is None else chosen.loss_rise,
        dropped_thresholds=evaluation.dropped_thresholds,
        num_tokens=evaluation.num_tokens,
        text=evaluation.text,
    )


def refuse_useless(evaluation: PredictorEvaluation) -> None:
    """Raises RunError with the reason if no threshold could be chosen."""
    if evaluation.chosen is None:
        kept = "The predictors keep the threshold that they had."
        if evaluation.engine == POWERINFER:
            kept = "`sparsify export --format powerinfer` refuses these predictors."
        reads = "an exact kernel" if ENGINES[evaluation.engine].gate_first else "a dense one"
        raise RunError(
            evaluation.verdict,
            allowed=f"A threshold with a rise of the loss of at most {evaluation.max_loss_rise} nats that reads less than {reads}.",
            next_step="Train longer or with more text (--tokens, --passes), with another --recall or --rank; "
            f"or raise --max-loss-rise. {kept}",
        )


def _evaluation_folder(folder: Path, engine: str) -> Path:
    # Next to the predictors, not inside: their folder is replaced as a whole.
    return folder.with_name(f"{folder.name}-evaluated" + ("" if engine == OWN else f"-{engine}"))


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
