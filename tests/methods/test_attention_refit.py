"""The reconstruction of the attention's output projection: solved where it helps, stored, and left out where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.methods import base
from sparsify.methods.base import Fitted, LayerValues, MethodSettings
from sparsify.models import SiteRule
from tests.methods.conftest import Calibrate, measured


class AttentionHalf:
    """The larger half of the attention's output, and all of queries' inputs but a fifth."""

    name = "attention_half"
    paper = "none"
    Settings = MethodSettings
    reconstructs = True
    sites: ClassVar = {"attn_in.q": SiteRule(rule="top_k"), "attn_out": SiteRule(rule="top_k")}

    def __init__(self, settings: MethodSettings) -> None: ...

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        return Fitted({"kept_share": torch.tensor([0.8 if site == "attn_in.q" else 0.5])})


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_the_output_projection_is_fitted_to_what_the_attention_added_without_masks(
    kind: str, calibrate: Calibrate, stock: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(base._METHODS, AttentionHalf.name, AttentionHalf)
    found = calibrate(kind, "swiglu", tmp_path / "refitted", method="attention_half")
    plain = calibrate(kind, "swiglu", tmp_path / "plain", method="attention_half", refit=False)
    for layer in found.calibration.layers:
        assert layer["attention"]["error_refitted"] < layer["attention"]["error_before"]
        assert layer["attention"]["kept_because"] is None
    assert all("attention" not in layer for layer in plain.calibration.layers)
    masked, refitted = found.calibration.stages[1:]
    loss, _ = measured(load_sparse(plain.folder), plain)
    assert plain.calibration.stages[-1].loss == pytest.approx(loss, abs=2e-4)
    # In the first layer alone: behind it, the masked stage has the refitted layers' thresholds.
    loss, _ = measured(load_sparse(found.folder), found)
    assert refitted.loss == pytest.approx(loss, abs=2e-4)
    before, after = (load_sparse(folder).state_dict() for folder in (stock[kind], found.folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if "self_attn" in name} == {
        f"model.layers.{n}.self_attn.o_proj.weight" for n in (0, 1)
    }
    assert masked.loss != refitted.loss
