"""`sparsify paper`: trains dReLU and its SwiGLU baseline from the same start, and writes the paper's two tables of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import torch
from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict

from sparsify.commands.train import train
from sparsify.errors import RecipeError
from sparsify.evaluation.metrics import Difference, MetricValue, Score, difference, metric_value
from sparsify.evaluation.report import Rows, count_text, markdown
from sparsify.files import write_text
from sparsify.mixture.sequences.held_out import (
    check_text_or_mixture,
    mixture_sequences,
    sequences_from,
)
from sparsify.mixture.sequences.reader import NO_LOSS, PackedSequence, collate
from sparsify.recipe.catalogue import folder
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.recipe import Recipe
from sparsify.reporting.numbers import percent
from sparsify.runs.history import read_lines
from sparsify.runs.load import load
from sparsify.runs.run_folder import RunFolder
from sparsify.sparsity.curves import SHARES, top_k_editor
from sparsify.sparsity.measure import summed_loss
from sparsify.sparsity.probe import SparsityProbe

logger = logging.getLogger(__name__)

TABLES_FILE, DATA_FILE = "tables.md", "tables.json"
TRAIN_LOSS_SHARE = 0.1
"""The training loss is the mean over this last part of the steps: a single step's is mostly its batch."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class TopKPoint(_Section):
    """One column of table 3."""

    left_out: float
    """Share of every token's neurons that are set to 0, those of smallest |h|."""
    perplexity: MetricValue


class Variant(_Section):
    """One of the two models."""

    ffn_activation: str
    parameters: int
    train_loss: float
    zeros: float
    curve: list[TopKPoint]


class PaperTables(_Section):
    """Both variants on the same text."""

    recipe: str
    training_tokens: int
    text: str
    text_tokens: int
    variants: list[Variant]
    difference: Difference
    """Of the first variant to the second with nothing left out, sequence by sequence, nats per token."""


def paper_tables(
    recipe: str, overrides: Sequence[str], on: str | None, num_tokens: int
) -> tuple[list[Rows], PaperTables, Path]:
    """Trains what is not trained yet, measures both variants, and writes the tables into the run's folder `paper/`.

    Args:
        recipe: A recipe whose run has a baseline.
        overrides: Hydra overrides.
        on: Text or mixture to measure perplexity on; the held-out sequences of the recipe's mixture unless given.
        num_tokens: Tokens of it.

    Raises:
        RecipeError: If the recipe trains no baseline.
        MixtureError: If the text cannot be read.
    """
    composed = compose_recipe(recipe, overrides)
    if composed.baseline.ffn_activation is None:
        raise RecipeError(
            f"{recipe} trains no baseline: there is nothing to compare.",
            allowed="A recipe with baseline.ffn_activation=swiglu and another activation of its own.",
            next_step="sparsify paper paper/from_scratch_2m",
        )
    if on is not None:
        check_text_or_mixture(on)
    train(recipe, overrides)
    run = RunFolder(Path(composed.run_dir))
    sequences, text = _sequences(composed, run, on, num_tokens)
    variants, scores = [], []
    for folder_of_variant in (run, run.baseline):
        variant, of_sequences = _measure(folder_of_variant, sequences)
        variants.append(variant)
        scores.append(of_sequences)
    paired = difference("perplexity", *scores)
    assert paired is not None
    tables = PaperTables(
        recipe=composed.name,
        training_tokens=composed.num_steps * composed.step_tokens,
        text=text,
        text_tokens=sum(len(sequence.input_ids) for sequence in sequences),
        variants=variants,
        difference=paired,
    )
    rows = [_comparison_rows(tables), _curve_rows(tables)]
    to = run.path / "paper"
    write_text(to / DATA_FILE, tables.model_dump_json(indent=2) + "\n")
    write_text(to / TABLES_FILE, "\n".join(map(markdown, rows)))
    return rows, tables, to


def _sequences(
    recipe: Recipe, run: RunFolder, on: str | None, num_tokens: int
) -> tuple[list[PackedSequence], str]:
    tokenizer = load(str(run.path)).tokenizer
    cache_dir, sequence_length = (
        Path(recipe.cache_dir).expanduser(),
        recipe.training.sequence_length,
    )
    if on is not None:
        return sequences_from(
            on,
            tokenizer,
            num_tokens=num_tokens,
            sequence_length=sequence_length,
            cache_dir=cache_dir,
        )
    sequences = mixture_sequences(
        recipe.mixture,
        tokenizer,
        num_tokens=num_tokens,
        sequence_length=sequence_length,
        cache_dir=cache_dir,
    )
    return sequences, f"held-out sequences of mixture {recipe.mixture.name}"


@torch.no_grad()
def _measure(
    run: RunFolder, sequences: Sequence[PackedSequence]
) -> tuple[Variant, dict[str, Score]]:
    loaded = load(str(run.path))
    model = loaded.model
    if torch.cuda.is_available():
        torch.nn.Module.to(model, "cuda")
    logger.info(f"Measuring {run.path}: {len(SHARES)} passes over {len(sequences)} sequences")
    curve, first, zeros = [], None, 0.0
    for share in SHARES:
        editor = top_k_editor(share) if share else None
        with SparsityProbe(model, editor=editor) as probe:
            scores = _scores(
                lambda batch: float(summed_loss(model, batch)), sequences, model.device
            )
        curve.append(
            TopKPoint(left_out=share, perplexity=metric_value("perplexity", list(scores.values())))
        )
        if first is None:
            first, zeros = scores, probe.statistics().zero_share("product")
    assert first is not None
    return Variant(
        ffn_activation=model.config.ffn_activation,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_loss=_train_loss(run),
        zeros=zeros,
        curve=curve,
    ), first


def _scores(
    loss: Callable[[dict[str, torch.Tensor]], float],
    sequences: Sequence[PackedSequence],
    device: torch.device,
) -> dict[str, Score]:
    scores = {}
    for number, sequence in enumerate(sequences):
        labels = int((sequence.labels != NO_LOSS).sum())
        if labels:
            batch = {key: value.to(device) for key, value in collate([sequence]).items()}
            scores[str(number)] = Score(loss(batch), float(labels))
    return scores


def _train_loss(run: RunFolder) -> float:
    losses = [line["loss"] for line in read_lines(run.metrics) if line.get("kind") == "train"]
    return fmean(losses[-max(1, round(TRAIN_LOSS_SHARE * len(losses))) :])


def _published() -> dict:
    path = folder("eval") / "published" / "from_scratch.yaml"
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    return values


def _comparison_rows(tables: PaperTables) -> Rows:
    paper = _published()
    sparse, dense = tables.variants
    header = ["", "parameters", "training tokens", "training loss", "perplexity", "exact zeros"]
    rows = [
        [
            f"{variant.ffn_activation}, ours",
            count_text(variant.parameters),
            f"{tables.training_tokens:,}",
            f"{variant.train_loss:.3f}",
            _perplexity(variant.curve[0].perplexity),
            percent(variant.zeros),
        ]
        for variant in tables.variants
    ]
    rows += [
        [
            f"{activation}, published",
            "300M",
            "5,000,000,000",
            f"{paper['train_loss'][activation]:.3f}",
            f"{paper['perplexity'][activation]:.2f}",
            "–",
        ]
        for activation in ("drelu", "swiglu")
    ]
    paired = tables.difference
    said = "lies within noise" if paired.within_noise else "is beyond the noise of the text"
    notes = [
        f"Perplexity on {tables.text_tokens:,} tokens: {tables.text}. {sparse.ffn_activation} minus {dense.ffn_activation}, paired "
        f"over sequences: {paired.value:+.4f} [{paired.low:+.4f}, {paired.high:+.4f}] nats per token, which {said}. One training "
        "seed a variant: what another seed would change is not known from it.",
        f"Published: {paper['source']}, WikiText-2, not measured here. {paper['caveat']} Rows of different models, text and "
        "tokens a parameter: compare the two variants of one, not one with the other.",
    ]
    return Rows("Appendix A: dReLU and SwiGLU from random weights", header, rows, notes)


def _curve_rows(tables: PaperTables) -> Rows:
    paper = _published()["top_k"]
    header = ["left out", *(percent(share) for share in SHARES)]
    rows = []
    for variant in tables.variants:
        values = [point.perplexity.value for point in variant.curve]
        rows.append([f"{variant.ffn_activation}, ours", *(f"{value:.2f}" for value in values)])
        rows.append(
            [
                f"{variant.ffn_activation}, ours, rise",
                *(f"{value / values[0] - 1:+.1%}" for value in values),
            ]
        )
    for activation, values in paper.items():
        first = values[0.0]
        rows.append([f"{activation}, published", *(f"{values[share]:.2f}" for share in SHARES)])
        rows.append(
            [
                f"{activation}, published, rise",
                *(f"{values[share] / first - 1:+.1%}" for share in SHARES),
            ]
        )
    notes = ["Perplexity when each token keeps only its neurons of largest |h|, the rest set to 0."]
    return Rows("Table 3: what is left when small activations are left out", header, rows, notes)


def _perplexity(value: MetricValue) -> str:
    if value.low is None or value.high is None:
        return f"{value.value:.2f}"
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"
