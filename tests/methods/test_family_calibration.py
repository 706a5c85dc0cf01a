"""Calibration of every family: what a layer-by-layer pass measures is what the whole model computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsify.conversion.sparse_folder import load_sparse
from tests.conftest import FAMILY_STOCK
from tests.methods.conftest import Calibrate, measured

OWN = {"gemma3_text": "geglu"}


@pytest.mark.parametrize("kind", FAMILY_STOCK)
def test_every_family_is_calibrated_as_it_computes(
    kind: str, calibrate: Calibrate, family_stock: dict[str, Path], tmp_path: Path
) -> None:
    found = calibrate(str(family_stock[kind]), "drelu", tmp_path / "out")
    stages = {stage.name: stage for stage in found.calibration.stages}
    models = {
        "dense": load_sparse(family_stock[kind]),
        "bare replacement": load_sparse(family_stock[kind], "drelu"),
        "refit": load_sparse(found.folder),
    }
    for name, model in models.items():
        assert stages[name].loss == pytest.approx(measured(model, found)[0], abs=5e-4), name
    errors = [one for layer in found.calibration.layers for one in layer["experts"] if one["kept_because"] is None]
    assert errors
    assert all(one["error_refitted"] < one["error_before"] for one in errors)


@pytest.mark.parametrize("kind", ["qwen2", "olmo3", "gemma3_text", "phi3"])
def test_a_mask_of_attention_and_block_is_measured_as_the_model_computes_it(
    kind: str, calibrate: Calibrate, family_stock: dict[str, Path], tmp_path: Path
) -> None:
    found = calibrate(
        str(family_stock[kind]), OWN.get(kind, "swiglu"), tmp_path / "out", method="teal", target_zeros=0.4
    )
    last = found.calibration.stages[-1]
    model = load_sparse(found.folder)
    assert {"attn_in.q", "attn_out", "inter"} <= set(model.config.sparsification["sites"])
    assert last.loss == pytest.approx(measured(model, found)[0], abs=5e-4)
