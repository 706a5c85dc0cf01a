"""Every family trains under ZeRO-3 with two processes as it does without partitions, and exports what it trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsify.export.bundle import BundleSettings, export
from sparsify.recipe.recipe import Recipe
from tests.conftest import FAMILY_STOCK, Setup
from tests.models.test_families import offline_logits
from tests.ranks import prepare_run, records, replace_model, run_ranks

PROGRAM = Path(__file__).with_name("family_program.py")
STEPS = 2


@pytest.mark.slow  # two minutes for all
@pytest.mark.timeout(900)
def test_every_family_trains_partitioned_as_it_does_whole_and_its_bundle_loads(
    finished: Callable[[Setup], tuple[Path, dict]], family_stock: dict[str, Path], tmp_path: Path
) -> None:
    whole, _ = finished(Setup("mixtral", 3, 2, "bf16"))

    def change(recipe: Recipe) -> None:
        recipe.engine.zero_stage = int(Path(recipe.run_dir).name.rpartition("zero")[2])
        recipe.training.precision = "fp32"
        recipe.training.gradient_checkpointing = True
        recipe.training.budget_tokens = STEPS * recipe.step_tokens
        recipe.eval.every_tokens = recipe.checkpoint.every_tokens = recipe.training.budget_tokens
        recipe.optimizer.warmup_tokens = 0

    runs = {(kind, stage): tmp_path / f"{kind} zero{stage}" for kind in FAMILY_STOCK for stage in (1, 3)}
    for (kind, _), path in runs.items():
        replace_model(prepare_run(whole, path, change), family_stock[kind])
    run_ranks(PROGRAM, [str(path) for path in runs.values()])
    bundles, references = [], []
    for kind in FAMILY_STOCK:
        found = {}
        for stage in (1, 3):
            steps = [line for line in records(runs[kind, stage]) if line["kind"] == "train"]
            found[stage] = [(line["loss"], line["gradient_norm"]) for line in steps]
            assert len(steps) == STEPS
        for partitioned, other in zip(found[3], found[1], strict=True):
            assert partitioned == pytest.approx(other, rel=1e-4), kind
        bundle = export(runs[kind, 3], tmp_path / f"{kind} bundle", settings=BundleSettings(checked=False)).folder
        assert (bundle / f"sparse_{kind}.py").is_file()
        bundles.append(bundle)
        references.append(load_file(bundle / "training" / "reference.safetensors"))
    # In one process instead of one for each bundle, as an export does by itself.
    given = [(bundle, one["input_ids"]) for bundle, one in zip(bundles, references, strict=True)]
    for kind, found, reference in zip(FAMILY_STOCK, offline_logits(given, tmp_path), references, strict=True):
        torch.testing.assert_close(found, reference["logits"][0, -1], atol=1e-5, rtol=1e-5, msg=kind)
