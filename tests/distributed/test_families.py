"""Two training steps of families whose blocks or layers differ, under ZeRO-3 with two processes, and their export."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import SPARSIFY

pytestmark = pytest.mark.slow  # a minute each


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3_moe", "phi3"])
def test_a_family_trains_partitioned_and_its_bundle_loads(
    kind: str, recipe_file: Path, mixture_file: Path, family_stock: dict[str, Path], tmp_path: Path
) -> None:
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    overrides = [
        f"mixture={mixture_file}",
        f"model.source={family_stock[kind]}",
        "engine=zero3",
        "launch.processes=2",
        "training.budget_tokens=1024",
        "optimizer.warmup_tokens=0",
        "checkpoint.every_tokens=1024",
        "eval.every_tokens=1024",
        f"run_dir={run}",
        f"cache_dir={tmp_path / 'cache'}",
    ]
    for command in (
        ["train", str(recipe_file), *overrides],
        ["export", str(run), "--to", str(bundle)],
    ):
        result = subprocess.run([*SPARSIFY, *command], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(step.get("step", 0) for step in steps) == 2
    recorded = json.loads((bundle / "training" / "recorded.json").read_text())
    assert recorded["logits_difference"] < 1e-5
    assert (bundle / f"sparse_{kind}.py").is_file()
