"""`sparsify generate` streams what transformers would write, and counts what it read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.cli import main
from sparsify.commands.generate import MemoryLimit, generate
from sparsify.conversion.convert import convert
from sparsify.errors import ModelError, RunError
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection

PROMPT = "word1 value2"


@pytest.fixture(scope="module")
def bundle(compiled: None, stock: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("generate") / "mixtral-drelu"
    section = ModelSection(source=str(stock["mixtral"]))
    convert(section, ActivationSection("drelu"), to, seed=0, dtype=torch.float32)
    return to


def run(bundle: Path, pieces: list[str] | None = None, **changed: Any):
    given: dict[str, Any] = {
        "num_tokens": 12,
        "temperature": 0.0,
        "seed": 1,
        "weights": "stored",
        "predictors": None,
        "threads": None,
        "dense": False,
        "write": (pieces if pieces is not None else []).append,
    }
    return generate(str(bundle), PROMPT, **given | changed)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_it_writes_what_dense_decoding_writes_and_reads_less(bundle: Path, temperature: float) -> None:
    pieces: list[str] = []
    sparse = run(bundle, pieces, temperature=temperature)
    dense = run(bundle, temperature=temperature, dense=True)
    assert "".join(pieces) == sparse.text == dense.text != ""
    assert len(pieces) > 1
    assert sparse.fired_share is not None
    assert sparse.touched_share is not None
    assert 0.1 < sparse.fired_share < 0.4 < sparse.touched_share < 0.8
    # Two of four experts, three projections of 64 neurons by 32, in fp32, two layers.
    assert dense.ffn_bytes_per_token == sparse.dense_ffn_bytes_per_token == 2 * 3 * 64 * 32 * 4 * 2
    ratio = sparse.ffn_bytes_per_token / dense.ffn_bytes_per_token
    assert ratio == pytest.approx(sparse.touched_share)
    assert dense.fired_share is None


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8.5), ("int4", 4.5)])
def test_blocks_are_what_a_token_reads(bundle: Path, weights: str, bits: float) -> None:
    result, stored = run(bundle, weights=weights), run(bundle)
    assert result.text != ""
    assert (result.weights, stored.weights) == (weights, "stored")
    assert result.touched_share is not None
    of_two_experts = 2 * 3 * 64 * 32 * bits / 8 * 2
    factors = 2 * 2 * 32 * 4  # of the outputs of two experts' down projections
    assert result.ffn_bytes_per_token == pytest.approx(result.touched_share * of_two_experts + factors)
    # All four experts, the attention's projections, and the output layer, which is int8 in both.
    attention = 2 * (2 * 32 * 32 + 2 * 32 * 16) * bits / 8
    head = result.kept_bytes - 2 * (of_two_experts + factors) - attention
    assert head > 0
    assert head % (32 * 8.5 / 8) == 0
    assert stored.kept_bytes == 0
    assert result.other_bytes_per_token < 0.5 * stored.other_bytes_per_token == 0.5 * result.dense_other_bytes_per_token
    assert result.dense_ffn_bytes_per_token == stored.dense_ffn_bytes_per_token


def test_the_command_prints_json(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sparsify", "generate", str(bundle), PROMPT, "--json"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code in (0, None)
    assert json.loads(capsys.readouterr().out)["prompt"] == PROMPT


def test_what_cannot_be_is_refused(bundle: Path, stock: dict[str, Path]) -> None:
    with pytest.raises(RunError, match="--tokens is 0"):
        run(bundle, num_tokens=0)
    with pytest.raises(RunError, match="--predictors would change nothing"):
        run(bundle, dense=True, predictors=bundle)
    with pytest.raises(RunError, match="--weights would change nothing"):
        run(bundle, dense=True, weights="int8")
    with pytest.raises(ModelError, match=r"'int3'.*\n.*stored, int8, int4"):
        run(bundle, weights="int3")
    with pytest.raises(ModelError, match="swiglu makes no zeros"):
        run(stock["mistral"])


def test_the_context_ends_a_text_and_refuses_a_longer_prompt(bundle: Path) -> None:
    context = 128
    long = run(bundle, num_tokens=10_000)
    assert long.prompt_tokens + long.new_tokens <= context
    with pytest.raises(RunError, match=r"The prompt has [\d,]+ tokens\.\nFewer than the model's context, 128"):
        generate(
            str(bundle),
            PROMPT * 100,
            **{"num_tokens": 1, "temperature": 0.0, "seed": 1, "weights": "stored", "predictors": None},
            threads=None,
            dense=False,
            write=lambda _: None,
        )


def test_a_prompt_that_is_no_text_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sparsify", "generate", "somewhere", "\udcff"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_a_limit_on_memory_changes_how_it_is_read_and_not_what_is_said(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_NEURON_CACHE", str(tmp_path))
    told: list[str] = []
    limited = run(bundle, limit=MemoryLimit("8GB", "lfu", "persistence", told.append))
    assert limited.text == run(bundle).text
    assert told[0].startswith(f"Writing {tmp_path}")
    offload = limited.offload
    assert offload is not None
    assert 0 < offload.peak_bytes < offload.memory_bytes == 8 * 10**9
    assert 0 < offload.hit_rate <= 1
    assert offload.neuron_file == str(next(tmp_path.glob("*.neurons")))
    assert 0 <= offload.wait_ms_per_token < offload.ms_per_token
    dense = run(bundle, dense=True, limit=MemoryLimit("8GB"))
    assert dense.text == limited.text
    assert dense.touched_share == 1.0


def test_the_command_says_what_a_limit_cost(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSIFY_NEURON_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["sparsify", "generate", str(bundle), PROMPT, "--tokens", "3", "--memory", "8GB"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert not ended.value.code
    printed = " ".join(capsys.readouterr().out.split())
    assert "of 8,000 allowed" in printed
    assert "of the neurons needed were in memory (lru)" in printed


def test_a_run_has_no_limit_on_memory(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be decoded in 90 MB"):
        run(bundle, limit=MemoryLimit("90MB"))
    with pytest.raises(ModelError, match="There is no policy 'mru'"):
        run(bundle, limit=MemoryLimit("8GB", "mru"))
