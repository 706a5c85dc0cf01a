"""Paired differences between evaluations, and their caveats."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.compare.evaluation_report import evaluation_notes
from sparsify.compare.evaluations import EvaluationComparison, compare_evaluations
from sparsify.errors import EvaluationError
from sparsify.evaluation.metrics import Score, difference, kind_of, mean_of, metric_value
from sparsify.evaluation.results import (
    RESULTS_FILE,
    ActiveCount,
    EvaluationResults,
    Provenance,
    Sample,
    SourceOverlap,
    TaskResult,
    write_items,
)

Evaluations = Callable[..., Path]


@pytest.fixture
def evaluations(tmp_path: Path) -> Evaluations:
    """Writes evaluations as `sparsify evaluate` does, with given scores."""

    def write(
        name: str,
        scores: Mapping[str, Sequence[float]],
        activation: str = "drelu",
        identity: str | None = None,
        overlaps: Sequence[SourceOverlap] = (),
        suite: str = "own",
        zeros: float = 0.9,
    ) -> Path:
        folder = tmp_path / name / "evaluations" / suite
        tasks = []
        for task, values in scores.items():
            metric = "perplexity" if task == "lambada" else "acc"
            items = {f"{task}:{i}": {metric: Score(value, 1.0)} for i, value in enumerate(values)}
            write_items(folder, task, items)
            score = metric_value(kind_of(metric), [item[metric] for item in items.values()])
            tasks.append(
                TaskResult(
                    name=task,
                    shots=0,
                    data="made up",
                    version="1",
                    metric=metric,
                    score=score,
                    metrics={metric: score},
                    gate_zeros=zeros / 2,
                    product_zeros=zeros,
                    tokens=100,
                    active_parameters=ActiveCount(
                        total=1000,
                        perfect_predictor=round(1000 - 600 * zeros),
                        gate_first=round(1000 - 400 * zeros),
                    ),
                    truncated_requests=0,
                    seconds=1.0,
                    overlaps=list(overlaps),
                )
            )
        means = [task.score for task in tasks if task.score.kind == "mean"]
        results = EvaluationResults(
            model=str(tmp_path / name),
            model_hash=name,
            model_type="sparse_mistral",
            ffn_activation=activation,
            dtype="float32",
            context_tokens=128,
            suite=suite,
            limit=None,
            batch_size=1,
            device="cpu",
            fewshot_seed=1234,
            versions={},
            provenance=None
            if identity is None
            else Provenance(run=name, identity=identity, tokens=1000, instruction_sources=["chat"]),
            tasks=tasks,
            average=mean_of(means) if len(means) > 1 else None,
            samples=[Sample(prompt="Once", text=f"upon a {name}")],
            notes=[],
        )
        (folder / RESULTS_FILE).write_text(results.model_dump_json())
        return folder

    return write


def compared(*folders: Path) -> tuple[EvaluationComparison, str]:
    result = compare_evaluations(folders)
    return result, "\n".join(evaluation_notes(result))


HALF = [0.0, 1.0] * 100
MORE = [1.0, 1.0, 0.0, 1.0] * 50
SAME_ALMOST = [1.0, 0.0, *HALF[2:]]


def test_a_gain_without_a_baseline_on_the_same_tokens_is_noted(
    evaluations: Evaluations,
) -> None:
    base = evaluations("base", {"gsm8k": HALF, "piqa": HALF}, "swiglu")
    sparse = evaluations("sparse", {"gsm8k": MORE, "piqa": SAME_ALMOST}, identity="run 1")
    result, notes = compared(base, sparse)
    model = result.models[1]
    assert (model.against, model.against_kind) == ("base", "another model")
    assert model.differences["gsm8k"].verdict == "better"
    assert model.differences["gsm8k"].difference.value == pytest.approx(0.25)
    assert "is not its baseline on the same tokens" in notes
    assert "sparse against base: within noise on piqa." in notes


def test_a_baseline_is_found_at_any_position(evaluations: Evaluations) -> None:
    base = evaluations("base", {"gsm8k": HALF}, "swiglu")
    sparse = evaluations("sparse", {"gsm8k": MORE}, identity="run 1")
    other = evaluations("other", {"gsm8k": MORE}, "swiglu", identity="run 2")
    baseline = evaluations("baseline", {"gsm8k": MORE[::-1]}, "swiglu", identity="run 1")
    result, notes = compared(base, sparse, other, baseline)
    against = {model.name: (model.against, model.against_kind) for model in result.models}
    assert against["sparse"] == ("baseline", "its dense baseline")
    assert against["baseline"] == ("base", "another model")
    assert against["base"] == (None, "nothing")
    assert "sparse is better" not in notes


def test_a_gain_on_items_in_the_instruction_data_is_noted(
    evaluations: Evaluations,
) -> None:
    overlap = SourceOverlap(source="chat", documents_read=900, documents_overlapping=7, items=200, items_found=31)
    baseline = evaluations("baseline", {"gsm8k": HALF}, "swiglu", identity="run 1")
    sparse = evaluations("sparse", {"gsm8k": MORE}, identity="run 1", overlaps=[overlap])
    result, notes = compared(baseline, sparse)
    assert result.models[1].against_kind == "its dense baseline"
    assert "31 of 200 items share 13 words in a row" in notes
    assert "The gain on gsm8k may be memorisation." in notes


def test_only_common_items_are_paired(evaluations: Evaluations) -> None:
    one = evaluations("one", {"piqa": HALF[:50], "arc_easy": HALF})
    two = evaluations("two", {"piqa": HALF, "winogrande": HALF})
    result, notes = compared(one, two)
    assert result.tasks == ["piqa", "arc_easy", "winogrande"]
    assert result.models[1].differences["piqa"].difference.items == 50
    assert result.models[1].differences.keys() == {"piqa"}
    assert "piqa: the difference is over the 50 items that two and one share, of 200 and 50." in notes


def test_a_run_is_replaced_by_its_newest_evaluation(
    evaluations: Evaluations, sparsify: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    base = evaluations("base", {"piqa": HALF, "lambada": HALF}, "swiglu")
    run = evaluations("run", {"piqa": MORE, "lambada": MORE}).parent.parent
    code, out, _ = sparsify("compare", base, run, "--to", tmp_path / "out")
    assert code == 0
    assert "+25.0" in out
    assert "▲" in out
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Quality against active parameters" in page
    assert "is not its baseline on the same tokens" in page
    assert "upon a base" in page
    assert "upon a run" in page
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert kept["models"][1]["differences"]["piqa"]["verdict"] == "better"
    # A perplexity is better when it is lower.
    assert kept["models"][1]["differences"]["lambada"]["verdict"] == "worse"
    assert (tmp_path / "out" / "quality.png").stat().st_size > 1000
    rows = (tmp_path / "out" / "comparison.csv").read_text().splitlines()
    assert len(rows) == 1 + 4
    (tmp_path / "empty").mkdir()
    code, _, err = sparsify("compare", base, tmp_path / "empty")
    assert code == 2
    assert "has no evaluation of suite own" in err


def test_evaluations_that_cannot_be_compared_are_refused(evaluations: Evaluations) -> None:
    one = evaluations("one", {"piqa": HALF})
    two = evaluations("two", {"piqa": HALF}, suite="another")
    with pytest.raises(EvaluationError, match="different suites"):
        compare_evaluations([one, two])
    with pytest.raises(EvaluationError, match="nothing to compare"):
        compare_evaluations([one])
    (one / "items" / "piqa.jsonl").write_text("{")
    three = evaluations("three", {"piqa": HALF})
    with pytest.raises(EvaluationError, match="does not hold the scores"):
        compare_evaluations([one, three])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_a_paired_difference_is_that_of_the_items(pairs: list[tuple[bool, bool]]) -> None:
    first, second = ({str(i): Score(float(pair[side]), 1.0) for i, pair in enumerate(pairs)} for side in (0, 1))
    found = difference("mean", first, second)
    assert found is not None
    own = np.array(pairs, dtype=float)
    gaps = own[:, 0] - own[:, 1]
    assert found.value == pytest.approx(gaps.mean())
    assert found.low is not None
    error = gaps.std(ddof=1) / len(gaps) ** 0.5
    assert found.value - found.low == pytest.approx(1.959964 * error, abs=1e-12)
    backwards = difference("mean", second, first)
    assert backwards is not None
    assert backwards.value == pytest.approx(-found.value)


def test_intervals_have_their_nominal_coverage() -> None:
    """A perplexity per word over articles of very different lengths: the ratio's interval, over repeated draws."""
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        words = generator.integers(20, 400, 120)
        nats = words * 3.0 + generator.normal(0, 0.6, 120) * words
        scores = [Score(float(n), float(w)) for n, w in zip(nats, words, strict=True)]
        found = metric_value("perplexity", scores)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= np.exp(3.0) <= found.high
    assert 0.91 < inside / 400 < 0.98
