"""Evaluations side by side as tables of text: what the terminal and the page both show."""

from __future__ import annotations

from sparsify.comparison.cells import TextTable
from sparsify.comparison.evaluation_notes import difference_text
from sparsify.comparison.evaluations import EvaluatedModel, EvaluationComparison
from sparsify.evaluation.published import published_scores
from sparsify.evaluation.table import count_text, score_text
from sparsify.sparsity.percent import percent

KINDS = {
    "itself without predictors": "the same without predictors",
    "its dense control": "dense control",
    "another model": "no control",
}
SIGNS = {"better": "▲", "worse": "▼", "within noise": "≈"}


def evaluation_title(comparison: EvaluationComparison) -> str:
    """Suite and models."""
    return f"{comparison.suite}: {' · '.join(model.name for model in comparison.models)}"


def evaluation_tables(comparison: EvaluationComparison) -> list[TextTable]:
    """The models, their scores, and their differences."""
    tables = [_models(comparison), _scores(comparison)]
    if any(model.differences for model in comparison.models):
        tables.append(_differences(comparison))
    if any(model.samples for model in comparison.models):
        tables.append(_samples(comparison))
    return tables


def _models(comparison: EvaluationComparison) -> TextTable:
    header = ["model", "activation", "training tokens", "mean of accuracies", "zeros", "active", "gate first", "set against"]  # fmt: skip
    rows = [
        [
            model.name,
            model.ffn_activation + (", predictors" if model.predictors else ""),
            "–" if model.training_tokens is None else f"{model.training_tokens:,}",
            "–" if model.average is None else score_text(model.average),
            percent(model.zeros),
            count_text(model.active_parameters),
            "–" if model.predictors else count_text(model.gate_first_parameters),
            _against(model),
        ]
        for model in comparison.models
    ]
    return TextTable("Models", header, rows)


def _against(model: EvaluatedModel) -> str:
    if model.against is None:
        return "–"
    return f"{model.against} ({KINDS[model.against_kind]})"


def _scores(comparison: EvaluationComparison) -> TextTable:
    found = published_scores(comparison.suite)
    models = found[1] if found else {}
    header = ["task", *(model.name for model in comparison.models)]
    header += [f"{model} (published)" for model in models]
    rows = []
    for task in comparison.tasks:
        row = [task]
        for model in comparison.models:
            row.append(score_text(model.tasks[task].score) if task in model.tasks else "–")
        for scores in models.values():
            row.append(f"{100 * scores[task]:.1f}" if task in scores else "–")
        rows.append(row)
    return TextTable("Scores with 95% intervals", header, rows)


def _samples(comparison: EvaluationComparison) -> TextTable:
    prompts = dict.fromkeys(one.prompt for model in comparison.models for one in model.samples)
    written = [{one.prompt: one.text for one in model.samples} for model in comparison.models]
    rows = [
        [" ".join(prompt.split()), model.name, " ".join(texts[prompt].split())]
        for prompt in prompts
        for model, texts in zip(comparison.models, written, strict=True)
        if prompt in texts
    ]
    return TextTable("How each goes on", ["prompt", "model", "continuation"], rows)


def _differences(comparison: EvaluationComparison) -> TextTable:
    models = [model for model in comparison.models if model.differences]
    header = ["task"]
    for model in models:
        header += [f"{model.name} − {model.against}", "items in its instructions"]
    rows = []
    for task in comparison.tasks:
        row = [task]
        for model in models:
            one = model.differences.get(task)
            if one is None:
                row += ["–", "–"]
                continue
            row.append(f"{difference_text(one)} {SIGNS[one.verdict]}")
            row.append(f"{one.overlapping_items:,}" if one.overlaps else "–")
        rows.append(row)
    title = "Paired differences with 95% intervals: accuracies in points, perplexities in nats (lower is better)"
    return TextTable(title, header, rows)
