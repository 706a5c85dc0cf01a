"""`sparsify bench quantisation`: what it says of a model is what that computes, at once and token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsify.bench.quantisation import bench_quantisation, decode_scores, prefill_scores, quantisation_table
from sparsify.conversion.convert import convert
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import RunError
from sparsify.mixture.sequences.held_out import sequences_from
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection
from tests.methods.conftest import Calibrate, calibrate  # noqa: F401


@pytest.fixture(scope="module")
def models(calibrate: Calibrate, stock: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:  # noqa: F811
    root = tmp_path_factory.mktemp("models")
    convert(
        ModelSection(source=str(stock["mistral"])),
        ActivationSection("swiglu"),
        root / "dense",
        seed=0,
        dtype=torch.float32,
    )
    for name, settings in (("rrs", {"smooth_group": 1}), ("quarot", {"smooth_group": None})):
        calibrate("mistral", "swiglu", root / name, method="rrs", method_settings=settings, measure=False)
    return [str(root / name) for name in ("dense", "rrs", "quarot")]


def text(folder: Path) -> str:
    path = folder / "text.txt"
    path.write_text(" ".join(f"word{i % 7} value{i % 11} number {i}" for i in range(400)))
    return str(path)


def test_models_are_measured_at_once_and_token_by_token(models: list[str], tmp_path: Path) -> None:
    lengths = {"num_tokens": 192, "sequence_length": 48}
    found = bench_quantisation(
        models,
        on=text(tmp_path),
        **lengths,
        decode_sequences=3,
        decode_length=16,
        cache_dir=tmp_path,
        on_progress=lambda line: None,
    )
    dense, rrs, quarot = found.points
    assert (found.num_sequences, found.decode_tokens) == (4, 48)
    assert (dense.prefill, dense.decode, dense.words, dense.bytes_share) == (None, None, "", 1.0)
    assert rrs.words == "W4A4 by rrs"
    assert 0.25 < rrs.bytes_share < 0.32
    assert rrs.prefill is not None
    assert rrs.decode is not None
    # With one token and groups of one channel nothing is rounded where it smooths; the others' inputs are.
    assert quarot.decode is not None
    assert abs(rrs.decode.value) < abs(quarot.decode.value) + 0.05
    sequences, _ = sequences_from(text(tmp_path), load_tokenizer(Path(models[1])), cache_dir=tmp_path, **lengths)
    model = load_sparse(Path(models[1]), dtype=torch.float32)
    scores, *_ = prefill_scores(model, sequences[:4])
    assert sum(one.value for one in scores) / sum(one.weight for one in scores) == pytest.approx(rrs.prefill_loss)
    dense_model = load_sparse(Path(models[0]), dtype=torch.float32)
    alone = prefill_scores(dense_model, sequences[:1])[0][0]
    decoded = decode_scores(dense_model, sequences[:1], 48)[0]
    assert decoded.value == pytest.approx(alone.value, rel=1e-4)  # of numbers, both are the same
    assert "W4A4 by rrs" in str(quantisation_table(found).markdown())  # pyright: ignore[reportAttributeAccessIssue]


def test_numbers_that_do_not_fit_are_refused(models: list[str], tmp_path: Path) -> None:
    options = {"on": text(tmp_path), "cache_dir": tmp_path, "on_progress": lambda line: None}
    with pytest.raises(RunError, match="--decode-length"):
        bench_quantisation(models, num_tokens=96, sequence_length=32, decode_sequences=1, decode_length=64, **options)
    with pytest.raises(RunError, match="--decode-sequences"):
        bench_quantisation(models, num_tokens=96, sequence_length=32, decode_sequences=99, decode_length=8, **options)
