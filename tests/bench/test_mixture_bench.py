"""`bench mixture` counts what is delivered: exact shares and nothing lost on our side, losses on the other side."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sparsify.bench.corpus import write_corpus
from sparsify.bench.mixture_pipelines import Interleaved, count_interleaved
from sparsify.bench.mixture_report import MixtureBench, mixture_table
from sparsify.bench.mixture_speed import measure_apart
from sparsify.cli import main
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.recipe.compose import load_mixture
from tests.conftest import TOKENIZER

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("mixture_bench")]

ALLOCATED_BYTES = 200_000_000


@pytest.fixture(scope="module")
def bench(mixture_file: Path) -> MixtureBench:
    """What the command prints as JSON on a small mixture."""
    arguments = ["bench", "mixture", "--on", str(mixture_file), "--json"]
    sizes = {"budget-tokens": 6_000, "sequence-length": 128, "load-tokens": 20_000}
    arguments += [word for key, size in sizes.items() for word in (f"--{key}", str(size))]
    arguments += ["--buffer-documents", "10", "--repeats", "1"]
    result = CliRunner().invoke(main.app, arguments, catch_exceptions=False)
    return MixtureBench.model_validate_json(result.stdout)


def test_our_side_delivers_the_planned_shares_within_one_sequence(bench: MixtureBench) -> None:
    assert bench.requested_token_shares == {"code": 0.5, "prose": 0.25, "questions": 0.25}
    assert bench.ours.delivered.largest_deviation_sequences < 1
    for name, planned in bench.requested_token_shares.items():
        given = bench.ours.delivered.token_shares[name]
        assert abs(given - planned) * bench.num_sequences < 1
    assert bench.ours.delivered.cut_documents == 0


def test_our_side_loses_and_repeats_nothing(bench: MixtureBench) -> None:
    assert bench.ours.resumed.documents > bench.num_sequences
    assert (bench.ours.resumed.lost, bench.ours.resumed.repeated) == (0, 0)


def test_the_other_side_draws_by_document(bench: MixtureBench) -> None:
    """Questions are a quarter of its documents, but several times shorter than the others."""
    assert bench.interleaved.delivered.token_shares["questions"] < 0.15
    assert bench.interleaved.delivered.largest_deviation_sequences > 1
    assert sum(bench.interleaved.delivered.token_shares.values()) == pytest.approx(1)


def test_every_number_is_measured_and_shown(bench: MixtureBench) -> None:
    assert all(side.peak_memory_bytes > 10**8 for side in (bench.ours, bench.interleaved))
    assert [one.sequence_length for one in bench.loaded] == [128, 256]
    assert bench.tokenized.num_tokens >= bench.num_sequences * bench.sequence_length
    with main.console.capture() as shown:
        main.console.print(mixture_table(bench))
    for name in bench.requested_token_shares:
        assert name in shown.get()


def test_documents_of_a_lost_shuffle_buffer_are_counted(tmp_path: Path) -> None:
    """As documented by `datasets`: examples in shuffle buffers are lost when resuming."""
    rows = [json.dumps({"text": f"{number} " + "word " * 60}) for number in range(900)]
    (tmp_path / "one.jsonl").write_text("\n".join(rows))
    (tmp_path / "two.jsonl").write_text("\n".join(rows))
    mixture = tmp_path / "mixture.yaml"
    sources = {name: {"files": [str(tmp_path / f"{name}.jsonl")], "token_share": 0.5} for name in ("one", "two")}
    mixture.write_text(json.dumps({"name": "two", "sources": sources}))
    corpus = write_corpus(load_mixture(str(mixture)), tmp_path, budget_tokens=10**6)
    tokenizer = load_tokenizer(TOKENIZER)
    side = Interleaved(corpus, tokenizer, 64, 1, 20, corpus.shares)
    length = len(tokenizer(rows[0])["input_ids"])
    num_sequences = 1200 * length // 64
    (delivered, resumed), _ = count_interleaved(side, num_sequences, stop=num_sequences // 2, late=num_sequences // 2)
    assert resumed.lost > 0
    assert delivered.token_shares["one"] == pytest.approx(0.5, abs=0.1)


def test_added_memory_is_that_of_the_work() -> None:
    """A child that does nothing adds no memory, independent of this process."""
    held = np.ones(2 * ALLOCATED_BYTES // 8)
    measured = measure_apart({"work": (np.ones, ALLOCATED_BYTES // 8), "nothing": (len, "")})
    assert held.nbytes == 2 * ALLOCATED_BYTES
    assert measured["work"][1] == pytest.approx(ALLOCATED_BYTES, rel=0.2)
    assert measured["nothing"][1] < ALLOCATED_BYTES / 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget-tokens", "1000"], "At least 20 sequences"),
        (["--repeats", "0"], "--repeats is '0'"),
        (["--on", "quickstrat"], "Did you mean 'quickstart'"),
        (["--tokenizer", "no/such/folder"], "no/such/folder"),
    ],
)
def test_mistakes_are_explained(
    options: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["sparsify", "bench", "mixture", *options])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err
