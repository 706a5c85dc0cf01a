"""The dry run before step 1 changes no bit of what follows, and says what to do when memory runs out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsify.conversion.convert import convert
from sparsify.errors import RunError
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.sparsification import ActivationSection
from sparsify.training.dry_run import out_of_memory_named

TINY = [
    "model.architecture.hidden_size=32", "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=2", "model.architecture.num_attention_heads=4",
    "training.sequence_length=32", "training.global_batch_size=8", "training.micro_batch_size=2",
]  # fmt: skip


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_with_a_dry_run_is_bit_equal_to_one_without(tmp_path: Path, processes: int) -> None:
    overrides = [*TINY, f"launch.processes={processes}"]
    recipe = compose_recipe("quickstart_base", overrides)
    swiglu = ActivationSection("swiglu")
    convert(recipe.model, swiglu, tmp_path / "model", seed=1, dtype=torch.float32)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("dry_run_rank.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "model"), *overrides],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    for rank in ranks:
        printed, complaint = rank.communicate()
        assert rank.returncode == 0, complaint[-3000:]
        outcomes = [line.split()[1:] for line in printed.splitlines() if line.startswith("OUTCOME")]
        assert len(outcomes) == 7
        differ = [one[:2] for one in outcomes if one[2] != one[3]]
        assert not differ


@pytest.mark.usefixtures("one_rank")
def test_exhausted_memory_names_what_takes_less() -> None:
    recipe = compose_recipe("quickstart", ["engine=zero2"])
    with pytest.raises(RunError) as caught, out_of_memory_named(recipe):
        torch.empty(2**55)  # what PyTorch's own allocator says
    message = str(caught.value)
    assert message.startswith("Rank 0 ran out of memory in the dry run before step 1")
    for remedy in ("micro_batch_size=2", "gradient_checkpointing=true", "engine=zero3"):
        assert remedy in message
    with pytest.raises(RuntimeError, match="shape"), out_of_memory_named(recipe):
        torch.matmul(torch.zeros(2), torch.zeros(3, 3))  # any other error stays what it is
