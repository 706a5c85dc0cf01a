"""A suite run during training scores what `sparsify evaluate` scores, and does not change the training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sparsify.commands.evaluate import evaluate_model
from sparsify.compare.evaluations import result_folders
from sparsify.errors import EvaluationError, RecipeError
from sparsify.evaluation.request import EvalRequest, suite_of
from sparsify.evaluation.results import EvaluationResults, read_items, read_results
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.recipe import Recipe
from sparsify.runs.run_folder import RunFolder
from sparsify.training.suite_results import has_line
from tests.conftest import Command, Setup
from tests.ranks import prepare_run, records, replace_model, run_ranks

pytestmark = pytest.mark.xdist_group("suite")

PROGRAM = Path(__file__).with_name("suite_program.py")
SETUP = Setup("mistral", 1, 2, "fp32")
SUITE = """name: own
tasks:
  arc_easy: {shots: 1}
  gsm8k: {shots: 1, metric: exact_match, limit: 12}
  wikitext2: {metric: token_perplexity}
held_out_sequences_per_source: 2
prompts: [Once, There]
prompt_tokens: 6
"""


class Trained(NamedTuple):
    """A run, and a hash of each rank's final state."""

    run: RunFolder
    hashes: list[str]


Train = Callable[[list[str]], dict[str, Trained]]


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "own.yaml"
    path.write_text(SUITE)
    return path


@pytest.fixture(scope="module")
def train(
    finished: Callable[[Setup], tuple[Path, dict]],
    stock: dict[str, Path],
    data_dir: Path,
    suite_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Train:
    """Trains cases one after another in the same two processes."""
    whole, _ = finished(Setup("mistral", 1, 1, "fp32"))

    def run_cases(cases: list[str]) -> dict[str, Trained]:
        root = tmp_path_factory.mktemp("in_training")
        for case in cases:
            change = partial(_change, case=case, suite=suite_file, data_dir=data_dir)
            run = prepare_run(whole, root / case, change)
            kind = case.split("-")[0]
            if kind != "mistral":
                replace_model(run, stock[kind])
        found = run_ranks(PROGRAM, [str(root / case) for case in cases])
        return {case: Trained(RunFolder(root / case), hashes) for case, hashes in zip(cases, found, strict=True)}

    return run_cases


def _change(recipe: Recipe, case: str, suite: Path, data_dir: Path) -> None:
    _, stage, how = case.split("-")
    recipe.engine.zero_stage = int(stage)
    recipe.training.precision = "fp32" if stage == "0" else "bf16"
    recipe.training.gradient_checkpointing = recipe.training.count_zeros = True
    recipe.checkpoint.every_tokens = 4 * recipe.step_tokens
    recipe.checkpoint.keep_every_tokens = None
    recipe.checkpoint.keep_last = 4
    recipe.eval.sample_prompts = []
    if how != "without":
        recipe.eval.suite, recipe.eval.suite_data_dir = str(suite), str(data_dir)
        recipe.eval.suite_batch_size = 2  # several chunks for two ranks
        if stage == "3":
            recipe.eval.suite_every_tokens = 8 * recipe.step_tokens


@pytest.fixture(scope="module")
def trained(train: Train) -> dict[str, Trained]:
    return train(["mistral-1-without", "mistral-1-with", "mistral-1-cut", "mistral-3-with"])


def request_of(run: RunFolder, **changed: Any) -> EvalRequest:
    settings = EvalRequest.from_recipe(run.load_recipe().eval)
    return EvalRequest(**{**vars(settings), **changed})


def check_same(one: EvaluationResults, other: EvaluationResults) -> None:
    """Scores, intervals, zeros, tokens, continuations and provenance, to the bit."""
    excluded = {"processes": True, "command": True, "tasks": {"__all__": {"seconds"}}}
    assert one.model_dump(exclude=excluded) == other.model_dump(exclude=excluded)


def check_rows(run: RunFolder, steps: list[int]) -> None:
    """A row in metrics.jsonl and a line in evaluations.jsonl for each step, and where `compare` looks for it."""
    rows = [record for record in records(run.path) if record["kind"] == "suite"]
    assert [row["step"] for row in rows] == steps
    lines = [json.loads(one) for one in (run.path / "evaluations.jsonl").read_text().splitlines()]
    for row, line in zip(rows, lines, strict=True):
        results = read_results(run.path / row["folder"])
        assert row["tasks"] == line["tasks"]
        assert row["tokens"] == line["tokens"] == results.provenance.tokens  # type: ignore[union-attr]
        assert {name: task["value"] for name, task in row["tasks"].items()} == {
            task.name: task.score.value for task in results.tasks
        }
        assert has_line(run, Path(line["checkpoint"]), request_of(run))
    assert result_folders([run.path / rows[-1]["folder"], run.path]) == [run.path / rows[-1]["folder"]] * 2


def test_live_weights_score_what_the_checkpoint_scores(trained: dict[str, Trained], tmp_path: Path) -> None:
    run, _ = trained["mistral-1-with"]
    check_rows(run, [4, 8])
    _check_against_checkpoint(run, "step-00000004", tmp_path)


def _check_against_checkpoint(run: RunFolder, step: str, to: Path) -> None:
    checkpoint = str(run.checkpoints / step)
    apart, folder = evaluate_model(checkpoint, request_of(run, to=to), "", lambda _: lambda _done, _all: None)
    (own,) = run.path.glob(f"evaluations/own,{step}")
    check_same(read_results(own), apart)
    for task in apart.tasks:
        assert read_items(own, task.name) == read_items(folder, task.name)


def test_a_suite_does_not_change_the_training(trained: dict[str, Trained]) -> None:
    without = trained["mistral-1-without"]
    for case in ("mistral-1-with", "mistral-1-cut"):
        check_same_training(without, trained[case])


def check_same_training(one: Trained, other: Trained) -> None:
    """Losses, gradients, validations, weights, optimiser and random numbers, to the bit."""
    assert one.hashes == other.hashes
    kept = ("kind", "step", "loss", "gradient_norm", "sources", "zeros")
    (a, b) = (
        [
            {key: record.get(key) for key in kept}
            for record in records(each.run.path)
            if record["kind"] in ("train", "validation")
        ]
        for each in (one, other)
    )
    assert a == b


def test_an_interrupted_suite_resumes_to_the_same_scores(trained: dict[str, Trained]) -> None:
    cut, whole = trained["mistral-1-cut"].run, trained["mistral-1-with"].run
    check_rows(cut, [4, 8])
    for step in ("step-00000004", "step-00000008"):
        results = [read_results(run.path / "evaluations" / f"own,{step}") for run in (cut, whole)]
        for one in results:
            one.model, one.command = "", None
            assert one.provenance is not None
            one.provenance.run = ""
        check_same(*results)


def test_partitioned_weights_are_evaluated_from_the_checkpoint(trained: dict[str, Trained], tmp_path: Path) -> None:
    run, _ = trained["mistral-3-with"]
    check_rows(run, [8])
    _check_against_checkpoint(run, "step-00000008", tmp_path)


@pytest.mark.slow
def test_other_models_and_stages_do_the_same(train: Train, tmp_path: Path) -> None:
    pairs = [f"{kind}-{stage}" for kind, stage in (("mixtral", 2), ("mistral_tied", 0))]
    found = train([f"{pair}-{how}" for pair in pairs for how in ("without", "with")])
    for pair in pairs:
        check_same_training(found[f"{pair}-without"], found[f"{pair}-with"])
        run = found[f"{pair}-with"].run
        check_rows(run, [4, 8])
        _check_against_checkpoint(run, "step-00000008", tmp_path / pair)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.suite_limit=5"], "would be ignored"),
        (["eval.suite=quick", "eval.suite_every_tokens=25600"], "no checkpoint"),
        (["eval.suite=quick", "eval.suite_limit=0"], "Allowed: 1 to"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        compose_recipe("quickstart", overrides)


def refused(suite: str, data_dir: Path | None = None) -> str:
    evaluation = compose_recipe("quickstart").eval
    evaluation.suite, evaluation.suite_data_dir = suite, data_dir and str(data_dir)
    with pytest.raises(EvaluationError) as error:
        suite_of(evaluation)
    return str(error.value)


def test_missing_suites_and_data_are_reported_first(tmp_path: Path) -> None:
    assert "Did you mean 'quick'?" in refused("quik")
    assert "piqa_test.jsonl.gz" in refused("commonsense", tmp_path)
    assert "no folder" in refused("commonsense", tmp_path / "no")


@pytest.mark.slow
def test_a_task_that_the_harness_does_not_know_is_refused_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPARSIFY_EVAL_DATA", raising=False)
    own = tmp_path / "own.yaml"
    own.write_text("name: own\ntasks: {hellaswagg: {}}\n")
    assert "Did you mean 'hellaswag'?" in refused(str(own))


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_command_with_its_message(command: Command, tmp_path: Path) -> None:
    """Only rank 0 raises it, after the last step was saved: the repeated command runs the suite alone."""
    suite, run = tmp_path / "own.yaml", tmp_path / "run"
    suite.write_text("name: own\ntasks: {python_functions: {limit: 8, metric: nonsense}}\n")
    command_line = [*command(SETUP, run), f"eval.suite={suite}", "eval.suite_every_tokens=4096"]
    failed = subprocess.run(command_line, capture_output=True, text=True, check=False, timeout=300)
    assert failed.returncode == 2, failed.stderr
    assert "Task python_functions has no metric 'nonsense'" in failed.stderr
    assert not [record for record in records(run) if record["kind"] == "suite"]

    suite.write_text("name: own\ntasks: {python_functions: {limit: 8}}\n")
    subprocess.run(command_line, check=True, stdout=subprocess.DEVNULL, timeout=300)
    check_rows(RunFolder(run), [8])
    trained = [record["step"] for record in records(run) if record["kind"] == "train"]
    assert trained == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_ctrl_c_ends_all_ranks_and_the_same_command_resumes(stage: int, command: Command, tmp_path: Path) -> None:
    suite, run = tmp_path / "own.yaml", tmp_path / "run"
    suite.write_text("name: own\ntasks: {python_functions: {limit: 1000}}\n")
    command_line = command(SETUP._replace(stage=stage), run)
    command_line += [f"eval.suite={suite}", "eval.suite_every_tokens=2048"]
    launched = subprocess.Popen(command_line, stdout=subprocess.DEVNULL, start_new_session=True)
    journal = run / "evaluations/own,step-00000004/journal/python_functions.loglikelihood.jsonl"
    deadline = time.monotonic() + 300
    while not journal.is_file() or journal.stat().st_size < 1000:
        assert launched.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(launched.pid, signal.SIGINT)
    assert launched.wait(60) == 130
    answered = len(journal.read_text().splitlines())
    assert answered > 1
    assert not [record for record in records(run) if record["kind"] == "suite"]

    subprocess.run(command_line, check=True, stdout=subprocess.DEVNULL, timeout=300)
    check_rows(RunFolder(run), [4, 8])
    checkpoint = str(run / "checkpoints" / "step-00000004")
    apart, _ = evaluate_model(
        checkpoint,
        request_of(RunFolder(run), to=tmp_path / "apart"),
        "",
        lambda _: lambda _done, _all: None,
    )
    check_same(read_results(run / "evaluations" / "own,step-00000004"), apart)
