"""A mask on the attention's output is one file in `sparsify/methods/`: every command honours it, or refuses it with the reason.

The file below is put into a copy of the package, so that all processes of a command find it there, and only there.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sparsify
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import ExportError
from sparsify.export.powerinfer.rules import check_holdable
from sparsify.recipe.catalogue import folder as catalogue
from sparsify.runtime import accelerate
from tests.conftest import SPARSIFY, Command, Setup
from tests.runtime.blocks import decoded_logits

# A minute and a half: real conversions, trainings and exports.
pytestmark = pytest.mark.slow

METHOD = """
import torch
from pydantic import Field

from sparsify.methods.base import Fitted, LayerValues, MethodSettings, register
from sparsify.methods.histogram import THRESHOLD_BINS, Histogram
from sparsify.models import SiteRule


class AttentionQuantileSettings(MethodSettings):
    share: float = Field(gt=0, lt=1, description="Share of the attention's output that is dropped.")


@register
class AttentionQuantile:
    name = "attention_quantile"
    paper = "none"
    Settings = AttentionQuantileSettings
    reconstructs = False

    def __init__(self, settings: AttentionQuantileSettings) -> None:
        self._share = settings.share

    @property
    def sites(self) -> dict[str, SiteRule]:
        return {"attn_out": SiteRule(per="layer")}

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        magnitudes = Histogram(THRESHOLD_BINS, device=layer.device)
        for chunk in layer.values(site):
            magnitudes.add(chunk.values.abs())
        threshold = magnitudes.quantile(self._share)
        return Fitted({"threshold": torch.tensor([threshold], device=layer.device)}, {"threshold": threshold})
"""
CALIBRATION = ["--calibration-tokens", "2048"]
SHARE = 0.5
Sparsify = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with one more file, and nothing else that is new."""
    root = tmp_path_factory.mktemp("one_more_method")
    package = Path(sparsify.__file__).parent
    methods = root / "sparsify" / "methods"
    methods.mkdir(parents=True)
    for file in package.iterdir():
        if file.name != "methods":
            (root / "sparsify" / file.name).symlink_to(file)
    for file in (package / "methods").glob("*.py"):
        (methods / file.name).symlink_to(file)
    for name in ("recipes", "data_mixtures", "eval"):
        if not (package / "_catalogue").is_dir():
            (root / name).symlink_to(catalogue(name))
    (methods / "attention_quantile.py").write_text(METHOD)
    return root


@pytest.fixture(scope="module")
def run(root: Path) -> Sparsify:
    environment = os.environ | {"PYTHONPATH": str(root), "HOME": str(root)}

    def command(*line: object, ends: int = 0) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [*map(str, line)], env=environment, cwd=root, capture_output=True, text=True, check=False
        )
        assert result.returncode == ends, result.stdout + result.stderr
        return result

    return command


@pytest.fixture(scope="module")
def converted(run: Sparsify, root: Path, stock: dict[str, Path], mixture_file: Path) -> dict[str, Path]:
    """The dense kind as it is, and fused experts with dReLU."""
    folders = {"swiglu": root / "mistral-swiglu", "drelu": root / "mixtral-drelu"}
    for activation, folder in folders.items():
        source = stock[folder.name.partition("-")[0]]
        method = ["--method", "attention_quantile", "--set", f"share={SHARE}", "--activation", activation]
        said = run(
            *SPARSIFY, "convert", source, "--to", folder, *method, "--calibrate-on", mixture_file, *CALIBRATION
        ).stdout
        assert "with the mask" in said
        assert "Zeros at attn_out: sparsify report" in " ".join(said.split())
    return folders


def thresholds(folder: Path) -> list[torch.Tensor]:
    model = load_sparse(folder)
    assert model.config.sparsification == {
        "method": "attention_quantile",
        "sites": {"attn_out": {"rule": "threshold", "per": "layer"}},
    }
    return [layer.self_attn.o_proj.input_mask.threshold for layer in model.model.layers]  # pyright: ignore


def test_a_setting_that_it_needs_is_asked_for(run: Sparsify, root: Path, stock: dict[str, Path]) -> None:
    line = [*SPARSIFY, "convert", stock["mistral"], "--to", root / "none", "--method", "attention_quantile"]
    assert "attention_quantile needs conversion.method_settings.share" in run(*line, ends=2).stderr


def test_a_report_measures_it(run: Sparsify, converted: dict[str, Path], mixture_file: Path, root: Path) -> None:
    to = root / "report"
    options = ["--on", mixture_file, "--tokens", 2048, "--curve-tokens", 0, "--to", to]
    run(*SPARSIFY, "report", converted["swiglu"], *options)
    report = json.loads((to / "report.json").read_text())
    assert report["masks"] == {"attn_out": "layer"}
    assert report["site_zeros"]["attn_out"] == pytest.approx(SHARE, abs=0.05)
    assert report["product_zeros"] == 0


def test_training_keeps_it_to_the_export_and_a_prompt_is_continued(
    run: Sparsify, converted: dict[str, Path], command: Command, root: Path
) -> None:
    for kind, activation, stage in (("mistral", "swiglu", 1), ("mixtral", "drelu", 3)):
        folder, run_folder = converted[activation], root / f"run-{kind}"
        settings = [f"activation={activation}", f"model.source={folder}", "training.budget_tokens=1024"]
        run(*command(Setup(kind, stage, 1, "fp32"), run_folder), *settings, "tracking.wandb=disabled")
        stored, exported = thresholds(folder), thresholds(run_folder / "export")
        assert all(map(torch.equal, stored, exported))
        assert any(threshold > 0 for threshold in stored)
        lines = map(json.loads, (run_folder / "sparsity.jsonl").read_text().splitlines())
        sites = [line["sites"]["attn_out"] for line in lines]
        assert len(sites[-1]) == 2
        assert all(0.3 < zeros < 0.7 for layers in sites for zeros in layers)
        report = json.loads((run_folder / "report" / "report.json").read_text())
        assert report["site_zeros"].keys() == {"attn_out"}
        assert "exact zeros at `attn_out`" in (run_folder / "export" / "README.md").read_text()

    asked = [*SPARSIFY, "generate", root / "run-mistral" / "export", "code 1", "--tokens", 4, "--json"]
    assert json.loads(run(*asked).stdout)["new_tokens"] == 4
    assert json.loads(run(*asked, "--dense").stdout)["new_tokens"] == 4
    asked[len(SPARSIFY) + 1] = root / "run-mixtral" / "export"
    assert json.loads(run(*asked).stdout)["backend"] != "dense"


@pytest.mark.parametrize("activation", ["drelu", "swiglu"])
def test_kernels_decode_under_it(converted: dict[str, Path], activation: str) -> None:
    model = load_sparse(converted[activation])
    expected = decoded_logits(model)
    accelerate(model)
    torch.testing.assert_close(decoded_logits(model), expected, rtol=1e-4, atol=1e-5)
    for layer in model.model.layers:
        layer.self_attn.o_proj.input_mask.threshold.fill_(-torch.inf)  # pyright: ignore
    assert not torch.allclose(decoded_logits(model), expected, rtol=1e-2, atol=1e-2)


def test_engines_that_cannot_hold_it_say_so(converted: dict[str, Path]) -> None:
    with pytest.raises(ExportError, match="a mask of attention_quantile on attn_out"):
        check_holdable(load_sparse(converted["swiglu"]).config, "f16", None)
