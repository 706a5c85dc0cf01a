"""Files that a command of ours wrote and a stranger may have changed: each ends in one message, as in test_fuzz.py."""

# ruff: noqa: F811  # fixtures of another module

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.conversion.convert import convert
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.export.weight_shards import write_sums
from sparsify.predictors import write_predictors
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection
from tests.cli.damage import Place
from tests.cli.test_fuzz import OUT, Ask, changed, damaged_text, ends, few, many, place  # noqa: F401
from tests.compare.conftest import Runs
from tests.compare.test_evaluations import Evaluations, evaluations  # noqa: F401
from tests.conftest import Shared
from tests.predictors.untrained import random_predictors

LOSSES = {0: {"code": 3.0, "prose": 3.5}, 2048: {"code": 2.0, "prose": 2.5}}
RECORDED = {
    "checkpoint": "step-00000002",
    "ffn_activation": "drelu",
    "precision": "bf16",
    "dtype": "bf16",
    "logits_difference": 0.0,
    "zeros": 0.9,
    "reference_tokens": 8,
}


@pytest.fixture(scope="session")
def sparse_model(shared: Shared, stock: dict[str, Path]) -> Path:
    """A converted model with predictors beside it."""

    def fill(root: Path) -> None:
        model = ModelSection(source=str(stock["mistral"]))
        convert(model, ActivationSection("drelu"), root / "model", seed=0, dtype=torch.float32)
        write_predictors(random_predictors(load_sparse(root / "model"), 0.0), root / "predictors")

    return shared("sparse_model", fill)


@pytest.fixture
def handed(place: Place, sparse_model: Path, evaluations: Evaluations, compiled: None) -> dict[str, list[str]]:
    """What a stranger might hand over, by the path of the file that was changed: the command that reads it."""
    runs = Runs(place.root)
    for name in ("a", "b"):
        runs(name, losses=LOSSES)
    results = [str(evaluations(name, {"own": [0.0, 1.0, 1.0]})) for name in ("one", "two")]
    shutil.copytree(sparse_model, place.root / "sparse")
    place.run("step-00000002")
    bundle = place.root / "bundle"
    shutil.copytree(sparse_model / "model", bundle)
    (bundle / "training").mkdir()
    shutil.copy(place.root / "run" / "recipe.yaml", bundle / "training")
    place.write("bundle/training/recorded.json", json.dumps(RECORDED))
    place.write("bundle/training/environment.json", json.dumps({"packages": {"torch": "2.0"}}))
    place.write("bundle/other.py", "")  # ends the verification before a fresh process is started
    write_sums(bundle)
    compare = ["compare", "a", "b", "--to", OUT]
    generate = ["generate", "sparse/model", "code", "--tokens", "2", "--predictors", "sparse/predictors"]
    commands = {
        "a/metrics.jsonl": compare,
        "a/mixture.lock.json": compare,
        "a/recipe.yaml": compare,
        "one/evaluations/own/results.json": ["compare", *results, "--to", OUT],
        "one/evaluations/own/items/own.jsonl": ["compare", *results, "--to", OUT],
        "sparse/predictors/predictors.json": generate,
        "run/checkpoints/step-00000002/state.json": ["report", "run"],
        "run/checkpoints/step-00000002/manifest.json": ["report", "run"],
        "bundle/training/recorded.json": ["export", "verify", "bundle"],
        "bundle/training/environment.json": ["reproduce", "bundle"],
    }
    assert all((place.root / name).is_file() for name in commands)
    return commands


def check_record(place: Place, ends: Ask, handed: dict[str, list[str]], draw: Callable[[Any], Any]) -> None:
    name = draw(st.sampled_from(sorted(handed)))
    path = place.root / name
    whole = path.read_bytes()
    lines = [line.decode() for line in whole.splitlines()] if name.endswith(".jsonl") else [whole.decode()]
    at = draw(st.integers(0, len(lines) - 1))
    if name.endswith(".yaml"):
        text = yaml.safe_dump(changed(yaml.safe_load(whole), draw), allow_unicode=True).encode("utf-8", "replace")
    else:
        lines[at] = json.dumps(changed(json.loads(lines[at]), draw))
        text = "\n".join([*lines, ""]).encode()
    if not draw(st.integers(0, 3)):
        text = damaged_text(text, draw)
    path.write_bytes(text)
    try:
        ends(handed[name])
    finally:
        path.write_bytes(whole)


def test_what_is_handed_over_whole_is_read(ends: Ask, handed: dict[str, list[str]]) -> None:
    """The cases below begin from files that the commands accept, as far as they are whole."""
    for name in ("a/metrics.jsonl", "one/evaluations/own/results.json", "sparse/predictors/predictors.json"):
        assert ends(handed[name]) == 0
    assert ends(handed["bundle/training/environment.json"]) == 0


@few
@given(data=st.data())
def test_a_record(place: Place, ends: Ask, handed: dict[str, list[str]], data: st.DataObject) -> None:
    check_record(place, ends, handed, data.draw)


@pytest.mark.slow
@settings(many, max_examples=200)
@given(data=st.data())
def test_many_records(place: Place, ends: Ask, handed: dict[str, list[str]], data: st.DataObject) -> None:
    check_record(place, ends, handed, data.draw)


BEYOND = {
    "deep": b"[" * 100_000,
    "deep enough": b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}",
    "a long number": b'{"step": ' + b"9" * 4500 + b"}",
    "no text": b"\xff\xfe\0\0",
    "a list": b"[1]",
}


@pytest.mark.parametrize("content", BEYOND.values(), ids=BEYOND)
def test_every_record_beyond_the_limits_is_refused(
    content: bytes,
    place: Place,
    ends: Ask,
    handed: dict[str, list[str]],
) -> None:
    for name, command in handed.items():
        path = place.root / name
        whole = path.read_bytes()
        path.write_bytes(content + b"\n" + (whole if name.endswith(".jsonl") else b""))
        assert ends(command) == 2, name
        path.write_bytes(whole)
