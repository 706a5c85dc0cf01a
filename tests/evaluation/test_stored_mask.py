"""`sparsify evaluate` applies the mask that a model stores: its scores are those of the stock model, masked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsify.cli.main import main
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.evaluation.results import read_items, read_results
from tests.evaluation.conftest import WORDS

SUITE = "name: own\ntasks:\n  lambada: {shots: 0, metric: perplexity}\n"
Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("HOME", str(tmp_path))

    def command(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["sparsify", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None), capfd.readouterr().err

    return command


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def drop(threshold: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return h * (h.abs() > threshold)


def masked_by_hand(stock: Path, masked: Path) -> Any:
    """transformers' own model; its blocks drop what does not exceed the stored thresholds."""
    model = load(stock)
    stored = load_file(masked / "model.safetensors")
    for number, layer in enumerate(model.model.layers):
        names = [name for name in stored if f"layers.{number}." in name and name.endswith("threshold")]
        (threshold,) = (stored[name] for name in names)
        if not hasattr(layer.mlp, "experts"):
            hook = partial(lambda threshold, _, args: (drop(threshold, args[0]),), threshold)
            layer.mlp.down_proj.register_forward_pre_hook(hook)
            continue
        model.set_experts_implementation("batched_mm")  # it computes the neurons by a method of its own
        layer.mlp.experts._apply_gate = partial(_gated, layer.mlp.experts.act_fn, threshold)
    return model


def _gated(act_fn: Any, threshold: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return drop(threshold, act_fn(gate) * up)


def last_word_log_likelihoods(model: Any, folder: Path) -> list[float]:
    tokenizer, found = load_tokenizer(folder), []
    for word in WORDS:
        text = f"The {word} was there, and then came the"
        before = tokenizer(text)["input_ids"]
        ids = torch.tensor([tokenizer(f"{text} {word}")["input_ids"]])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0].log_softmax(-1)
        found.append(sum(float(scores[at - 1, ids[0, at]]) for at in range(len(before), ids.shape[1])))
    return found


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_scores_are_those_of_the_masked_model(
    kind: str, stock: dict[str, Path], mixture_file: Path, data_dir: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "own.yaml").write_text(SUITE)
    masked = tmp_path / "masked"
    method = ["--method", "percentile", "--target-zeros", 0.7, "--calibration-tokens", 2048]
    run("convert", stock[kind], "--to", masked, *method, "--calibrate-on", mixture_file)
    asked = ["--suite", tmp_path / "own.yaml", "--data-dir", data_dir]
    for name, model in (("masked", masked), ("dense", stock[kind])):
        run("evaluate", model, *asked, "--to", tmp_path / f"{name}-results")

    items = {name: read_items(tmp_path / f"{name}-results", "lambada") for name in ("masked", "dense")}
    found = {name: [-scores["perplexity"].value for scores in items[name].values()] for name in items}
    by_hand = last_word_log_likelihoods(masked_by_hand(stock[kind], masked), masked)
    assert found["masked"] == pytest.approx(by_hand, abs=1e-4)
    assert found["dense"] == pytest.approx(last_word_log_likelihoods(load(stock[kind]), masked), abs=1e-4)
    assert all(abs(one - other) > 1e-3 for one, other in zip(*found.values(), strict=True))
    task = read_results(tmp_path / "masked-results").tasks[0]
    assert task.score.value == pytest.approx(math.exp(-fmean(by_hand)), rel=1e-4)
    assert task.product_zeros == pytest.approx(0.7, abs=0.1)
