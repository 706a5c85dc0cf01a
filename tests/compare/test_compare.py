"""Numbers of a comparison of runs, and which of them are comparable."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.compare import Comparison, compare
from sparsify.compare.comparison_tables import tables
from sparsify.compare.settings import short_names
from sparsify.errors import RunError
from tests.compare.conftest import Runs

TWO = {"code": 2.0, "prose": 3.0, "questions": 2.5}
OTHER = {"code": 2.5, "prose": 3.5, "questions": 3.0}


def rows(comparison: Comparison, title: str) -> list[dict[str, str]]:
    """A table of the comparison, each row as a dictionary."""
    table = next(one for one in tables(comparison) if one.title.startswith(title))
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def test_a_single_run_is_compared_with_its_baseline(runs: Runs) -> None:
    run = runs(
        "quickstart",
        losses={0: OTHER, 10240: OTHER, 20480: TWO},
        zeros=0.875,
        tokens_per_second=1234.5,
    )
    baseline = {"code": 1.9, "prose": 2.75, "questions": 2.5}
    runs("quickstart/baseline", "activation=swiglu", losses={0: baseline, 20480: baseline})

    comparison = compare([run])

    sparse, dense = comparison.runs
    # 0.6 code + 0.2 prose + 0.2 questions
    assert sparse.loss == pytest.approx(2.3)
    assert sparse.baseline is not None
    assert sparse.baseline.gap == pytest.approx(0.6 * 0.1 + 0.2 * 0.25)
    assert sparse.baseline.source_gaps == pytest.approx({"code": 0.1, "prose": 0.25, "questions": 0})
    assert (sparse.baseline.tokens, dense.baseline, dense.baseline_state) == (
        20480,
        None,
        "is dense",
    )
    assert [point.tokens for point in sparse.points] == [0, 10240, 20480]
    assert sparse.points[0].loss == pytest.approx(2.8)  # after the activation replacement, not the base before it
    assert comparison.losses_comparable
    assert comparison.notes == []
    assert comparison.swept_setting is None
    assert rows(comparison, "Runs") == [
        {
            "run": "quickstart",
            "ffn_activation": "reglu",
            "training tokens": "20,480",
            "training loss": "2.500",
            "validation loss": "2.300",
            "to dense baseline": "+0.110",
            "exact zeros": "87.5%",
            "tokens/s": "1,234",
        },
        {
            "run": "baseline",
            "ffn_activation": "swiglu",
            "training tokens": "20,480",
            "training loss": "2.500",
            "validation loss": "2.190",
            "to dense baseline": "is dense",
            "exact zeros": "0%",
            "tokens/s": "1,000",
        },
    ]
    assert rows(comparison, "Validation loss of each source")[0] == {
        "run": "quickstart",
        "code": "2.000 (60.0%)",
        "prose": "3.000 (20.0%)",
        "questions": "2.500 (20.0%)",
    }


def test_a_sweep_of_shares_is_compared_source_by_source(sweep: list[Path]) -> None:
    comparison = compare(sweep)

    assert comparison.swept_setting == "mixture.instruction_token_share"
    assert comparison.settings == ["mixture.instruction_token_share"]
    table = rows(comparison, "Runs")
    assert [row["run"] for row in table] == ["share=0", "share=stated", "share=0.5"]
    # An unset share shows the share of the sources if other runs set it.
    assert [row["instruction_token_share"] for row in table] == ["0", "0.2", "0.5"]
    # 2.0 * 0.75 + 3.0 * 0.25; runs with different weights are not comparable
    assert [row["validation loss"] for row in table] == ["2.250†", "2.400†", "2.312†"]
    assert [row["to dense baseline"] for row in table] == ["+0.500"] * 3
    assert [row["unweighted mean"] for row in table] == ["–", "2.600", "2.567"]
    assert [row["exact zeros"] for row in table] == ["80.0%†", "80.0%", "80.0%"]
    sources = rows(comparison, "Validation loss of each source")
    assert [row["code"] for row in sources] == ["2.000 (75.0%)", "2.100 (60.0%)", "2.400 (37.5%)"]
    assert [row["questions"] for row in sources] == ["– (0%)", "2.500 (20.0%)", "2.000 (50.0%)"]
    weights, zeros, unmeasured = comparison.notes
    assert "weighted by its own token shares" in weights
    assert "or their unweighted mean" in weights
    assert "not evaluated on the same sequences" in zeros
    assert unmeasured.startswith("share=0 does not train on questions, so it was not evaluated there")


def test_a_dense_run_of_the_same_tokens_is_the_baseline(runs: Runs) -> None:
    alone = ("baseline.ffn_activation=null",)
    sparse = runs("quickstart", *alone, losses={20480: OTHER})
    drelu = runs("quickstart,activation=drelu", "activation=drelu", *alone, losses={20480: OTHER})
    # Micro-batch size and number of processes do not change the tokens.
    faster = ("training.micro_batch_size=2", "launch.processes=1")
    dense = runs("quickstart,activation=swiglu", "activation=swiglu", *faster, losses={20480: TWO})
    seed = "training.seed=2"
    other = runs("quickstart,seed=2,activation=reglu", seed, *alone, losses={20480: OTHER})

    comparison = compare([sparse, drelu, dense, other])

    gaps = [row["to dense baseline"] for row in rows(comparison, "Runs")]
    assert gaps == ["+0.500", "+0.500", "is dense", "no baseline"]
    assert comparison.runs[0].baseline is not None
    assert comparison.runs[0].baseline.name == "activation=swiglu"
    (note,) = comparison.notes
    assert note.startswith("No baseline for seed=2,activation=reglu: the cost of the zeros is unknown")


@pytest.mark.parametrize(
    ("other", "cause"),
    [
        (
            {"fingerprints": {"code": "new text"}},
            ["other: code was", "fingerprint new text, not text of code"],
        ),
        (
            {"overrides": ["eval.validation_sequences_per_source=4"]},
            ["other: code, prose and questions were", "4 sequences, not 16"],
        ),
        (
            {"overrides": ["training.sequence_length=128", "training.global_batch_size=16"]},
            ["other: code, prose", "sequences of 128 tokens, not 256"],
        ),
    ],
)
def test_losses_of_other_sequences_are_marked(runs: Runs, other: dict, cause: list[str]) -> None:
    other = dict(other)
    overrides = other.pop("overrides", [])
    paths = [runs(name, f"training.seed={i}", losses={20480: TWO}) for i, name in enumerate("ab")]
    paths.append(runs("other", *overrides, losses={20480: TWO}, **other))

    comparison = compare(paths)

    assert [run.sources["code"].comparable for run in comparison.runs] == [True, True, False]
    changed_all = "prose" in cause[0]
    assert comparison.runs[2].sources["prose"].comparable != changed_all
    assert [run.loss_comparable for run in comparison.runs] == [True, True, False]
    assert comparison.runs[2].mean_loss is None
    assert rows(comparison, "Validation loss of each source")[2]["code"] == "2.000† (60.0%)"
    assert rows(comparison, "Runs")[2]["validation loss"] == "2.300†"
    note = comparison.notes[0]
    assert all(words in note for words in [*cause, "sequences of a", "cannot be compared"])


def test_more_sequences_than_there_are_give_the_same_sequences(runs: Runs) -> None:
    """The held-out text has 32 sequences: settings of 40 and 50 both use all of them."""
    settings = [f"eval.validation_sequences_per_source={number}" for number in (40, 50)]
    paths = [runs(f"run{i}", one, losses={20480: TWO}) for i, one in enumerate(settings)]
    assert compare(paths).losses_comparable
    fewer = runs("fewer", "eval.validation_sequences_per_source=20", losses={20480: TWO})
    assert "20 sequences, not 32" in compare([*paths, fewer]).notes[0]


def test_an_unfinished_run_shows_its_progress(runs: Runs) -> None:
    finished = runs("quickstart", losses={0: OTHER, 10240: OTHER, 20480: TWO})
    running = runs(
        "quickstart,seed=2",
        "training.seed=2",
        losses={0: OTHER, 10240: OTHER},
        trained_tokens=12288,
    )
    baseline = {"code": 2.0, "prose": 3.5, "questions": 3.0}
    seed = ("training.seed=2", "activation=swiglu")
    runs("quickstart,seed=2/baseline", *seed, losses={0: baseline, 2048: TWO})

    comparison = compare([finished, running])

    assert [run.finished for run in comparison.runs] == [True, False]
    assert rows(comparison, "Runs")[1]["training tokens"] == "60% of 20,480"
    assert comparison.runs[1].baseline is not None
    assert comparison.runs[1].baseline.tokens == 0
    assert comparison.runs[1].baseline.gap == pytest.approx(0.6 * 0.5)
    text = "\n".join(comparison.notes)
    assert "seed=2 is not finished: 12,288 of 20,480 tokens (60%)" in text
    assert "those at 10,240 tokens" in text
    assert "evaluated after different numbers of training tokens" in text
    assert "seed=2: the gap to its baseline is that at 0 tokens" in text
    assert "No baseline for quickstart" in text


def test_a_baseline_without_validation_is_not_a_missing_baseline(runs: Runs) -> None:
    path = runs("quickstart", losses={20480: TWO})
    runs("quickstart/baseline", "activation=swiglu", losses={})
    other = runs("quickstart,seed=2", "training.seed=2", losses={20480: TWO})
    comparison = compare([path, other])
    gaps = [row["to dense baseline"] for row in rows(comparison, "Runs")]
    assert gaps == ["not measured yet", "no baseline"]


def test_many_differing_settings_get_a_separate_table(runs: Runs) -> None:
    changed = (
        "training.seed=2",
        "optimizer.peak_learning_rate=1e-3",
        "optimizer.weight_decay=0",
        "optimizer.beta2=0.99",
        "training.gradient_checkpointing=true",
    )
    paths = [runs("a", losses={20480: TWO}), runs("b", *changed, losses={20480: TWO})]
    comparison = compare(paths)
    assert "seed" not in rows(comparison, "Runs")[0]
    settings = {row["setting"]: (row["a"], row["b"]) for row in rows(comparison, "Settings")}
    assert settings == {
        "training.gradient_checkpointing": ("false", "true"),
        "training.seed": ("1", "2"),
        "optimizer.peak_learning_rate": ("3e-05", "0.001"),
        "optimizer.beta2": ("0.95", "0.99"),
        "optimizer.weight_decay": ("0.1", "0"),
    }


def test_an_incomplete_last_line_is_ignored(runs: Runs) -> None:
    paths = [runs(name, losses={10240: OTHER, 20480: TWO}) for name in "ab"]
    metrics = paths[1] / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    assert [run.measured_tokens for run in compare(paths).runs] == [20480, 10240]

    metrics.write_text("{half\n" + metrics.read_text())
    with pytest.raises(RunError, match=r"Line 1 of .*metrics.jsonl is not a JSON object: '\{half'"):
        compare(paths)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/q", "runs/q,seed=2"], ["q", "seed=2"]),
        (["q,tokens=9,share=0", "q,tokens=9,share=0.1"], ["share=0", "share=0.1"]),
        (["q", "q,tokens=9,share=0", "q,tokens=9,share=0.1"], ["q", "share=0", "share=0.1"]),
        (["a/runs/q", "b/runs/q"], ["a/runs/q", "b/runs/q"]),
        (["runs/q", "runs/q/baseline"], ["q", "baseline"]),
        (["runs/q/baseline", "runs/p/baseline"], ["q/baseline", "p/baseline"]),
        (["q,share=0,x=1", "q,share=0", "q,share=1"], ["share=0,x=1", "share=0", "share=1"]),
    ],
)
def test_names_are_as_short_as_they_can_be(folders: list[str], names: list[str]) -> None:
    assert short_names([Path(folder) for folder in folders]) == names


PARTS = st.lists(st.sampled_from(["q", "seed=1", "seed=2", "share=0", "x"]), min_size=1, max_size=4)


@given(st.sets(PARTS.map(",".join), min_size=2, max_size=6))
def test_names_always_set_runs_apart(folders: set[str]) -> None:
    names = short_names([Path("runs") / folder for folder in sorted(folders)])
    assert len(set(names)) == len(folders)
    assert all(
        set(name.split(",")) <= set(folder.split(",")) for name, folder in zip(names, sorted(folders), strict=True)
    )
