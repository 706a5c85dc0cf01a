"""Suites on real models: every shipped task runs on local copies, and its numbers are those of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sparsify.cli.main import main
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import EvaluationError
from sparsify.evaluation import evaluate as evaluation
from sparsify.evaluation.evaluate import EvalSettings, evaluate
from sparsify.evaluation.harness import CountingHFLM
from sparsify.evaluation.results import read_items, read_results
from sparsify.evaluation.subject import Subject
from sparsify.evaluation.suite import load_suite, suite_names
from sparsify.evaluation.tasks import build_tasks, task_names, task_sources

EVERY_TASK = "\n".join(
    f"  {name}: {{shots: {shots}, metric: {metric}}}"
    for name, shots, metric in [
        ("arc_challenge", 3, "acc_norm"),
        ("hellaswag", 2, "acc_norm"),
        ("mmlu", 2, "acc"),
        ("truthfulqa", 0, "acc"),
        ("winogrande", 2, "acc"),
        ("gsm8k", 2, "exact_match"),
        ("sciq", 0, "acc"),
        ("piqa", 0, "acc"),
        ("openbookqa", 0, "acc"),
        ("arc_easy", 0, "acc"),
        ("wikitext2", 0, "token_perplexity"),
        ("lambada", 0, "perplexity"),
        ("python_functions", 1, "acc"),
    ]
)


@pytest.fixture(scope="session")
def suite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "everything.yaml"
    path.write_text(f"name: everything\ntasks:\n{EVERY_TASK}\n")
    return path


@pytest.fixture(scope="session")
def subject(stock: dict[str, Path]) -> Subject:
    """The small Mistral with dReLU: it has zeros to count."""
    folder = stock["mistral"]
    return Subject(load_sparse(folder, "drelu"), load_tokenizer(folder), "small")


@pytest.fixture(scope="session")
def measured(subject: Subject, suite_file: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    suite = load_suite(str(suite_file))
    evaluate(subject, suite, task_sources(suite, data_dir), None, folder, EvalSettings(limit=6))
    return folder


@pytest.fixture(scope="session")
def standard_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def one_task(name: str, data_dir: Path, path: Path, **settings: Any) -> tuple[Any, list[Any]]:
    path.write_text(yaml.safe_dump({"name": "own", "tasks": {name: settings}}))
    suite = load_suite(str(path))
    return suite, task_sources(suite, data_dir)


def test_every_task_of_the_shipped_suites_gives_a_score_with_its_zeros(measured: Path) -> None:
    results = read_results(measured)
    rows = {task.name: task for task in results.tasks}
    shipped = {name for suite in suite_names() for name in load_suite(suite).tasks}
    assert shipped <= rows.keys() == set(task_names())
    for task in rows.values():
        assert task.tokens > 0, task.name
        assert 0.4 < (task.gate_zeros or 0) < (task.product_zeros or 0) < 1, task.name
        total = task.active_parameters.total
        assert task.active_parameters.perfect_predictor < task.active_parameters.gate_first < total
        items = read_items(measured, task.name)
        assert len(items) == task.score.items
        assert all(task.metric in scores for scores in items.values())
    assert rows["mmlu"].score.items == 10  # the limit is for each of its subjects
    assert rows["winogrande"].score.items == 6


def test_zeros_are_those_of_the_text_without_padding(subject: Subject, data_dir: Path, tmp_path: Path) -> None:
    """Requests of different lengths in one batch: with another batch size, other padding, the same counts."""
    suite, sources = one_task("arc_easy", data_dir, tmp_path / "own.yaml", shots=1)
    rows = [
        evaluate(subject, suite, sources, None, tmp_path / str(size), EvalSettings(batch_size=size)).tasks[0]
        for size in (1, 7)
    ]
    assert rows[0].tokens == rows[1].tokens
    assert rows[0].product_zeros == pytest.approx(rows[1].product_zeros, abs=1e-5)
    assert rows[0].score == rows[1].score


def test_an_accuracy_is_that_of_the_most_likely_answer(subject: Subject, measured: Path, data_dir: Path) -> None:
    suite = load_suite("commonsense")
    task = build_tasks(task_sources(suite, data_dir)[3])["arc_easy"]
    right = 0
    for item in list(task.eval_docs)[:6]:
        scores = []
        for choice in item["choices"]:
            prompt = f"Question: {item['question']}\nAnswer:"
            before = subject.tokenizer(prompt)["input_ids"]
            ids = torch.tensor([subject.tokenizer(f"{prompt} {choice}")["input_ids"]])
            with torch.no_grad():
                logs = subject.model(input_ids=ids).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[at - 1, ids[0, at]]) for at in range(len(before), ids.shape[1])))
        right += scores.index(max(scores)) == item["gold"]
    rows = {task.name: task for task in read_results(measured).tasks}
    assert rows["arc_easy"].score.value == pytest.approx(right / 6)


@pytest.mark.parametrize("name", ["arc_easy", "piqa", "openbookqa", "sciq", "lambada"])
def test_prompts_are_those_of_the_standard_task(name: str, data_dir: Path, tmp_path: Path, standard_tasks: Any) -> None:
    """The standard task's own file, on the same items in the Hub's columns."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    ours = build_tasks(one_task(name, data_dir, tmp_path / "own.yaml")[1][0])[name]
    rows = datasets.Dataset.from_list([HUB_ROWS[name](row) for row in ours.eval_docs])
    entry = standard_tasks.task_index["lambada_openai" if name == "lambada" else name]
    config = load_yaml(entry.yaml_path)
    for key in ("tag", "group"):
        config.pop(key, None)
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    standard = ConfigurableTask(config=config | {"custom_dataset": lambda **_: splits})
    requests = []
    for task in (ours, standard):
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=4, rank=0, world_size=1)
        requests.append([request.args for request in task.instances])
    assert requests[0] == requests[1]


def _labelled(row: dict[str, Any]) -> dict[str, Any]:
    labels = list("ABCD")
    return {"choices": {"label": labels, "text": row["choices"]}, "answerKey": labels[row["gold"]]}


HUB_ROWS = {
    "arc_easy": lambda row: {"question": row["question"]} | _labelled(row),
    "openbookqa": lambda row: {"question_stem": row["question"]} | _labelled(row),
    "piqa": lambda row: {
        "goal": row["question"],
        "sol1": row["choices"][0],
        "sol2": row["choices"][1],
        "label": row["gold"],
    },
    "sciq": dict,
    "lambada": dict,
}


def test_an_interrupted_evaluation_resumes(
    subject: Subject, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EvalSettings(batch_size=2)  # and with it chunks of 16 requests
    suite_file = tmp_path / "own.yaml"
    tasks = {name: {"shots": 0} for name in ("arc_easy", "piqa")}
    suite_file.write_text(yaml.safe_dump({"name": "own", "tasks": tasks}))
    suite = load_suite(str(suite_file))
    sources = task_sources(suite, data_dir)
    whole = evaluate(subject, suite, sources, None, tmp_path / "whole", settings)
    evaluated = 0

    def stop(task: str) -> Any:
        def at(done: int, _total: int) -> None:
            if task == "piqa" and done >= 16:
                raise KeyboardInterrupt

        return at

    with pytest.raises(KeyboardInterrupt):
        evaluate(subject, suite, sources, None, tmp_path / "cut", settings, on_progress=stop)
    original = CountingHFLM._loglikelihood_tokens

    def count(self: CountingHFLM, requests: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal evaluated
        evaluated += len(requests)
        return original(self, requests, *args, **kwargs)

    monkeypatch.setattr(CountingHFLM, "_loglikelihood_tokens", count)
    rest = evaluate(subject, suite, sources, None, tmp_path / "cut", settings)
    assert evaluated == 2 * 12 - 16
    for task, again in zip(whole.tasks, rest.tasks, strict=True):
        assert again.model_dump(exclude={"seconds"}) == task.model_dump(exclude={"seconds"})
    assert not list((tmp_path / "cut" / evaluation.JOURNAL_FOLDER).iterdir())


def test_the_quick_suite_needs_no_data_and_writes_samples(
    stock: dict[str, Path],
    tmp_path: Path,
    mixture_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the command, in a dtype other than the weights', on the held-out text of the user's mixture."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    options = ["--limit", "6", "--dtype", "bfloat16", "--on", str(mixture_file)]
    monkeypatch.setattr("sys.argv", ["sparsify", "evaluate", str(stock["llama"]), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None), capsys.readouterr().err
    (folder,) = (tmp_path / "evaluations").glob("*/quick,limit=6,bfloat16")
    results = read_results(folder)
    assert results.dtype == "bfloat16"
    rows = {task.name: task for task in results.tasks}
    held_out = {"held-out/code", "held-out/prose", "held-out/questions"}
    assert rows.keys() == {"python_functions"} | held_out
    # Random weights: a perplexity near the size of the vocabulary.
    assert all(500 < rows[name].score.value < 20_000 for name in held_out)
    assert [sample.prompt for sample in results.samples] == load_suite("quick").prompts
    assert results.samples[0].prompt.strip() in (folder / "results.md").read_text()


def test_other_weights_are_evaluated_again(
    subject: Subject, stock: dict[str, Path], data_dir: Path, tmp_path: Path
) -> None:
    suite, sources = one_task("piqa", data_dir, tmp_path / "own.yaml")
    first = evaluate(subject, suite, sources, None, tmp_path / "out", EvalSettings())
    dense = Subject(load_sparse(stock["mistral"]), subject.tokenizer, "dense")
    second = evaluate(dense, suite, sources, None, tmp_path / "out", EvalSettings())
    assert second.model_hash != first.model_hash
    assert (second.tasks[0].product_zeros or 0) < 0.01 < (first.tasks[0].product_zeros or 0)


def test_missing_data_is_reported_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["sparsify", "evaluate", "no/model", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    said = refused("--suite", "commonsense", "--data-dir", str(tmp_path))
    assert "piqa_test.jsonl.gz" in said
    assert "SPARSIFY_EVAL_DATA" in said
    (tmp_path / "piqa_test.jsonl.gz").touch()
    assert "--tasks piqa " in refused("--suite", "commonsense", "--data-dir", str(tmp_path))
    assert "Did you mean 'piqa'?" in refused("--suite", "commonsense", "--tasks", "pika")
    assert "Did you mean 'quick'?" in refused("--suite", "quik")
    assert "no folder" in refused("--suite", "commonsense", "--data-dir", str(tmp_path / "no"))
    assert "--on" in refused("--suite", "commonsense", "--on", "quickstart")
    own = tmp_path / "own.yaml"
    own.write_text("name: own\ntasks: {piqa: {shot: 1}}\n")
    assert "tasks.piqa.shot" in refused("--suite", str(own))
    own.write_text("name: own\ntasks: {pica: {}}\n")
    assert "Did you mean 'piqa'?" in refused("--suite", str(own), "--data-dir", str(tmp_path))


def test_a_damaged_copy_names_its_task(subject: Subject, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "piqa_test.jsonl.gz").write_bytes((data_dir / "piqa_test.jsonl.gz").read_bytes()[:60])
    _, sources = one_task("piqa", tmp_path, tmp_path / "own.yaml")
    with pytest.raises(EvaluationError, match="piqa"):
        build_tasks(sources[0])


def test_the_command_writes_table_card_and_published_rows(
    stock: dict[str, Path],
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    to = tmp_path / "out"
    arguments = [
        "--suite",
        "commonsense",
        "--data-dir",
        str(data_dir),
        "--limit",
        "3",
        "--to",
        str(to),
    ]
    monkeypatch.setattr("sys.argv", ["sparsify", "evaluate", str(stock["mistral"]), *arguments, "--json"])
    with pytest.raises(SystemExit):
        main()
    printed = json.loads(capsys.readouterr().out)
    assert [task["name"] for task in printed["tasks"]] == ["sciq", "piqa", "openbookqa", "arc_easy"]
    assert printed["versions"]["lm-eval"]
    table = (to / "results.md").read_text()
    assert "TurboSparse-Mistral-7B (published)" in table
    assert "96.4" in table
    card = yaml.safe_load((to / "model-index.yaml").read_text())
    measured = card["model-index"][0]["results"]
    assert {one["metrics"][0]["name"] for one in measured} == {"acc"}
