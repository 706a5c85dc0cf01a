from __future__ import annotations

import base64
import csv
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.errors import RunError, StorageError
from sparsify.models import SparseModel
from sparsify.reporting.numbers import percent
from sparsify.runs.history import Stage, Trajectory, TrajectoryPoint
from sparsify.sparsity import (
    ActivationStatistics,
    SparsityReport,
    measure,
    read_report,
    write_report,
)
from sparsify.sparsity.curves import measure_curves
from sparsify.sparsity.measure import as_against, summed_loss
from sparsify.sparsity.scaling import fit_trajectory

BuildModel = Callable[..., SparseModel]
Measured = tuple[SparsityReport, ActivationStatistics]


@pytest.fixture
def measured(build_model: BuildModel, input_ids: torch.Tensor) -> Measured:
    return _measure(build_model("mistral"), input_ids)


def _measure(model: SparseModel, input_ids: torch.Tensor) -> Measured:
    batches = [_batch(half) for half in input_ids.split(2)]
    return measure(model, batches, name="tiny <b>model</b>", text="noise & more", sources=["code", "prose"])


def _batch(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return {"input_ids": input_ids, "position_ids": positions, "labels": input_ids}


def _with_training(report: SparsityReport) -> SparsityReport:
    points = [
        TrajectoryPoint(
            tokens=step * 1000,
            loss=4.0 - step / 10,
            zeros=0.9 - 0.3 * math.exp(-step / 3),
            layers=[0.6, 0.7, 0.8],
        )
        for step in range(9)
    ]
    stages = [Stage(name="dense base", loss=2.0), Stage(name="after training", loss=2.1, zeros=0.8)]
    trajectory = Trajectory(sparse=points, baseline=[TrajectoryPoint(tokens=0, loss=2.5, zeros=0.0)])
    scaling = fit_trajectory(trajectory, "drelu")
    return report.model_copy(update={"stages": stages, "trajectory": trajectory, "scaling": scaling})


def test_a_complete_report_of_a_mixture_of_experts(
    build_model: BuildModel, input_ids: torch.Tensor, tmp_path: Path
) -> None:
    model = build_model("mixtral")
    report, statistics = _measure(model, input_ids)
    report = _with_training(report)
    report.curves = measure_curves(model, [_batch(input_ids)], summed_loss)
    report.against = as_against(report.model_copy(update={"model": "the <other>"}))
    report.command = "sparsify report runs/tiny"
    to = tmp_path / "new" / "report"
    write_report(report, statistics, to)

    assert read_report(to) == report
    figures = {"stages", "layers", "experts", "causes", "positions", "firing_rates", "unions"}
    figures |= {"trajectory", "layers_over_time", "sources", "cett", "perplexity", "scaling"}
    assert {path.name for path in to.iterdir()} == {
        "report.json",
        "per_layer.csv",
        "index.html",
        *(f"{figure}.png" for figure in figures),
    }
    assert [path.name for path in to.parent.iterdir()] == ["report"]
    page = (to / "index.html").read_text()
    _assert_needs_no_other_file(page, num_figures=len(figures))
    assert "tiny &lt;b&gt;model&lt;/b&gt;" in page
    assert "noise &amp; more" in page
    assert "Against the &lt;other&gt;" in page
    assert "TurboSparse-Mistral-7B is published as 2.50B" in page
    for part in report.active_parameters.parts:
        assert f"<td>{part.part}</td>" in page or not part.total
    assert "sparsify report runs/tiny" in page
    assert percent(report.product_zeros) in page.replace("&gt;", ">").replace("&lt;", "<")
    assert all(term in page for term in report.definitions)

    with (to / "per_layer.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * (1 + 4)
    assert [row["expert"] for row in rows[:5]] == ["", "0", "1", "2", "3"]
    shares = [float(row["product_zeros"]) for row in rows if row["product_zeros"]]
    assert shares == [row.product_zeros for row in report.layers if row.product_zeros is not None]


def _assert_needs_no_other_file(page: str, num_figures: int) -> None:
    assert not re.search(r"https?://|<link|<script|@import|url\(", page)
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) == 2 * num_figures  # light and dark
    assert len(set(sources)) == len(sources)
    for source in sources:
        head, data = source.split(",")
        assert head == "data:image/svg+xml;base64"
        assert b"<svg" in base64.b64decode(data)


def test_dense_report_has_only_the_figures_that_apply(measured: Measured, tmp_path: Path) -> None:
    write_report(*measured, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    _assert_needs_no_other_file(page, num_figures=6)
    assert not (tmp_path / "report" / "experts.png").exists()


def test_a_new_report_replaces_the_old_one(measured: Measured, tmp_path: Path) -> None:
    report, statistics = measured
    write_report(report, statistics, tmp_path)
    first = (tmp_path / "layers.png").read_bytes()
    (tmp_path / "stages.png").write_text("of an older report")
    write_report(report.model_copy(update={"loss": 1.25}), statistics, tmp_path)
    assert read_report(tmp_path).loss == 1.25
    assert not (tmp_path / "stages.png").exists()
    assert (tmp_path / "layers.png").read_bytes() == first


def test_a_folder_of_other_files_is_refused(measured: Measured, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match="not a sparsity report"):
        write_report(*measured, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_unwritable_folder_is_a_user_error(measured: Measured, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(*measured, tmp_path / "file" / "report")


def test_diverged_model_can_be_reported(measured: Measured, tmp_path: Path) -> None:
    report, statistics = measured
    stages = [Stage(name="before", loss=2.0), Stage(name="after", loss=math.nan)]
    report = report.model_copy(update={"loss": math.inf, "stages": stages})
    write_report(report, statistics, tmp_path / "report")
    again = read_report(tmp_path / "report")
    assert again.loss == math.inf
    assert math.isnan(again.stages[1].loss)


def test_missing_or_damaged_reports_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not hold a sparsity report"):
        read_report(tmp_path)
    for content in ("{", '{"schema_version": 99}'):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(RunError, match="not a sparsity report of schema version 2"):
            read_report(tmp_path)


@given(st.floats(0, 1))
def test_rounding_never_gives_0_or_100_percent(share: float) -> None:
    text = percent(share)
    assert (text == "0%") == (share == 0)
    assert (text == "100%") == (share == 1)
    assert text not in ("0.0%", "100.0%")
