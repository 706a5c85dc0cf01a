"""Bundles of quantised models: accepted by a fresh process, verified, and described by what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.errors import ExportError
from sparsify.export.bundle import BundleSettings, export
from sparsify.export.check import verify
from tests.methods.conftest import Calibrate, calibrate  # noqa: F401


@pytest.fixture(scope="module")
def quantised(calibrate: Calibrate, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("quantised") / "my_rrs"
    return calibrate("mistral", "swiglu", folder, method="rrs", method_settings={"smooth_group": 16}).folder


def test_a_bundle_is_accepted_verified_and_described(quantised: Path, tmp_path: Path) -> None:
    bundle = export(quantised, tmp_path / "bundle", settings=BundleSettings(license="apache-2.0"))
    assert bundle.acceptance is not None
    assert bundle.acceptance.logits_difference == 0
    checks = verify(tmp_path / "bundle")
    assert {check.name for check in checks} >= {"hashes", "code", "tensors", "logits"}
    assert all(check.holds for check in checks), checks
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "W4A4 by rrs" in card
    assert "license: apache-2.0" in card
    weights = tmp_path / "bundle" / "model.safetensors"
    tensors = load_file(weights)
    codes = tensors["model.layers.0.mlp.down_proj.weight_codes"]
    tensors["model.layers.0.mlp.down_proj.weight_codes"] = codes ^ torch.full_like(codes, 0x77)
    save_file(tensors, weights, metadata={"format": "pt"})
    broken = {check.name for check in verify(tmp_path / "bundle") if not check.holds}
    assert {"hashes", "logits"} <= broken


def test_settings_of_runs_are_refused(quantised: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="dtype would be ignored"):
        export(quantised, tmp_path / "bundle", settings=BundleSettings(dtype="fp32"))
    assert not (tmp_path / "bundle").exists()
