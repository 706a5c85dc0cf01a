"""A method that this package does not know: it masks every site, and convert, storage and loading carry it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.methods import base
from sparsify.methods.base import Fitted, LayerValues, MethodSettings
from sparsify.models import SITES, SiteRule, mask_tensors
from tests.methods.conftest import Calibrate, measured


class Settings(MethodSettings):
    """A share for every site."""

    share: float = 0.3


class EverySite:
    """A quantile at each site: one number on inputs, one for each channel (of each expert) inside blocks."""

    name = "every_site"
    paper = "none"
    Settings = Settings
    reconstructs = True

    def __init__(self, settings: Settings) -> None:
        self._share = settings.share

    @property
    def sites(self) -> dict[str, SiteRule]:
        inside = ("gate", "inter")
        return {site: SiteRule(per="channel" if site in inside else "layer") for site in SITES}

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        values: dict[int, list[torch.Tensor]] = {}
        for chunk in layer.values(site):
            values.setdefault(chunk.number, []).append(chunk.values.abs())
        found = {number: torch.cat(parts) for number, parts in values.items()}
        if self.sites[site].per == "layer":
            return Fitted(found[0].flatten().quantile(self._share)[None])
        width = next(iter(found.values())).shape[1]
        unseen = torch.zeros(width)
        experts = [
            found[number].quantile(self._share, dim=0) if number in found else unseen
            for number in range(len(layer.experts))
        ]
        return Fitted(torch.stack(experts))


@pytest.fixture
def every_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base._METHODS, EverySite.name, EverySite)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_a_method_masks_every_site_of_a_layer(
    kind: str, calibrate: Calibrate, every_site: None, stock: dict[str, Path], tmp_path: Path
) -> None:
    found = calibrate(kind, "swiglu", tmp_path / "out", method="every_site")
    model = load_sparse(found.folder)
    assert list(mask_tensors(model.config)) == list(SITES)
    buffers = dict(model.named_buffers())
    for name, shape in mask_tensors(model.config).values():
        threshold = buffers[f"model.layers.1.{name}"]
        assert threshold.shape == shape
        assert (threshold > 0).any()
    loss, zeros = measured(model, found)
    last = found.calibration.stages[-1]
    assert [stage.name for stage in found.calibration.stages] == ["dense", "every_site", "refit"]
    assert last.loss == pytest.approx(loss, abs=2e-4)
    assert last.zeros == pytest.approx(zeros, abs=2e-3)
    dense, _ = measured(load_sparse(stock[kind]), found)
    assert abs(loss - dense) > 1e-3
