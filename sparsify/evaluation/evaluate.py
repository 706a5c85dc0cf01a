"""Measures a suite on a model in memory, task by task, and goes on where an earlier launch stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from sparsify.errors import EvaluationError
from sparsify.evaluation.heldout import PREFIX, HeldOut, fingerprint, measure_source
from sparsify.evaluation.lm_adapter import Asking, Progress
from sparsify.evaluation.model import Subject, counted_fields, model_hash
from sparsify.evaluation.overlap import write_texts
from sparsify.evaluation.results import (
    RESULTS_FILE,
    EvaluationResults,
    TaskResult,
    items_path,
    write_items,
)
from sparsify.evaluation.scores import Score, kind_of, mean_of, measured, scores_of
from sparsify.evaluation.suite import Suite
from sparsify.evaluation.tasks import FEWSHOT_SEED, TaskSource, build_tasks
from sparsify.evaluation.worker import Answering, Workers
from sparsify.files import write_json, write_text
from sparsify.mixture.cleaning.eval_items import strings

PACKAGES = ("sparsify-lm", "lm-eval", "transformers", "torch", "datasets")
JOURNAL_FOLDER = "journal"
TASKS_FOLDER = "tasks"

Items = dict[str, dict[str, Score]]


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    Attributes:
        limit: Items of each task; None for all.
        batch_size: Requests of one forward pass.
        processes: How many answer, each with a model of its own.
    """

    limit: int | None = None
    batch_size: int = 8
    processes: int = 1


def evaluate(
    subject: Subject,
    suite: Suite,
    sources: Sequence[TaskSource],
    held_out: HeldOut | None,
    folder: Path,
    settings: Settings,
    *,
    on_progress: Callable[[str], Progress] = lambda _: lambda _done, _all: None,
    answering: Answering | None = None,
) -> EvaluationResults:
    """Measures every task of a suite and writes results.json and the items' scores.

    Args:
        subject: The model, with predictors if they mask it. It is left in the mode that it was in.
        suite: The suite that `sources` are of.
        sources: Its tasks.
        held_out: Held-out sequences, by source; None for none.
        folder: Where results, items and journal go. What an earlier launch measured there of the same model, with the
            same suite and settings, is taken over.
        settings: How to measure.
        on_progress: Given a task's name, what is told of its requests: done, all.
        answering: Who answers, all with this model; None for `settings.processes` of their own.

    Raises:
        EvaluationError: If a task cannot be prepared, or a process is killed.
    """
    model, was_training = subject.model, subject.model.training
    masks = subject.masks
    identity = model_hash(model)
    keep = _Kept(folder, identity if masks is None else f"{identity} {masks.hash}")
    model.eval()
    done: list[TaskResult] = []
    try:
        predictors = subject.predictors[1] if subject.predictors else None
        with answering or Workers(
            model, subject.tokenizer, settings.batch_size, predictors, settings.processes
        ) as workers:
            for source in sources:
                measure = partial(_measure, workers, subject, source, keep, settings, on_progress)
                done.append(keep.or_measure(source.name, _facts(source, settings), measure))
            prompts = [(prompt, suite.prompt_tokens) for prompt in suite.prompts]
            written = list(workers.map("sample", prompts))
            done += _held_out(workers, subject, held_out, keep) if held_out is not None else []
    finally:
        model.train(was_training)
    results = EvaluationResults(
        model=subject.name,
        model_hash=identity,
        model_type=model.config.model_type,
        ffn_activation=model.config.ffn_activation,
        ffn_thresholds=model.config.ffn_thresholds,
        predictors=masks,
        dtype=str(model.dtype).removeprefix("torch."),
        context_tokens=model.config.max_position_embeddings,
        suite=suite.name,
        limit=settings.limit,
        batch_size=settings.batch_size,
        processes=settings.processes,
        device=workers.device,
        fewshot_seed=FEWSHOT_SEED,
        versions={package: version(package) for package in PACKAGES},
        provenance=subject.provenance,
        tasks=done,
        average=_average(done),
        samples=written,
        notes=_notes(done, settings),
    )
    write_text(folder / RESULTS_FILE, results.model_dump_json(indent=2) + "\n")
    return results


def _held_out(
    workers: Answering, subject: Subject, held_out: HeldOut, keep: _Kept
) -> list[TaskResult]:
    return [
        keep.or_measure(
            PREFIX + source,
            fingerprint(sequences),
            partial(measure_source, workers, subject, held_out.mixture, source, sequences),
        )
        for source, sequences in held_out.by_source().items()
    ]


class _Kept:
    """Tasks that are measured already, in one folder, each of one model, on one set of items, in one way."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity

    def journal(self, task: str) -> Path:
        return self.folder / JOURNAL_FOLDER / task

    def or_measure(
        self, task: str, facts: str, measure: Callable[[], tuple[TaskResult, Items]]
    ) -> TaskResult:
        """The kept result of a task that the same facts led to, or a new one, which is kept."""
        identity = f"{self.identity} {facts}"
        result = self._read(task, identity)
        if result is None:
            result, items = measure()
            write_items(self.folder, task, items)
            write_json(
                self._path(task), {"facts": identity, "result": result.model_dump(mode="json")}
            )
            for journal in (self.folder / JOURNAL_FOLDER).glob(f"{task}.*.jsonl"):
                journal.unlink()
        return result

    def _read(self, task: str, identity: str) -> TaskResult | None:
        try:
            kept = json.loads(self._path(task).read_text(encoding="utf-8"))
            same = kept["facts"] == identity and items_path(self.folder, task).is_file()
            return TaskResult.model_validate(kept["result"]) if same else None
        except (OSError, ValueError, KeyError, ValidationError):
            return None

    def _path(self, task: str) -> Path:
        return self.folder / TASKS_FOLDER / f"{task.replace('/', '.')}.json"


def _facts(source: TaskSource, settings: Settings) -> str:
    """What a task's numbers follow from, besides the model. Not the batch size: it only rounds."""
    files = {
        split: (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for split, path in source.files.items()
    }
    return (
        f"{source.settings!r} {settings.limit} {source.data} {files} lm-eval {version('lm-eval')}"
    )


def _measure(
    workers: Answering,
    subject: Subject,
    source: TaskSource,
    keep: _Kept,
    settings: Settings,
    on_progress: Callable[[str], Progress],
) -> tuple[TaskResult, Items]:
    from lm_eval.evaluator import evaluate as ask

    tasks = build_tasks(source)
    limits = [one for one in (settings.limit, source.settings.limit) if one is not None]
    journal = keep.journal(source.name)
    asked = Asking(workers, journal, keep.identity, on_progress(source.name))
    answered: Any = ask(
        lm=asked,
        task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
        limit=min(limits) if limits else None,
        bootstrap_iters=0,
        log_samples=True,
    )
    items = _items(answered["samples"], subject.tokenizer)
    write_texts(keep.folder, source.name, _texts(answered["samples"]))
    metrics = {
        metric: measured(kind_of(metric), [scores[metric] for scores in items.values()])
        for metric in dict.fromkeys(key for scores in items.values() for key in scores)
    }
    metric = _headline(source, metrics)
    return TaskResult(
        name=source.name,
        shots=source.settings.shots,
        data=source.data,
        version=str(next(iter(tasks.values())).VERSION),
        metric=metric,
        score=metrics[metric],
        metrics=metrics,
        truncated_requests=asked.truncated_requests,
        **counted_fields(subject, asked.counts),
    ), items


def _items(samples: dict[str, list[dict[str, Any]]], tokenizer: PreTrainedTokenizerFast) -> Items:
    """Scores of every item, under a name that is the same for every model that is asked the same."""
    items: Items = {}
    for task, answers in samples.items():
        several = len({answer["filter"] for answer in answers}) > 1
        seen: dict[tuple[str, str], int] = {}
        for answer in answers:
            asked_again = (answer["prompt_hash"] + answer["target_hash"], answer["filter"])
            repeat = seen[asked_again] = seen.get(asked_again, -1) + 1
            key = f"{task}:{answer['prompt_hash'][:16]}{answer['target_hash'][:8]}:{repeat}"
            scores = items.setdefault(key, {})
            for metric in answer["metrics"]:
                score = scores_of(metric, answer[metric])
                if score is not None:
                    scores[f"{metric},{answer['filter']}" if several else metric] = score
            if "word_perplexity" in answer["metrics"]:
                text = answer["arguments"][0][0]
                tokens = max(1, len(tokenizer(text)["input_ids"]))
                scores["token_perplexity"] = Score(scores["word_perplexity"].value, float(tokens))
    return items


def _texts(samples: dict[str, list[dict[str, Any]]]) -> list[str]:
    """All text of every item: question, choices, answer."""
    documents = {
        (task, answer["doc_id"]): answer["doc"]
        for task, answers in samples.items()
        for answer in answers
    }
    return ["\n".join(strings(document)) for document in documents.values()]


def _headline(source: TaskSource, metrics: dict[str, Any]) -> str:
    wanted = source.settings.metric
    for metric in metrics:
        if metric == wanted or metric.partition(",")[0] == wanted:
            return metric
    raise EvaluationError(
        f"Task {source.name} has no metric {wanted!r}.",
        allowed=f"Its metrics: {', '.join(metrics)}.",
    )


def _average(tasks: Sequence[TaskResult]) -> Any:
    scores = [task.score for task in tasks if task.score.kind == "mean"]
    return mean_of(scores) if len(scores) > 1 else None


def _notes(tasks: Sequence[TaskResult], settings: Settings) -> list[str]:
    notes = []
    if settings.limit is not None:
        notes.append(
            f"Only the first {settings.limit:,} items of each task: the intervals say what that leaves open."
        )
    for task in tasks:
        if task.truncated_requests:
            notes.append(
                f"{task.name}: {task.truncated_requests:,} requests were longer than the context and lost their beginning."
            )
    return notes
