"""`sparsify report` on stock checkpoints, its memory, and alarms of a run."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsify.commands.report import make_report, spread
from sparsify.errors import RunError
from sparsify.mixture.sequences.reader import PackedSequence
from sparsify.models import SparseModel
from sparsify.runs.load import load
from sparsify.sparsity import SparsityProbe
from sparsify.training.telemetry import RunTelemetry, Validation

BuildModel = Callable[..., SparseModel]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("\n".join(f"word{i % 7} value{i % 11} of note {i}" for i in range(200)))
    return str(path)


@pytest.mark.parametrize("kind", ["mixtral", "llama"])
def test_a_stock_model_has_error_curves(stock: dict[str, Path], text: str, tmp_path: Path, kind: str) -> None:
    report, folder = make_report(str(stock[kind]), text, 256, tmp_path / "report", curve_tokens=128)
    assert report.ffn_activation == "swiglu"
    assert report.product_zeros < 0.01
    assert report.num_tokens == 256
    assert report.curves is not None
    assert report.curves.num_tokens == 128
    elbow = next(point for point in report.curves.cett if point.target == 0.2)
    assert 0.1 < elbow.sparsity < 0.9
    assert [layer.cett for layer in elbow.layers] == pytest.approx([0.2, 0.2], abs=0.01)
    assert report.active_parameters.total == sum(
        parameter.numel() for parameter in load(str(stock[kind])).model.parameters()
    )
    assert json.loads((folder / "report.json").read_text())["schema_version"] == 2


def test_models_with_different_tokenizers_are_not_compared(stock: dict[str, Path], text: str, tmp_path: Path) -> None:
    other = shutil.copytree(stock["llama"], tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RunError, match="another tokenizer"):
        make_report(str(stock["mistral"]), text, 256, tmp_path / "report", against=str(other))


@pytest.mark.parametrize(("tokens", "curve_tokens"), [(0, 0), (8, -1)])
def test_impossible_numbers_of_tokens_are_refused(
    stock: dict[str, Path], text: str, tokens: int, curve_tokens: int
) -> None:
    with pytest.raises(RunError, match="Invalid --tokens"):
        make_report(str(stock["mistral"]), text, tokens, None, curve_tokens=curve_tokens)


def test_curves_use_every_part_of_the_text() -> None:
    numbers = torch.arange(8).numpy()
    sequences = [PackedSequence(f"source {i // 8}", numbers, numbers, numbers) for i in range(32)]
    chosen = spread(sequences, 64)
    assert len(chosen) == 8
    assert {sequence.source for sequence in chosen} == {f"source {i}" for i in range(4)}


def test_a_dying_layer_raises_one_alarm_across_a_restart(
    build_model: BuildModel,
    input_ids: torch.Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = SimpleNamespace(
        metrics=tmp_path / "m.jsonl",
        sparsity=tmp_path / "s.jsonl",
        samples=tmp_path / "t.jsonl",
    )
    recipe = SimpleNamespace(num_steps=4, step_tokens=8, tracking=SimpleNamespace(wandb="disabled"))
    model = build_model()
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp").gate_proj.weight.zero_()
        with SparsityProbe(model) as probe:
            model(input_ids)
    result = Validation(2.0, {"code": 2.0}, {"code": 0.9}, probe.statistics())
    for first_step in (0, 1):  # the second time the run resumes from its first step
        telemetry = RunTelemetry(recipe, run, first_step)
        telemetry.validation(1 + first_step, 8, result, "training")
        telemetry.close()
    alarms = [record for record in caplog.records if record.levelno == logging.WARNING]
    # The second is about the metrics of step 1, which were never written.
    assert [alarm.getMessage().startswith("Alarm layer 1 dies") for alarm in alarms] == [True, False]
    lines = [json.loads(line) for line in run.sparsity.read_text().splitlines()]
    assert [len(line["alarms"]) for line in lines] == [1, 0]
