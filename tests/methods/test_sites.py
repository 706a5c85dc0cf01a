"""Methods that this package does not know: they mask every site by every rule, and convert, storage and loading carry it.

The calibration computes layers by itself; the loaded model, from the stored mask, must give the same loss.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.methods import base
from sparsify.methods.base import Fitted, LayerValues, MethodSettings
from sparsify.models import SITES, SiteRule, mask_tensors
from sparsify.models.masking import INPUTS, site_parts
from sparsify.sparsity.probe import SparsityProbe
from tests.methods.conftest import Calibrate, measured

SHARED = [site for site in SITES if "." not in site]
ALONE = [site for site in SITES if site not in ("attn_in", "ffn_in")]
ARRANGEMENTS = {
    "thresholds": {
        site: SiteRule(per="channel" if site in ("gate", "up", "inter") else "layer", remainder=remainder)
        for site in SHARED
        for remainder in ["none" if site in ("gate", "up") else "constant"]
    },
    "projections": {
        **{site: SiteRule(per="channel", remainder="low_rank", rank=3) for site in INPUTS if site in ALONE},
        "inter": SiteRule(rule="top_k", weighted=True, remainder="constant"),
    },
    "rotated": {
        "attn_in": SiteRule(rule="top_k", weighted=True, rotated=True),
        "ffn_in": SiteRule(rule="threshold", per="channel", rotated=True),
        "gate": SiteRule(rule="top_p"),
        "up": SiteRule(rule="top_k"),
        "inter": SiteRule(rule="top_p", weighted=True),
    },
}


class EverySite:
    """A quantile of 0.3 at each site, and arbitrary numbers for all else that its rules store."""

    name = "every_site"
    paper = "none"
    Settings = MethodSettings
    reconstructs = True
    sites: dict[str, SiteRule]
    config: object

    def __init__(self, settings: MethodSettings) -> None: ...

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        rule, parts = self.sites[site], {}
        torch.manual_seed(len(site))
        for part, shape in site_parts(self.config, site, rule).items():
            kind = part.rpartition(".")[2]
            if kind == "threshold":
                parts[part] = self._quantiles(site, layer, shape)
            elif kind == "basis":
                parts[part] = torch.linalg.qr(torch.randn(shape)).Q
            elif kind in ("kept_share", "dropped_mass"):
                parts[part] = torch.full(shape, 0.7 if kind == "kept_share" else 0.3)
            else:
                parts[part] = torch.rand(shape) + 0.5 if kind == "weight" else 0.02 * torch.randn(shape)
        assert all(
            len(matrices) == max(1, len(layer.experts)) for matrices in layer.weights(site).values()
        ) or site in (
            "gate",
            "up",
        )
        return Fitted(parts)

    def _quantiles(self, site: str, layer: LayerValues, shape: tuple[int, ...]) -> torch.Tensor:
        chunks = [(chunk.number, chunk.values.abs()) for chunk in layer.values(site)]
        if shape == (1,):
            return torch.cat([values for _, values in chunks]).flatten().quantile(0.3)[None]
        if len(shape) == 1:
            return torch.cat([values for _, values in chunks]).quantile(0.3, dim=0)
        own = [[values for number, values in chunks if number == expert] for expert in range(shape[0])]
        return torch.stack([torch.cat(one).quantile(0.3, dim=0) if one else torch.zeros(shape[1]) for one in own])


@pytest.mark.parametrize("arrangement", list(ARRANGEMENTS))
@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_a_method_masks_every_site_of_a_layer(
    kind: str,
    arrangement: str,
    calibrate: Calibrate,
    stock: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(base._METHODS, EverySite.name, EverySite)
    sites = ARRANGEMENTS[arrangement]
    monkeypatch.setattr(EverySite, "sites", sites, raising=False)
    monkeypatch.setattr(EverySite, "config", AutoConfig.from_pretrained(stock[kind]), raising=False)
    found = calibrate(kind, "swiglu", tmp_path / "out", method="every_site")
    model = load_sparse(found.folder)
    stored = mask_tensors(model.config)
    assert list(stored) == [site for site in SITES if site in sites]
    buffers = dict(model.named_buffers())
    for site, parts in stored.items():
        for name, shape in parts.values():
            assert buffers[f"model.layers.1.{name}"].shape == shape
            # Masked factors make more zeros in the product than its own threshold would.
            assert site == "inter" or (buffers[f"model.layers.1.{name}"] != 0).any()
    loss, zeros = measured(model, found)
    last = found.calibration.stages[-1]
    assert [stage.name for stage in found.calibration.stages] == ["dense", "every_site", "refit"]
    assert last.loss == pytest.approx(loss, abs=2e-4)
    assert last.zeros == pytest.approx(zeros, abs=2e-3)
    dense, _ = measured(load_sparse(stock[kind]), found)
    assert abs(loss - dense) > 1e-3
    with torch.no_grad(), SparsityProbe(model) as probe:
        model(torch.arange(3, 43).view(1, -1))
    seen = probe.statistics().site_zero_shares()
    assert list(seen) == [site for site in INPUTS if site in sites]
    assert all(0.1 < share < 0.5 for share in seen.values())


class Comparing(EverySite):
    """Parts that depend on no values; before each site it computes the layer with and without masks on the sites that remain."""

    name = "comparing"
    outputs: list[dict[str, torch.Tensor]]

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        remaining = {other: self._parts(other) for other in list(self.sites)[list(self.sites).index(site) :]}
        before = layer.output({}, 100)
        self.outputs.append(
            {"all": layer.output(remaining, 100), "none": before, "site": layer.output({site: remaining[site]}, 100)}
        )
        assert torch.equal(layer.output({}, 100), before)
        return Fitted(remaining[site])

    def _parts(self, site: str) -> dict[str, torch.Tensor]:
        parts = {}
        torch.manual_seed(len(site))
        for part, shape in site_parts(self.config, site, self.sites[site]).items():
            kind = part.rpartition(".")[2]
            if kind == "threshold":
                parts[part] = torch.full(shape, 0.02)
            elif kind == "basis":
                parts[part] = torch.linalg.qr(torch.randn(shape)).Q
            else:
                parts[part] = torch.rand(shape) * 0.1 + 0.6
        return parts


@pytest.mark.parametrize("arrangement", ["thresholds", "rotated"])
@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_a_layer_computes_with_masks_that_are_not_fitted_yet_as_with_fitted_ones(
    kind: str,
    arrangement: str,
    calibrate: Calibrate,
    stock: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(base._METHODS, Comparing.name, Comparing)
    sites = {site: ARRANGEMENTS[arrangement][site] for site in SITES if site in ARRANGEMENTS[arrangement]}
    monkeypatch.setattr(Comparing, "sites", sites, raising=False)
    monkeypatch.setattr(Comparing, "config", AutoConfig.from_pretrained(stock[kind]), raising=False)
    monkeypatch.setattr(Comparing, "outputs", [], raising=False)
    found = calibrate(kind, "swiglu", tmp_path / "out", tokens=640, method="comparing", refit=False)
    first_layer = dict(zip(sites, Comparing.outputs, strict=False))
    attention = [site for site in sites if site.startswith("attn")]
    inside = [site for site in sites if site not in attention]
    for group in (attention, inside):
        for site, after in pairwise(group):
            torch.testing.assert_close(first_layer[site]["all"], first_layer[after]["all"])
            torch.testing.assert_close(first_layer[site]["site"], first_layer[after]["none"])
    # What the block's masks change is the same from in front of the attention and from inside the block.
    last, behind = first_layer[attention[-1]], first_layer[inside[0]]
    torch.testing.assert_close(last["all"] - last["site"], behind["all"] - behind["none"], atol=1e-5, rtol=1e-4)
    assert len(last["all"]) == 100
    assert (last["all"] - last["site"]).abs().max() > 1e-3
    loss, _ = measured(load_sparse(found.folder), found)
    assert found.calibration.stages[-1].loss == pytest.approx(loss, abs=2e-4)
