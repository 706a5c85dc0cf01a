"""A run never trains from, nor exports, a converted model or tokenizer whose files are not as they were written."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from sparsify.commands.run import _repair
from sparsify.conversion.convert import convert
from sparsify.conversion.manifest import MANIFEST, damage, present_files
from sparsify.errors import RunError
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection
from sparsify.runs.load import find_trained
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.state import STATE

CHECKPOINT = "checkpoints/step-00000002"


class Converted:
    """A run's `initial`, the source that it is of, and how it is made."""

    def __init__(self, stock: Path, root: Path) -> None:
        self.source = root / "source"
        shutil.copytree(stock, self.source)
        self.run = RunFolder(root / "run")
        model, activation = ModelSection(source=str(self.source)), ActivationSection("drelu")
        self.make = partial(convert, model, activation, seed=0, dtype=torch.float32)
        self.make(self.run.initial)

    def train(self) -> None:
        (self.run.path / CHECKPOINT).mkdir(parents=True)
        (self.run.path / CHECKPOINT / STATE).write_text("{}")


@pytest.fixture
def converted(stock: dict[str, Path], tmp_path: Path) -> Converted:
    return Converted(stock["mistral"], tmp_path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (lambda initial: flip(initial / "model.safetensors"), "the content of model.safetensors"),
    "tokenizer": (lambda initial: flip(initial / "tokenizer.json"), "the content of tokenizer.json"),
    "configuration": (lambda initial: (initial / "config.json").write_text("{"), "config.json has 1 bytes"),
    "lost file": (lambda initial: (initial / "tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
    "lost manifest": (lambda initial: (initial / MANIFEST).unlink(), f"{MANIFEST} is missing"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_initial_is_named_and_made_again_with_the_same_bytes(
    what: str, converted: Converted, caplog: pytest.LogCaptureFixture
) -> None:
    run, (harm, said) = converted.run, DAMAGES[what]
    before = present_files(run.initial)
    _repair(run, run.initial, converted.make)
    assert caplog.messages == []
    converted.train()
    harm(run.initial)
    with caplog.at_level(logging.WARNING):
        _repair(run, run.initial, converted.make)
    (message,) = caplog.messages
    assert f"{run.initial} is damaged: {said}" in message
    assert damage(run.initial) is None
    assert present_files(run.initial) == before
    assert {path.name for path in run.path.iterdir()} == {"initial", "checkpoints"}


def test_before_the_first_checkpoint_a_damaged_initial_is_removed(converted: Converted) -> None:
    flip(converted.run.initial / "model.safetensors")
    _repair(converted.run, converted.run.initial, None)
    assert not converted.run.initial.exists()


@pytest.mark.parametrize("source", ["other", "gone", "calibrated"])
def test_what_a_run_trained_from_is_not_replaced_by_anything_else(source: str, converted: Converted) -> None:
    run = converted.run
    converted.train()
    flip(run.initial / "model.safetensors")
    before = present_files(run.initial)
    if source == "other":
        flip(converted.source / "model.safetensors")
    elif source == "gone":
        shutil.rmtree(converted.source)
    with pytest.raises(
        RunError, match=r"the content of model.safetensors(.|\n)*cannot be made again(.|\n)*Restore"
    ) as caught:
        _repair(run, run.initial, None if source == "calibrated" else converted.make)
    why = {"other": "its source gives other files now", "gone": str(converted.source), "calibrated": "a calibration"}
    assert why[source] in str(caught.value)
    assert ".." not in caught.value.given
    assert present_files(run.initial) == before
    assert {path.name for path in run.path.iterdir()} == {"initial", "checkpoints"}


def test_a_damaged_tokenizer_of_a_run_is_not_read(converted: Converted) -> None:
    converted.train()
    checkpoint = converted.run.path / CHECKPOINT
    assert find_trained(checkpoint) is not None
    flip(converted.run.initial / "tokenizer.json")
    with pytest.raises(RunError, match=r"the content of tokenizer.json(.|\n)*`sparsify train` with the same recipe"):
        find_trained(checkpoint)
