"""Verification of a bundle: damage, edits and foreign predictors are found. A bundle can be reproduced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sparsify.cli.main import app
from sparsify.commands.evaluate import EvalRequest, evaluate_model
from sparsify.commands.reproduce import reproduce, reproduction
from sparsify.conversion.source_checkpoint import INDEX
from sparsify.errors import ExportError, ModelError
from sparsify.evaluation.results import RESULTS_FILE, read_results
from sparsify.export.bundle import BundleSettings, export
from sparsify.export.check import Check, refuse_broken, verify
from sparsify.export.weight_shards import SUMS, write_sums
from sparsify.predictors import read_predictors, write_predictors
from sparsify.predictors.trainer import Settings, train_predictors
from sparsify.recipe.compose import compose_recipe
from sparsify.runs.load import find_trained, load_trained
from tests.conftest import Setup

pytestmark = pytest.mark.xdist_group("runs")
Finished = Callable[[Setup], tuple[Path, dict]]


@pytest.fixture(scope="module")
def run(finished: Finished) -> Path:
    return finished(Setup("mistral", 2, 2, "bf16"))[0]


@pytest.fixture(scope="module")
def predictors(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predictors") / "own"
    found = find_trained(run)
    assert found is not None
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(3, 2048, (1, 64), generator=generator),
            "position_ids": torch.arange(64)[None],
        }
        for _ in range(4)
    ]
    settings = Settings(ranks=(8,), budget_share=1.0, passes=1)
    trained = train_predictors(load_trained(found), batches, batches, settings, text="", state_path=folder / "state")
    write_predictors(trained, folder)
    return folder


@pytest.fixture(scope="module")
def evaluations(run: Path, predictors: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Evaluations of the run, and of the run with predictors in another dtype."""
    root = tmp_path_factory.mktemp("evaluations")
    suite = root / "own.yaml"
    suite.write_text("name: own\ntasks: {python_functions: {limit: 4}}\n")
    ways = {
        "exact": EvalRequest(str(suite), to=root / "exact"),
        "masked": EvalRequest(str(suite), dtype="float32", to=root / "masked", predictors=predictors),
    }
    for asked in ways.values():
        evaluate_model(str(run), asked, "", lambda _: lambda _done, _all: None)
    return [root / name for name in ways]


@pytest.fixture(scope="module")
def bundle(
    run: Path,
    predictors: Path,
    evaluations: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A bundle of a bf16 run in fp16, in several shards, with predictors and evaluations."""
    to = tmp_path_factory.mktemp("bundle") / "bundle"
    settings = BundleSettings(
        "fp16",
        shard_gb=5e-5,
        predictors=predictors,
        license="apache-2.0",
        evaluations=evaluations,
    )
    export(run, to, settings=settings)
    return to


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundle, tmp_path / "copy")
    return tmp_path / "copy"


def broken(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.found for check in checks if not check.holds}


def test_a_complete_bundle_passes_with_any_dtype_and_shards(bundle: Path) -> None:
    index = json.loads((bundle / INDEX).read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    tensors = load_file(bundle / min(shards))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    checks = verify(bundle)
    assert [check.name for check in checks] == [
        "hashes",
        "code",
        "tensors",
        "logits",
        "sparsity",
        "predictors",
    ]
    assert broken(checks) == {}
    refuse_broken(bundle, checks)
    card = (bundle / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "`predictors/` holds predictors" in card
    assert "| all |" in card


def test_an_unchecked_bundle_says_so_and_can_be_checked_later(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "large"
    result = CliRunner().invoke(app, ["export", "write", str(run), "--to", str(to), "--unchecked"])
    assert result.exit_code == 0, result.output
    assert "Not checked. To check it, with memory for the whole model: sparsify export verify" in result.output
    card = (to / "README.md").read_text()
    assert "not checked at export" in " ".join(card.split())
    assert "Checked at export" not in card
    assert {check.name: check.holds for check in verify(to)}["logits"]
    weights = load_file(to / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    write_sums(to)  # whoever edits can do that, too
    assert "logits" in broken(verify(to))


def test_the_card_shows_evaluations_as_the_hub_reads_them(bundle: Path, evaluations: list[Path]) -> None:
    data = ModelCard.load(bundle / "README.md").data
    shown = {result.metric_name: result for result in data.eval_results}
    exact, masked = (read_results(folder).tasks[0] for folder in evaluations)
    assert shown["acc"].metric_value == pytest.approx(exact.score.value)
    assert shown["acc, masked by predictors"].metric_args["predicted_on"] == masked.predicted_on
    assert shown["acc"].metric_args["items"] == 4
    assert data.license == "apache-2.0"
    card = (bundle / "README.md").read_text()
    assert "### Suite own, bfloat16\n" in card
    assert "No task suite was run" not in card


def test_evaluations_of_other_weights_are_not_shown(run: Path, evaluations: list[Path], tmp_path: Path) -> None:
    def refused(folder: Path, words: str) -> None:
        with pytest.raises(ExportError, match=words):
            export(run, tmp_path / "out", settings=BundleSettings(evaluations=[folder]))
        assert not (tmp_path / "out").exists()

    refused(evaluations[1], "predictors that are not in the bundle")
    other = read_results(evaluations[0]).model_copy(update={"model_hash": "0" * 32})
    (tmp_path / RESULTS_FILE).write_text(other.model_dump_json())
    refused(tmp_path, "whose weights differ from those of")


@pytest.mark.slow
def test_an_edit_is_found_even_with_an_updated_hash(copy: Path) -> None:
    name = json.loads((copy / INDEX).read_text())["weight_map"]["model.layers.1.mlp.down_proj.weight"]
    tensors = load_file(copy / name)
    tensors["model.layers.1.mlp.down_proj.weight"].neg_()
    save_file(tensors, copy / name, metadata={"format": "pt"})
    write_sums(copy)
    checks = verify(copy)
    assert broken(checks).keys() == {"logits"}
    assert "has other logits" in broken(checks)["logits"]
    with pytest.raises(ExportError, match=r"differs from what was exported: logits: .*has other logits"):
        refuse_broken(copy, checks)


def test_damaged_missing_and_added_files_are_found(copy: Path) -> None:
    """The first shard is truncated, so that nothing is loaded."""
    first = min(copy.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-10])
    (copy / "tokenizer.json").unlink()
    (copy / "modeling_extra.py").write_text("")
    (copy / ".gitattributes").write_text("the Hub's own")
    found = broken(verify(copy))
    assert found["hashes"] == (f"missing tokenizer.json; added modeling_extra.py; changed {first.name}")
    assert f"{first.name} is truncated or corrupt" in found["tensors"]
    assert found["logits"] == "not computed, since the tensors do not match"


def test_a_folder_without_hashes_or_records_does_not_pass(copy: Path, tmp_path: Path) -> None:
    (copy / SUMS).unlink()
    (copy / "training" / "recorded.json").write_text("{}")
    found = broken(verify(copy))
    assert found["hashes"] == f"there is no {SUMS}"
    assert "recorded.json is not what an export measured" in found["logits"]
    with pytest.raises(ExportError, match="is not a bundle"):
        verify(tmp_path)


@pytest.mark.slow
def test_an_edited_report_and_foreign_predictors_are_found(copy: Path) -> None:
    path = copy / "sparsity" / "report.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps(report | {"product_zeros": 0.99}))
    kept = read_predictors(copy / "predictors")
    kept.facts.fingerprint = "another"
    write_predictors(kept, copy / "predictors")
    write_sums(copy)
    found = broken(verify(copy))
    assert found.keys() == {"sparsity", "predictors"}
    assert "99.0% in the report" in found["sparsity"]


def test_foreign_predictors_are_not_exported(run: Path, predictors: Path, tmp_path: Path) -> None:
    kept = read_predictors(predictors)
    kept.facts.fingerprint = "another"
    write_predictors(kept, tmp_path / "predictors")
    settings = BundleSettings(predictors=tmp_path / "predictors")
    with pytest.raises(ModelError, match="trained for other weights"):
        export(run, tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()


def test_the_printed_command_is_the_recipe_that_was_run(bundle: Path, run: Path) -> None:
    plan = reproduction(bundle, None)
    assert plan.command.startswith(f"sparsify train {bundle}/training/recipe.yaml run_dir=")
    again = compose_recipe(*plan.arguments[1:2], plan.arguments[2:])
    kept = find_trained(run)
    assert kept is not None
    recipe = kept.run.load_recipe()
    recipe.run_dir = again.run_dir
    assert again == recipe
    assert plan.differences == []


def test_other_software_versions_are_reported(copy: Path) -> None:
    path = copy / "training" / "environment.json"
    recorded = json.loads(path.read_text())
    recorded["packages"]["torch"] = "1.0"
    path.write_text(json.dumps(recorded))
    (difference,) = reproduction(copy, None).differences
    assert difference.endswith("here and was 1.0")


@pytest.mark.slow
def test_a_bundle_is_reproduced_with_the_same_data_and_loss(bundle: Path, tmp_path: Path) -> None:
    plan = reproduction(bundle, tmp_path / "again")
    same, losses = reproduce(bundle, plan)
    assert same == "The data are the same, source by source."
    report = json.loads((bundle / "sparsity" / "report.json").read_text())
    assert losses.startswith(f"Loss {report['loss']:.4f} (the bundle's report: {report['loss']:.4f})")
