"""Output and errors of `sparsify compare`."""

from __future__ import annotations

import base64
import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify.compare import compare, read_comparison, write_comparison
from sparsify.compare.figures import draw_setting, figures_of
from sparsify.errors import RunError, StorageError
from sparsify.reporting.plotting import DARK, LIGHT
from tests.compare.conftest import Runs

Command = Callable[..., tuple[int, str, str]]
TWO = {"code": 2.0, "prose": 3.0, "questions": 2.5}


def test_the_command_writes_a_whole_folder(sweep: list[Path], sparsify: Command) -> None:
    code, out, _ = sparsify("compare", *sweep)

    assert code == 0
    to = sweep[0].parents[1] / "comparisons" / "quickstart,instruction_token_share"
    assert "comparisons/quickstart,instruction_token_share/index.html" in out
    assert "share=stated" in out
    assert "does not train on questions" in out
    assert {path.name for path in to.iterdir()} == {
        "index.html",
        "comparison.json",
        "comparison.csv",
        "setting.png",
        "loss.png",
        "zeros.png",
    }
    with (to / "comparison.csv").open(newline="") as file:
        first, second, _ = csv.DictReader(file)
    assert first["mixture.instruction_token_share"] == "0.0"
    assert float(second["loss"]) == pytest.approx(2.4)
    assert second["loss_comparable"] == "False"
    assert float(second["gap_to_baseline"]) == pytest.approx(0.5)
    assert (second["loss:questions"], first["loss:questions"]) == ("2.5", "")
    assert float(second["token_share:questions"]) == pytest.approx(0.2)
    assert second["baseline"] == str(sweep[1] / "baseline")

    command = f"sparsify compare {' '.join(map(str, sweep))}"
    expected = compare(sweep)
    expected.command = command
    assert read_comparison(to) == expected
    page = (to / "index.html").read_text()
    assert command in page
    assert "instruction_token_share: 0, 0.2, 0.5" in page
    assert page.count("data:image/svg+xml;base64,") == 2 * 3
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    drawings = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", page)]
    assert len(set(drawings)) == 6
    assert all(drawing.lstrip().startswith(b"<?xml") for drawing in drawings)


def test_json_is_the_file_and_a_page_is_replaced(runs: Runs, sparsify: Command) -> None:
    activations = ("drelu", "reglu")
    first, second = (runs(name, f"activation={name}", losses={20480: TWO}) for name in activations)
    to = runs.root.parent / "mine"
    assert sparsify("compare", first, second, "--to", to)[0] == 0
    code, out, _ = sparsify("compare", second, first, "--to", to, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((to / "comparison.json").read_text())
    assert [run["name"] for run in json.loads(out)["runs"]] == ["reglu", "drelu"]
    assert json.loads(out)["schema_version"] == 1


def test_the_figure_of_a_sweep_shows_its_numbers(sweep: list[Path]) -> None:
    figure = draw_setting(compare([sweep[2], sweep[0], sweep[1]]), LIGHT)

    drawn: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len({round(high - low, 9) for low, high in (axes.get_ylim() for axes in panels)}) == 1
    for axes in panels:
        line, _points = axes.get_lines()
        spot = axes.get_subplotspec()
        assert spot is not None
        name = ("code", "prose", "questions", "unweighted mean")[spot.colspan.start]
        points = zip(line.get_xdata(), line.get_ydata(), strict=True)
        drawn[name, line.get_linestyle() == "--"] = list(points)
    sparse = {
        "code": [(0, 2.0), (0.2, 2.1), (0.5, 2.4)],
        "prose": [(0, 3.0), (0.2, 3.2), (0.5, 3.3)],
        "questions": [(0.2, 2.5), (0.5, 2.0)],
        "unweighted mean": [(0.2, 2.6), (0.5, 7.7 / 3)],
    }
    for name, line in sparse.items():
        assert drawn[name, False] == [pytest.approx(point) for point in line]
        below = [(value, loss - 0.5) for value, loss in line]
        assert drawn[name, True] == [pytest.approx(point) for point in below]
    assert len(drawn) == 8


def test_unfinished_runs_are_not_points_of_a_sweep(runs: Runs) -> None:
    rates = (1e-4, 1e-3, 1e-2)
    paths = [
        runs(
            f"rate={rate}",
            f"optimizer.peak_learning_rate={rate}",
            losses={20480 if rate < 1e-2 else 10240: TWO},
        )
        for rate in rates
    ]
    comparison = compare(paths)
    assert comparison.swept_setting == "optimizer.peak_learning_rate"
    line, _ = draw_setting(comparison, LIGHT).axes[0].get_lines()
    assert list(line.get_xdata()) == [1e-4, 1e-3]


def test_seeds_repeat_the_points_of_a_sweep(runs: Runs) -> None:
    code = {(1e-4, 1): 2.0, (1e-4, 2): 2.2, (1e-3, 1): 1.5, (1e-3, 2): 1.6}
    paths = [
        runs(
            f"q,rate={rate},seed={seed}",
            f"optimizer.peak_learning_rate={rate}",
            f"training.seed={seed}",
            losses={20480: {**TWO, "code": loss}},
        )
        for (rate, seed), loss in code.items()
    ]
    comparison = compare(paths)
    assert comparison.swept_setting == "optimizer.peak_learning_rate"
    line, points = draw_setting(comparison, LIGHT).axes[0].get_lines()
    assert list(line.get_ydata()) == pytest.approx([2.1, 1.55])
    assert list(points.get_ydata()) == pytest.approx([2.0, 2.2, 1.5, 1.6])
    caption = figures_of(comparison)[0].caption(comparison)
    # (1.55 + 3.0 + 2.5) / 3
    assert "The unweighted mean is lowest, 2.350, at 0.001." in caption
    assert "Points are runs; lines connect the means over training.seed" in caption


def test_a_diverged_run_is_shown_as_one(runs: Runs, tmp_path: Path) -> None:
    nan = dict.fromkeys(TWO, math.nan)
    losses = {0: {0: TWO, 20480: TWO}, 1: {0: TWO, 20480: nan}}
    paths = [runs(f"seed={i}", f"training.seed={i}", losses=losses[i]) for i in losses]
    comparison = compare(paths)
    write_comparison(comparison, tmp_path / "out")
    again = read_comparison(tmp_path / "out")
    assert math.isnan(again.runs[1].loss)
    assert again.runs[0].loss == pytest.approx(2.3)
    assert "nan" in (tmp_path / "out" / "index.html").read_text()
    for theme in (LIGHT, DARK):
        for figure in figures_of(again):
            figure.draw(again, theme).draw_without_rendering()


def test_runs_without_anything_in_common_still_have_a_table(runs: Runs, tmp_path: Path) -> None:
    fingerprints = {source: f"other {source}" for source in TWO}
    paths = [
        runs("a <b>", "training.seed=2", losses={20480: TWO}),
        runs("b", losses={20480: TWO}, fingerprints=fingerprints),
    ]
    comparison = compare(paths)
    assert not any(run.loss_comparable for run in comparison.runs)
    write_comparison(comparison, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"index.html", "comparison.json", "comparison.csv", "zeros.png"}
    assert "a &lt;b&gt;" in (tmp_path / "out" / "index.html").read_text()


def test_invalid_arguments_are_refused(runs: Runs, sparsify: Command, tmp_path: Path) -> None:
    path = runs("quickstart", losses={20480: TWO})
    other = runs("quickstart,seed=2", "training.seed=2", losses={20480: TWO})
    empty = runs("quickstart,seed=3", "training.seed=3", losses={}, zeros=0)
    (empty / "metrics.jsonl").write_text("")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")

    def refused(*arguments: object) -> str:
        code, out, err = sparsify("compare", *arguments)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
        return err

    assert "notes is not a run folder: it has no recipe.yaml" in refused(path, "notes")
    message = refused(path, tmp_path / "runs" / "quickstrat")
    assert "There is no such run folder" in message
    assert "Did you mean 'quickstart'?" in message
    message = refused(path, empty)
    assert "seed=3 has no validation loss yet" in message
    message = refused(path)
    assert "is a single run without a baseline to compare it with" in message
    assert "baseline.ffn_activation=swiglu" in message
    assert "is given twice" in refused(path, other, path.parent / "x" / ".." / "quickstart")
    message = refused(path, other, "--to", "notes")
    assert "notes exists and is not a comparison" in message
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "comparisons").exists()


def test_a_folder_of_something_else_is_never_replaced(runs: Runs, tmp_path: Path) -> None:
    paths = [runs(f"seed={i}", f"training.seed={i}", losses={20480: TWO}) for i in (1, 2)]
    with pytest.raises(StorageError, match="is not a comparison"):
        write_comparison(compare(paths), paths[0])
    assert (paths[0] / "recipe.yaml").is_file()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison.json").write_text('{"schema_version": 7}')
    with pytest.raises(RunError, match="not a comparison of schema version 1"):
        read_comparison(tmp_path / "out")
