"""Zeros at the inputs that a stored mask drops elements of: the planted share, in every form of the report and in training."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sparsify.models import FAMILIES, SparseMistralConfig, SparseMixtralConfig, SparseModel
from sparsify.models.masking import INPUT_SITES
from sparsify.reporting.numbers import percent
from sparsify.sparsity import SparsityProbe, measure, write_report
from sparsify.sparsity.measure import as_against
from sparsify.sparsity.report import report_summary
from tests.sparsity.conftest import SHAPE

PLANTED = {"attn_in": (2, 3, 4), "attn_out": (4, 8, 12), "ffn_in": (1, 0, 16)}
"""Channels, of 16, that each layer's mask drops of every token."""
COLUMNS = [INPUT_SITES.index(site) for site in PLANTED]
SHARES = {site: [dropped / 16 for dropped in layers] for site, layers in PLANTED.items()}
TOTALS = {site: sum(layers) / 48 for site, layers in PLANTED.items()}


def planted_model(kind: str, sites: dict[str, tuple[int, ...]] = PLANTED) -> SparseModel:
    stored = {site: {"rule": "threshold", "per": "channel"} for site in sites}
    fields = SHAPE | {"sparsification": {"method": "planted", "sites": stored} if sites else None}
    config = (
        SparseMistralConfig(**fields)
        if kind == "mistral"
        else SparseMixtralConfig(**fields, num_local_experts=4, num_experts_per_tok=2)
    )
    torch.manual_seed(0)
    model = FAMILIES[config.model_type].model(config).eval()
    for site, layers in sites.items():
        for layer, dropped in zip(model.model.layers, layers, strict=True):
            ffn = getattr(layer.mlp, "experts", layer.mlp)
            masked = {"attn_in": layer.self_attn, "attn_out": layer.self_attn.o_proj, "ffn_in": ffn}[site]
            masked.input_mask.threshold.fill_(-torch.inf)[:dropped] = torch.inf
    return model


def batch_of(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return {"input_ids": input_ids, "position_ids": positions, "labels": input_ids}


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_the_planted_share_is_in_every_form_of_the_report(kind: str, input_ids: torch.Tensor, tmp_path: Path) -> None:
    report, statistics = measure(planted_model(kind), [batch_of(input_ids)], name="planted", text="noise")
    dense, _ = measure(planted_model(kind, {}), [batch_of(input_ids)], name="plain", text="noise")
    assert dense.site_zeros == {}
    report.against = as_against(dense)
    write_report(report, statistics, tmp_path)

    said = json.loads((tmp_path / "report.json").read_text())
    assert said["site_zeros"] == TOTALS
    assert said["weight_density"] == pytest.approx(_density_by_hand(kind))
    assert said["against"]["weight_density"] == 1.0
    assert "Weight density" in said["definitions"]
    layers = [row for row in said["layers"] if row["expert"] is None]
    assert {site: [row["site_zeros"][site] for row in layers] for site in PLANTED} == SHARES
    assert all(not row["site_zeros"] for row in said["layers"] if row["expert"] is not None)
    assert {f"{site} zeros" for site in PLANTED} <= said["definitions"].keys()

    with (tmp_path / "per_layer.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["expert"]]
    assert {site: [float(row[f"{site}_zeros"]) for row in rows] for site in PLANTED} == SHARES

    console = Console(width=160)
    with console.capture() as capture:
        console.print(report_summary(report, tmp_path))
    lines = capture.get().splitlines()
    headline = next(line for line in lines if "exact zeros (swiglu" in line)
    assert "18.8% at attn_in, 50.0% at attn_out, 35.4% at ffn_in" in headline
    cells = [line.split() for line in lines if re.match(r"\s*[012]\s", line)]
    expected = [["12.5%", "25.0%", "6.2%"], ["18.8%", "50.0%", "0.0%"], ["25.0%", "75.0%", "100.0%"]]
    assert [row[4:7] for row in cells] == expected
    assert any(line.split() == ["zeros", "at", "ffn_in", "35.4%", "0%"] for line in lines)
    density = percent(said["weight_density"])
    assert f"weight density {density}" in headline
    assert any(line.split() == ["weight", "density", density, "100%"] for line in lines)

    page = (tmp_path / "index.html").read_text()
    assert "Zeros at masked inputs" in page
    assert (tmp_path / "masked_inputs.png").is_file()
    assert all(f"<th>{site} zeros</th>" in page for site in PLANTED)
    for share in SHARES["attn_out"]:
        assert f"<td>{percent(share)}</td>" in page


def _density_by_hand(kind: str) -> float:
    hidden, neurons, keys = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["hidden_size"] // 2
    experts = 2 if kind == "mixtral" else 1
    whole = 2 * hidden * hidden + 2 * hidden * keys + 3 * experts * hidden * neurons
    read = 0.0
    for attn_in, attn_out, ffn_in in zip(*SHARES.values(), strict=True):
        read += (1 - attn_in) * (hidden * hidden + 2 * hidden * keys) + (1 - attn_out) * hidden * hidden
        # Where its whole input is dropped, a block computes zeros: its gate saves the rest.
        read += experts * hidden * neurons * (2 * (1 - ffn_in) + 1 if ffn_in < 1 else 0)
    return read / (3 * whole)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_padding_does_not_count_and_counts_merge(kind: str, input_ids: torch.Tensor) -> None:
    model = planted_model(kind)
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    mask[:, 8:] = False
    found = []
    for halves in ((input_ids[:2], mask[:2]), (input_ids[2:], mask[2:])):
        with torch.no_grad(), SparsityProbe(model) as probe:
            probe.count(halves[1])
            model(halves[0], use_cache=False)
        found.append(probe.statistics())
    both = found[0].merge(found[1])
    tokens = int(mask.sum())
    assert both.site_values[:, COLUMNS].tolist() == [[16 * tokens] * 3] * 3
    assert both.site_zeros[:, COLUMNS].T.tolist() == [
        [dropped * tokens for dropped in layers] for layers in PLANTED.values()
    ]
    assert both.summary()["sites"] == SHARES


def test_recomputation_in_the_backward_pass_does_not_count(input_ids: torch.Tensor) -> None:
    model = planted_model("mistral").train()
    model.activation_checkpointing_enable()
    with SparsityProbe(model) as probe:
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
    assert probe.statistics().site_values[:, COLUMNS[1]].tolist() == [16 * input_ids.numel()] * 3
