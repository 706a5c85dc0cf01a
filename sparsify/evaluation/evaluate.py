"""Runs a suite on a model in memory, task by task, and resumes an interrupted evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from sparsify.conversion.weight_zeros import weight_sparsity
from sparsify.errors import EvaluationError
from sparsify.evaluation.held_out_perplexity import PREFIX, HeldOut, fingerprint, measure_source
from sparsify.evaluation.lm_adapter import JournaledLM, Progress
from sparsify.evaluation.metrics import Score, kind_of, mean_of, metric_value, scores_of
from sparsify.evaluation.overlap import write_texts
from sparsify.evaluation.results import (
    RESULTS_FILE,
    EvaluationResults,
    TaskResult,
    items_path,
    write_items,
)
from sparsify.evaluation.subject import Subject, counted_fields, model_hash
from sparsify.evaluation.suite import Suite
from sparsify.evaluation.tasks import FEWSHOT_SEED, TaskSource, build_tasks
from sparsify.evaluation.worker_pool import ProcessPool, WorkerPool
from sparsify.files import write_json, write_text
from sparsify.metadata import read_record
from sparsify.mixture.cleaning.eval_items import strings
from sparsify.models.integer_linear import quantisation

PACKAGES = ("sparsify-lm", "lm-eval", "transformers", "torch", "datasets")
JOURNAL_FOLDER = "journal"
TASKS_FOLDER = "tasks"

Items = dict[str, dict[str, Score]]


@dataclass(frozen=True)
class EvalSettings:
    limit: int | None = None
    batch_size: int = 8
    processes: int = 1


def evaluate(
    subject: Subject,
    suite: Suite,
    sources: Sequence[TaskSource],
    held_out: HeldOut | None,
    folder: Path,
    settings: EvalSettings,
    *,
    on_progress: Callable[[str], Progress] = lambda _: lambda _done, _all: None,
    pool: WorkerPool | None = None,
) -> EvaluationResults:
    """Runs every task of a suite and writes results.json and the score of each item; results that an earlier launch
    wrote for the same model, tasks and settings are reused. Raises EvaluationError if a task cannot be prepared, or a
    process is killed.
    """
    model, was_training = subject.model, subject.model.training
    masks = subject.masks
    identity = model_hash(model)
    finished = _FinishedTasks(folder, identity if masks is None else f"{identity} {masks.hash}")
    model.eval()
    done: list[TaskResult] = []
    try:
        predictors = subject.predictors[1] if subject.predictors else None
        with pool or ProcessPool(
            model, subject.tokenizer, settings.batch_size, predictors, settings.processes
        ) as workers:
            for source in sources:
                measure = partial(_measure, workers, subject, source, finished, settings, on_progress)
                done.append(finished.or_measure(source.name, _facts(source, settings), measure))
            prompts = [(prompt, suite.prompt_tokens) for prompt in suite.prompts]
            samples = list(workers.map("sample", prompts))
            done += _held_out(workers, subject, held_out, finished) if held_out is not None else []
    finally:
        model.train(was_training)
    sparse, integers = weight_sparsity(model.config), quantisation(model.config)
    results = EvaluationResults(
        model=subject.name,
        model_hash=identity,
        model_type=model.config.model_type,
        ffn_activation=model.config.ffn_activation,
        is_masked=bool(model.config.sparsification),
        weight_sparsity=None if sparse is None else sparse.sparsity,
        quantisation=None if integers is None else integers.words,
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
        samples=samples,
        notes=_notes(done, settings),
    )
    write_text(folder / RESULTS_FILE, results.model_dump_json(indent=2) + "\n")
    return results


def _held_out(workers: WorkerPool, subject: Subject, held_out: HeldOut, finished: _FinishedTasks) -> list[TaskResult]:
    return [
        finished.or_measure(
            PREFIX + source,
            fingerprint(sequences),
            partial(measure_source, workers, subject, held_out.mixture, source, sequences),
        )
        for source, sequences in held_out.by_source().items()
    ]


class _Finished(BaseModel):
    facts: str
    result: TaskResult


class _FinishedTasks:
    """Results of finished tasks in one folder, each valid for one model, one set of items and one set of settings."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity

    def journal(self, task: str) -> Path:
        return self.folder / JOURNAL_FOLDER / task

    def or_measure(self, task: str, facts: str, measure: Callable[[], tuple[TaskResult, Items]]) -> TaskResult:
        """Returns the stored result of a task if its facts are the same; otherwise measures and stores it."""
        identity = f"{self.identity} {facts}"
        result = self._read(task, identity)
        if result is None:
            result, items = measure()
            write_items(self.folder, task, items)
            write_json(self._path(task), {"facts": identity, "result": result.model_dump(mode="json")})
            for journal in (self.folder / JOURNAL_FOLDER).glob(f"{task}.*.jsonl"):
                journal.unlink()
        return result

    def _read(self, task: str, identity: str) -> TaskResult | None:
        try:
            kept = read_record(self._path(task), _Finished, "a task's result", EvaluationError)
        except EvaluationError:
            return None
        return kept.result if kept.facts == identity and items_path(self.folder, task).is_file() else None

    def _path(self, task: str) -> Path:
        return self.folder / TASKS_FOLDER / f"{task.replace('/', '.')}.json"


def _facts(source: TaskSource, settings: EvalSettings) -> str:
    """What a task's numbers depend on, apart from the model. Not the batch size, which only affects rounding."""
    files = {split: (str(path), path.stat().st_size, path.stat().st_mtime_ns) for split, path in source.files.items()}
    return f"{source.settings!r} {settings.limit} {source.data} {files} lm-eval {version('lm-eval')}"


def _measure(
    workers: WorkerPool,
    subject: Subject,
    source: TaskSource,
    finished: _FinishedTasks,
    settings: EvalSettings,
    on_progress: Callable[[str], Progress],
) -> tuple[TaskResult, Items]:
    from lm_eval.evaluator import evaluate as run_harness

    tasks = build_tasks(source)
    limits = [one for one in (settings.limit, source.settings.limit) if one is not None]
    journal = finished.journal(source.name)
    lm = JournaledLM(workers, journal, finished.identity, settings.batch_size, on_progress(source.name))
    output: Any = run_harness(
        lm=lm,
        task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
        limit=min(limits) if limits else None,
        bootstrap_iters=0,
        log_samples=True,
    )
    items = _items(output["samples"], subject.tokenizer)
    write_texts(finished.folder, source.name, _texts(output["samples"]))
    metrics = {
        metric: metric_value(kind_of(metric), [scores[metric] for scores in items.values()])
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
        truncated_requests=lm.truncated_requests,
        **counted_fields(subject, lm.counts),
    ), items


def _items(samples: dict[str, list[dict[str, Any]]], tokenizer: PreTrainedTokenizerFast) -> Items:
    """Scores of every item, under a key that depends on the item alone, so that models can be compared item by item."""
    items: Items = {}
    for task, records in samples.items():
        several = len({record["filter"] for record in records}) > 1
        seen: dict[tuple[str, str], int] = {}
        for record in records:
            # The same prompt may occur twice in a task: the second occurrence gets a number of its own.
            same = (record["prompt_hash"] + record["target_hash"], record["filter"])
            repeat = seen[same] = seen.get(same, -1) + 1
            key = f"{task}:{record['prompt_hash'][:16]}{record['target_hash'][:8]}:{repeat}"
            scores = items.setdefault(key, {})
            for metric in record["metrics"]:
                score = scores_of(metric, record[metric])
                if score is not None:
                    scores[f"{metric},{record['filter']}" if several else metric] = score
            if "word_perplexity" in record["metrics"]:
                text = record["arguments"][0][0]
                tokens = max(1, len(tokenizer(text)["input_ids"]))
                scores["token_perplexity"] = Score(scores["word_perplexity"].value, float(tokens))
    return items


def _texts(samples: dict[str, list[dict[str, Any]]]) -> list[str]:
    documents = {(task, record["doc_id"]): record["doc"] for task, records in samples.items() for record in records}
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


def _notes(tasks: Sequence[TaskResult], settings: EvalSettings) -> list[str]:
    notes = []
    if settings.limit is not None:
        notes.append(
            f"Only the first {settings.limit:,} items of each task were evaluated; the intervals account for that."
        )
    for task in tasks:
        if task.truncated_requests:
            notes.append(
                f"{task.name}: {task.truncated_requests:,} requests were longer than the context; their beginning was cut off."
            )
    return notes
