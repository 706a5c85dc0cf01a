"""What holds for every mask of thresholds and shares that is fitted without training: dense at a share of 0, the wanted zeros elsewhere,
the same bits after an interruption, and one message for a bad setting.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import RecipeError
from sparsify.methods.base import method_of
from sparsify.mixture.sequences.reader import collate
from sparsify.models import SparseModel
from sparsify.recipe.sparsification import ConversionSection
from sparsify.sparsity.probe import SparsityProbe
from tests.methods.conftest import Calibrate, Calibrated, killed_after, measured
from tests.runtime.blocks import IDS

MASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "cats": ("cats", {}),
    "chess": ("chess", {"attention": True}),
    "countdown": ("countdown", {}),
    "prox": ("prox", {}),
    "teal": ("teal", {}),
    "teal-greedy": ("teal", {"allocation": "greedy", "greedy_step": 0.3}),
    "topk": ("topk", {"score": "output_norm"}),
    "top_p": ("top_p", {}),
    "top_p-ffn_in": ("top_p", {"site": "ffn_in"}),
}


@pytest.fixture(scope="module")
def watched(mixture_file: Path, stock: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Calibrate:
    """With more text to measure on: the input of o depends on how long the texts are."""
    return Calibrate(mixture_file, stock, tmp_path_factory.mktemp("watched"), watched_sequences=16)


def zeros_of(model: SparseModel, found: Calibrated) -> dict[str, float]:
    """Realised zeros of each masked site on text that took no part."""

    with torch.no_grad(), SparsityProbe(model) as probe:
        for sequences in found.watched.values():
            batch = collate(sequences)
            model(**{key: batch[key] for key in ("input_ids", "position_ids")}, use_cache=False)
    seen = probe.statistics()
    factors = {"gate": seen.zero_share("gate"), "up": seen.zero_share("up"), "inter": seen.zero_share("product")}
    every = factors | seen.site_zero_shares()
    return {site: every[site] for site in model.config.sparsification["sites"]}


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_held_out_text_has_the_wanted_zeros(mask: str, kind: str, watched: Calibrate, tmp_path: Path) -> None:
    name, settings = MASKS[mask]
    found = watched(kind, "swiglu", tmp_path / "out", method=name, target_zeros=0.5, method_settings=settings)
    assert [stage.name for stage in found.calibration.stages] == ["dense", name]
    model = load_sparse(found.folder)
    zeros = zeros_of(model, found)
    if mask != "teal-greedy":
        assert all(share == pytest.approx(0.5, abs=0.03) for share in zeros.values()), zeros
    else:
        assert max(zeros.values()) - min(zeros.values()) > 0.1
        for site, share in zeros.items():
            wanted = [layer[f"{site}_zeros"] for layer in found.calibration.layers]
            assert share == pytest.approx(sum(wanted) / len(wanted), abs=0.03)
    loss, _ = measured(model, found)
    assert found.calibration.stages[-1].loss == pytest.approx(loss, abs=2e-4)


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_a_share_of_0_is_the_dense_model_bit_by_bit(
    mask: str, kind: str, calibrate: Calibrate, stock: dict[str, Path], tmp_path: Path
) -> None:
    name, settings = MASKS[mask]
    found = calibrate(
        kind, "swiglu", tmp_path / "out", tokens=640, method=name, target_zeros=0.0, method_settings=settings
    )
    assert torch.equal(load_sparse(found.folder)(IDS).logits, load_sparse(stock[kind])(IDS).logits)


def test_a_killed_conversion_resumes_to_the_same_bits(
    calibrate: Calibrate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, method_settings = MASKS["teal-greedy"]
    settings = {"method": name, "target_zeros": 0.5, "method_settings": method_settings}
    whole = calibrate("mixtral", "swiglu", tmp_path / "whole", **settings)
    caplog.set_level(logging.INFO, "sparsify")
    with killed_after("Layer 1"):
        calibrate("mixtral", "swiglu", tmp_path / "out", **settings)
    caplog.clear()
    again = calibrate("mixtral", "swiglu", tmp_path / "out", **settings)
    assert "Layer 1" not in caplog.text
    assert again.calibration == whole.calibration
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (again.folder, whole.folder))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_experts_with_few_tokens_are_named(
    calibrate: Calibrate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sparsify")
    found = calibrate("mixtral", "swiglu", tmp_path / "out", tokens=640, method="chess", target_zeros=0.5)
    pooled = found.calibration.layers[0]["pooled_experts"]
    counts = [expert["num_tokens"] for expert in found.calibration.layers[0]["experts"]]
    assert pooled == [number for number, count in enumerate(counts) if count < 256]
    assert pooled
    assert f"the layer's mean in the mask: experts {', '.join(map(str, pooled))}" in caplog.text


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("cats", {}, "cats needs conversion.target_zeros"),
        ("cats", {"target_zeros": 1.0}, "conversion.target_zeros is 1.0: input should be less than 1"),
        ("chess", {"target_zeros": 0.5, "method_settings": {"up_statistic": "mean"}}, "'rms' or 'mean_abs'"),
        (
            "teal",
            {"target_zeros": 0.5, "method_settings": {"greedy_step": 0.05}},
            "would be ignored: allocation is uni",
        ),
        ("topk", {"target_zeros": 0.5, "method_settings": {"site": "gate"}}, "topk has no such setting"),
        ("top_p", {"target_zeros": 0.5, "method_settings": {"site": "attn_in"}}, "'inter', 'gate', 'up' or 'ffn_in'"),
    ],
)
def test_what_it_cannot_be_is_refused(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        method_of(ConversionSection(method=method, **settings))
