"""`sparsify predictors`: trains predictors on held-out text, and judges them on other held-out text."""

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
from sparsify.predictors.judge import judge_predictors
from sparsify.predictors.report import write_judgement
from sparsify.predictors.schema import Judgement
from sparsify.predictors.train import Settings, train_predictors
from sparsify.runs.load import Loaded, load

logger = logging.getLogger(__name__)

SPLIT = 8
"""Of every eight sequences of a source, one is kept for the choice of ranks and one for judging; six are trained on."""
VALIDATED, JUDGED = 3, 7


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
        on: Text file, mixture name or mixture path; a run's own mixture, else the quickstart's, unless given.
        num_tokens: Held-out tokens to use, those that are kept for judging among them.
        to: Folder to write; RUN/predictors or predictors/NAME unless given.
        settings: How to train.
        on_progress: Called with a line about how far it is, often.

    Raises:
        RunError: If a setting is out of range, or the text is too short.
    """
    _check(settings, num_tokens, on)
    loaded = load(model_or_run)
    folder = to or _default_folder(loaded)
    refuse_foreign_folder(folder, FACTS_FILE, "folder of predictors")
    sequences, text = held_out_sequences(loaded, on, num_tokens)
    trained = _part(sequences, lambda place: place not in (VALIDATED, JUDGED))
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


def judge(
    model_or_run: str,
    predictors_folder: Path | None,
    on: str | None,
    num_tokens: int,
    max_loss_rise: float,
    thresholds: Sequence[float],
    on_progress: Callable[[str], None],
) -> tuple[Judgement, Path]:
    """Judges predictors, writes the judgement into their folder, and gives them the threshold that was chosen.

    Args:
        model_or_run: The model that they were trained for.
        predictors_folder: Where they are; where `train` puts them unless given.
        on: Text as in `train`. Of each source only the sequences that training leaves out are used.
        num_tokens: Tokens to judge on, about.
        max_loss_rise: The limit, nats per token.
        thresholds: To try; chosen by recall unless given.
        on_progress: Called with a line about how far it is, often.

    Raises:
        RunError: If a number is out of range, or the text is too short.
    """
    if num_tokens < 1 or max_loss_rise < 0:
        raise RunError(
            f"Predictors cannot be judged on {num_tokens} tokens with a limit of {max_loss_rise} nats.",
            allowed="--tokens 1 or more, --max-loss-rise 0 or more.",
        )
    if on is not None:
        check_text_or_mixture(on)
    loaded = load(model_or_run)
    folder = predictors_folder or _default_folder(loaded)
    predictors = read_predictors(folder)
    predictors.check_model(loaded.model, str(folder))
    sequences, text = held_out_sequences(
        loaded, on, num_tokens * SPLIT, predictors.facts.sequence_length
    )
    judged = _part(sequences, lambda place: place == JUDGED)
    logger.info(f"Judging {folder} on {_count(judged):,} tokens that it was not trained on: {text}")
    judgement = judge_predictors(
        loaded.model,
        predictors,
        [collate([sequence]) for sequence in judged],
        name=loaded.name,
        folder=str(folder),
        text=text,
        max_loss_rise=max_loss_rise,
        thresholds=thresholds,
        on_progress=lambda done, of: on_progress(f"pass {done} of {of}"),
    )
    judgement.command = " ".join(["sparsify", *sys.argv[1:]])
    page = _judgement_folder(folder)
    write_judgement(judgement, page)
    if judgement.chosen is not None:
        predictors.facts.threshold = judgement.chosen
        predictors.facts.threshold_reason = judgement.verdict
        write_predictors(predictors, folder)
    return judgement, page


def refuse_useless(judgement: Judgement) -> None:
    """Ends with the reason where no threshold may be chosen.

    Raises:
        RunError: If there is none.
    """
    if judgement.chosen is None:
        raise RunError(
            judgement.verdict,
            allowed="A threshold with a rise of the loss of at most "
            f"{judgement.max_loss_rise} nats that reads less than an exact kernel.",
            next_step="Train longer or with more text (--tokens, --passes), with another --recall or --rank; "
            "or raise --max-loss-rise. The predictors keep the threshold that they had.",
        )


def _judgement_folder(folder: Path) -> Path:
    # Beside the predictors, not inside: their folder is replaced as a whole.
    return folder.with_name(f"{folder.name}-judged")


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


def _part(
    sequences: Sequence[PackedSequence], wanted: Callable[[int], bool]
) -> list[PackedSequence]:
    """Sequences of one part of the split. Places are counted within each source, so that more text moves no sequence."""
    seen: Counter[str] = Counter()
    chosen = []
    for sequence in sequences:
        if wanted(seen[sequence.source] % SPLIT):
            chosen.append(sequence)
        seen[sequence.source] += 1
    if not chosen:
        raise RunError(
            f"{len(sequences)} sequences of {len(sequences[0].input_ids)} tokens are too few: of every {SPLIT} of a source, one is kept "
            "for the choice of ranks and one for judging.",
            next_step="Raise --tokens, or give a longer text with --on.",
        )
    return chosen


def _count(sequences: Sequence[PackedSequence]) -> int:
    return sum(len(sequence.input_ids) for sequence in sequences)
