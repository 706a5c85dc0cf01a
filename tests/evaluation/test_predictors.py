"""Evaluation of a model that predictors mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparsify.cli.main import main
from sparsify.commands.evaluate import EvalRequest, follow
from sparsify.compare.evaluations import compare_evaluations
from sparsify.conversion.sparse_folder import load_sparse, write_config
from sparsify.conversion.tokenizer import copy_tokenizer, load_tokenizer
from sparsify.errors import EvaluationError
from sparsify.evaluation.evaluate import EvalSettings, evaluate
from sparsify.evaluation.held_out_perplexity import HeldOut
from sparsify.evaluation.results import EvaluationResults, read_results
from sparsify.evaluation.subject import Subject
from sparsify.evaluation.suite import load_suite
from sparsify.evaluation.tasks import task_sources
from sparsify.mixture.sequences.reader import PackedSequence, collate
from sparsify.predictors import Predictors, write_predictors
from sparsify.predictors.quality import evaluate_predictors
from tests.predictors.untrained import random_predictors

EVERYTHING_ON = -1e9


@pytest.fixture(scope="module", params=["mistral", "mixtral"])
def subject(request: pytest.FixtureRequest, stock: dict[str, Path]) -> Subject:
    folder = stock[request.param]
    model = load_sparse(folder, "drelu")
    return Subject(
        model,
        load_tokenizer(folder),
        "small",
        predictors=("predictors", random_predictors(model, 0.5)),
    )


def measured(
    subject: Subject,
    data_dir: Path,
    folder: Path,
    predictors: Predictors | None,
    *,
    held_out: HeldOut | None = None,
    batch_size: int = 8,
) -> EvaluationResults:
    suite_file = folder.parent / "own.yaml"
    suite_file.write_text("name: own\ntasks: {arc_easy: {shots: 1, limit: 6}}\nprompts: [Once]\n")
    suite = load_suite(str(suite_file))
    masked = Subject(
        subject.model,
        subject.tokenizer,
        subject.name,
        predictors=None if predictors is None else ("predictors", predictors),
    )
    sources = task_sources(suite, data_dir)
    return evaluate(masked, suite, sources, held_out, folder, EvalSettings(batch_size=batch_size))


def sequences(count: int) -> list[PackedSequence]:
    rng = np.random.default_rng(0)
    rows = (rng.integers(3, 2000, 33) for _ in range(count))
    return [PackedSequence("prose", row[:-1], np.arange(32), row[1:]) for row in rows]


def test_the_masked_loss_is_that_of_the_predictors_report(subject: Subject, data_dir: Path, tmp_path: Path) -> None:
    predictors = random_predictors(subject.model, 0.5)
    held_out = sequences(3)
    evaluation = evaluate_predictors(
        subject.model,
        predictors,
        [collate([sequence]) for sequence in held_out],
        name="small",
        folder="predictors",
        text="",
        max_loss_rise=9.0,
        thresholds=[0.5],
    )
    found = measured(subject, data_dir, tmp_path / "out", predictors, held_out=HeldOut("own", held_out))
    row = found.tasks[-1]
    (point,) = evaluation.points
    assert row.score.value == pytest.approx(point.perplexity, rel=1e-6)
    assert row.score.value != pytest.approx(evaluation.references[0].perplexity, rel=1e-4)
    assert row.predicted_on == pytest.approx(point.on_share)
    assert row.predicted_recall == pytest.approx(point.recall)
    assert 0.1 < point.on_share < 0.9


def test_padding_is_not_counted_as_switched_on(subject: Subject, data_dir: Path, tmp_path: Path) -> None:
    predictors = random_predictors(subject.model, 0.5)
    one, seven = (
        measured(subject, data_dir, tmp_path / str(size), predictors, batch_size=size).tasks[0] for size in (1, 7)
    )
    assert one.tokens == seven.tokens
    assert one.predicted_on == pytest.approx(seven.predicted_on, abs=1e-5)
    assert one.predicted_recall == pytest.approx(seven.predicted_recall, abs=1e-4)
    assert one.score == seven.score
    account = one.active_parameters
    assert account.predicted is not None
    assert account.predicted < account.total


def test_predictors_that_switch_everything_on_change_nothing(subject: Subject, data_dir: Path, tmp_path: Path) -> None:
    exact = measured(subject, data_dir, tmp_path / "exact", None)
    on = measured(subject, data_dir, tmp_path / "on", random_predictors(subject.model, EVERYTHING_ON))
    assert on.tasks[0].score == exact.tasks[0].score
    assert on.tasks[0].product_zeros == exact.tasks[0].product_zeros
    assert on.samples == exact.samples
    assert (on.tasks[0].predicted_on, exact.tasks[0].predicted_on) == (1.0, None)


def test_other_predictors_in_the_same_folder_are_evaluated_again(
    subject: Subject, data_dir: Path, tmp_path: Path
) -> None:
    to = tmp_path / "out"
    exact = measured(subject, data_dir, to, None)
    masked = measured(subject, data_dir, to, random_predictors(subject.model, 0.5))
    higher = measured(subject, data_dir, to, random_predictors(subject.model, 2.0))
    assert masked.tasks[0].product_zeros > exact.tasks[0].product_zeros  # type: ignore[operator]
    assert higher.tasks[0].predicted_on < masked.tasks[0].predicted_on  # type: ignore[operator]
    assert exact.model_hash == masked.model_hash
    assert masked.predictors is not None
    assert higher.predictors is not None
    assert masked.predictors.hash != higher.predictors.hash


def test_the_command_reports_the_predictors_and_compares_with_the_exact_model(
    stock: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = load_sparse(stock["mistral"], "drelu")
    folder = tmp_path / "my_sparse_model"
    model.save_pretrained(folder)
    write_config(model.config, folder, torch.float32)
    copy_tokenizer(stock["mistral"], folder)
    write_predictors(random_predictors(model, 0.5), tmp_path / "my_predictors")
    suite = tmp_path / "own.yaml"
    suite.write_text("name: own\ntasks: {python_functions: {limit: 4}}\nprompts: [Once]\n")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["sparsify", "evaluate", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert ended.value.code in (0, None, 2), output.err
        return output.out, output.err

    run("my_sparse_model", "--suite", "own.yaml")
    out, _ = run("my_sparse_model", "--suite", "own.yaml", "--predictors", "my_predictors")
    assert "my_predictors scores above 0.5" in out
    assert "switched on" in out
    both = [tmp_path / "evaluations" / "my_sparse_model" / name for name in ("own", "own,predictors")]
    masked = read_results(both[1])
    assert masked.predictors is not None
    assert (masked.predictors.folder, masked.predictors.threshold) == ("my_predictors", 0.5)
    first, second = compare_evaluations(both).models
    assert (second.against, second.against_kind) == (first.name, "itself without predictors")
    assert second.active_parameters == masked.tasks[0].active_parameters.predicted
    assert first.samples[0].prompt == second.samples[0].prompt

    _, err = run(str(stock["mistral"]), "--suite", "own.yaml", "--predictors", "my_sparse_model")
    assert "holds no predictors" in err
    _, err = run(str(stock["mixtral"]), "--suite", "own.yaml", "--predictors", "my_predictors")
    assert "belongs to another model" in err


def test_following_a_run_takes_no_predictors(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_file.read_text())
    with pytest.raises(EvaluationError, match="belong to one checkpoint"):
        follow(
            str(tmp_path),
            EvalRequest("quick", predictors=tmp_path / "predictors"),
            "",
            lambda _: lambda _done, _all: None,
        )
