"""A new activation is one row of the table: everything from converting to decoding works with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sparsify
from tests.conftest import SPARSIFY

PACKAGE = Path(sparsify.__file__).parent
ROW = """
        Activation(
            "rectified_swiglu",
            gate="silu",
            up="relu",
            formula="silu(gate) × max(0, up)",
            paper="none: a pair of kinds that no other row has",
            saved_values=(4, 4),
        ),
"""
OUTSIDER = """
import sys
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
block = model.model.layers[0].mlp
x = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(model.dtype)
gate, up = block.gate_proj(x), block.up_proj(x)
expected = block.down_proj(torch.nn.functional.silu(gate) * up.relu())
torch.testing.assert_close(block(x), expected)
assert not any(name.split(".")[0] == "sparsify" for name in sys.modules)
"""

CommandLine = Callable[..., str]


@pytest.fixture(scope="module")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """The command line of a copy of the package whose table has one more row."""
    root = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, root / "sparsify", ignore=ignored)
    for catalogue in ("recipes", "data_mixtures", "eval"):
        (root / catalogue).symlink_to(PACKAGE.parent / catalogue)
    table = root / "sparsify" / "models" / "activations.py"
    before, after = table.read_text().split('        Activation(\n            "reglu",')
    table.write_text(before + ROW.lstrip("\n") + '        Activation(\n            "reglu",' + after)

    def run(*arguments: object) -> str:
        result = subprocess.run(
            [*SPARSIFY, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": str(root), "COLUMNS": "200"},
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


def printed(output: str) -> dict[str, Any]:
    return json.loads(output[output.index("{") :])


@pytest.mark.slow
def test_one_row_is_enough_for_every_command(
    command_line: CommandLine,
    stock: dict[str, Path],
    recipe_file: Path,
    mixture_file: Path,
    tmp_path: Path,
) -> None:
    assert "rectified_swiglu" in command_line("convert", "--help")
    to = tmp_path / "converted"
    chosen = ("--activation", "rectified_swiglu", "--calibrate-on", mixture_file)
    tokens = ("--calibration-tokens", 8192, "--tokens", 512)
    converted = printed(command_line("convert", stock["mistral"], *chosen, *tokens, "--to", to, "--json"))
    assert converted["ffn_activation"] == "rectified_swiglu"
    # Neurons' signs are turned for every activation that rectifies up.
    assert [stage["name"] for stage in converted["stages"]][:3] == [
        "dense",
        "bare replacement",
        "signs",
    ]

    overrides = (
        "activation.ffn_activation=rectified_swiglu",
        f"mixture={mixture_file}",
        f"model.source={stock['mistral']}",
        "training.budget_tokens=1024",
        "training.count_zeros=true",
        "optimizer.warmup_tokens=0",
        f"run_dir={tmp_path / 'run'}",
        f"cache_dir={tmp_path / 'cache'}",
    )
    assert printed(command_line("plan", recipe_file, "--json", *overrides))
    command_line("train", recipe_file, "--json", *overrides)
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    zeros = [line["zeros"] for line in lines if line["kind"] == "train"]
    assert len(zeros) == 2
    assert all(0.2 < share < 0.8 for share in zeros)

    bundle = run / "export"
    report = json.loads((bundle / "sparsity" / "report.json").read_text())
    assert report["ffn_activation"] == "rectified_swiglu"
    assert "silu(gate) × max(0, up)" in (bundle / "sparsity" / "index.html").read_text()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "hf")}
    subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDER, str(bundle)],
        env=environment,
        cwd=tmp_path,
        check=True,
    )

    exact = printed(command_line("generate", bundle, "code 1:", "--tokens", 4, "--json"))
    dense = printed(command_line("generate", bundle, "code 1:", "--tokens", 4, "--dense", "--json"))
    assert exact["text"] == dense["text"]
    assert exact["ffn_bytes_per_token"] < dense["ffn_bytes_per_token"]
