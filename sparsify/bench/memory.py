"""`sparsify bench memory`: the plan's memory against measured peaks, over real engines in processes of their own.

Peak memory of a piece of work: run in a process of its own, since a process has only one peak.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, computed_field
from rich.table import Table

from sparsify.conversion.convert import convert
from sparsify.plan.estimate import architecture_of
from sparsify.plan.memory import memory
from sparsify.plan.parameters import count_parameters
from sparsify.recipe.compose import compose_recipe, save_recipe
from sparsify.recipe.recipe import DistillationSection, Recipe
from sparsify.runs.run_folder import RunFolder

SHAPE = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 8192,
}  # fmt: skip
EXPERTS = {
    "model_type": "mixtral", "num_hidden_layers": 4, "intermediate_size": 512, "+num_local_experts": 4,
    "+num_experts_per_tok": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One configuration: the model's kind and what memory depends on."""

    kind: str
    zero_stage: int
    precision: str
    processes: int
    micro_batch_size: int = 2
    gradient_checkpointing: bool = False
    reduce_bucket_elements: int = 2_000_000
    sequence_length: int = 128
    distills: bool = False

    def __str__(self) -> str:
        recomputes = ", checkpointing" if self.gradient_checkpointing else ""
        recomputes += ", distilling" if self.distills else ""
        return (
            f"{self.kind}, ZeRO-{self.zero_stage}, {self.precision}, {self.processes} process(es), "
            f"{self.micro_batch_size} x {self.sequence_length}, bucket {self.reduce_bucket_elements:.0e}{recomputes}"
        )

    def overrides(self) -> list[str]:
        """What makes the quickstart's recipe this trial."""
        shape = SHAPE | (EXPERTS if self.kind == "mixtral" else {})
        architecture = [
            f"{'+' * key.startswith('+')}model.architecture.{key.lstrip('+')}={value}"
            for key, value in shape.items()
        ]
        return [
            *architecture,
            "optimizer.warmup_tokens=0",
            f"engine.zero_stage={self.zero_stage}",
            f"engine.reduce_bucket_elements={self.reduce_bucket_elements}",
            f"launch.processes={self.processes}",
            f"training.precision={self.precision}",
            f"training.sequence_length={self.sequence_length}",
            f"training.global_batch_size={2 * self.processes * self.micro_batch_size}",
            f"training.micro_batch_size={self.micro_batch_size}",
            f"training.gradient_checkpointing={str(self.gradient_checkpointing).lower()}",
        ]


FEW = (
    Trial("mistral", 1, "bf16", 1),
    Trial("mixtral", 2, "fp32", 1, micro_batch_size=8),
)
"""What a test has time for."""
GRID = (
    *(Trial("mistral", 0, "fp32", processes) for processes in (1, 2)),
    *(
        Trial("mistral", stage, precision, processes)
        for stage in (1, 2, 3)
        for precision in ("fp32", "bf16")
        for processes in (1, 2)
    ),
    *(Trial("mixtral", stage, "bf16", 2) for stage in (1, 2, 3)),
    Trial("mixtral", 2, "fp32", 1, micro_batch_size=8),
    *(
        Trial("mistral", stage, "fp32", 1, micro_batch_size=16, gradient_checkpointing=recomputes)
        for stage in (1, 3)
        for recomputes in (False, True)
    ),
    Trial("mistral", 2, "bf16", 1, micro_batch_size=16, gradient_checkpointing=True),
    Trial("mistral", 1, "fp32", 1, reduce_bucket_elements=50_000_000),
    Trial("mistral", 1, "bf16", 1, micro_batch_size=4, sequence_length=512),
    *(
        Trial(
            kind,
            stage,
            precision,
            1,
            micro_batch_size=8,
            gradient_checkpointing=stage == 2,
            distills=True,
        )
        for kind, stage, precision in (
            ("mistral", 1, "fp32"),
            ("mistral", 2, "bf16"),
            ("mixtral", 3, "bf16"),
        )
    ),
)


class Measured(BaseModel):
    """One trial's outcome.

    Attributes:
        trial: In words.
        moment: Where the plan expects the peak.
        predicted_bytes: The plan's tensors of one process, without its allowance.
        measured_bytes: Most bytes that tensors of one process held in two steps; the largest over processes.
        setup_bytes: And before the first.
        resident_bytes: Growth of its peak resident memory over the imports', setting up included. On a GPU, host memory.
    """

    model_config = ConfigDict(frozen=True)

    trial: str
    moment: str
    predicted_bytes: int
    measured_bytes: int
    setup_bytes: int
    resident_bytes: int

    @computed_field
    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_bytes / self.measured_bytes - 1


def bench_memory(trials: Sequence[Trial], say: Callable[[str], None]) -> list[Measured]:
    """Measures each trial.

    Raises:
        RuntimeError: If a process failed, with the end of what it printed.
    """
    results = []
    for number, trial in enumerate(trials, start=1):
        say(f"{number} of {len(trials)}: {trial}")
        with TemporaryDirectory() as folder:
            results.append(_measure(trial, RunFolder(Path(folder))))
    return results


def _measure(trial: Trial, run: RunFolder) -> Measured:
    recipe = compose_recipe("quickstart_base", [*trial.overrides(), f"run_dir={run.path}"])
    if trial.distills:  # set here: a recipe is refused that learns from random weights
        recipe.distillation = DistillationSection(logits_weight=1.0, ffn_weight=1.0)
    save_recipe(recipe, run.recipe)
    convert(recipe.model, recipe.activation, run.initial, seed=1, dtype=torch.float32)
    architecture = architecture_of(recipe)
    on_cpu = not torch.cuda.is_available()
    plan = memory(recipe, architecture, count_parameters(architecture), on_cpu=on_cpu)
    ranks = _ranks(recipe, run)
    return Measured(
        trial=str(trial),
        moment=plan.device.moment,
        predicted_bytes=plan.device.total,
        measured_bytes=max(rank["training_bytes"] for rank in ranks),
        setup_bytes=max(rank["setup_bytes"] for rank in ranks),
        resident_bytes=max(rank["resident_bytes"] for rank in ranks),
    )


def _ranks(recipe: Recipe, run: RunFolder) -> list[dict[str, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = recipe.launch.processes
    common = os.environ | {
        "WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        # Resident memory then falls when a tensor is freed, so that its peak is that of what lives.
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-m", "sparsify.bench.memory_trial", str(run.path)]
    ranks = [
        subprocess.Popen(
            command,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outcomes = [rank.communicate() for rank in ranks]
    for rank, (_, complaint) in zip(ranks, outcomes, strict=True):
        if rank.returncode:
            raise RuntimeError(f"a memory trial failed:\n{complaint[-2000:]}")
    return [json.loads(printed.splitlines()[-1]) for printed, _ in outcomes]


def memory_table(results: Sequence[Measured]) -> Table:
    """Predicted against measured, for a terminal."""
    table = Table(title="Peak of a process's tensors", title_justify="left", box=None)
    table.add_column("trial")
    for name in ("predicted", "measured", "error", "while set up", "resident"):
        table.add_column(name, justify="right")
    table.add_column("peak expected at")
    for one in results:
        sizes = (one.predicted_bytes, one.measured_bytes, one.setup_bytes, one.resident_bytes)
        predicted, measured, setup, resident = (f"{size / 1e6:,.0f} MB" for size in sizes)
        table.add_row(
            one.trial, predicted, measured, f"{one.error:+.1%}", setup, resident, one.moment
        )
    return table


STATUS = Path("/proc/self/status")


def peak_memory_bytes() -> int:
    """The most memory that this process has held since it began."""
    if STATUS.is_file():
        # Not ru_maxrss: Linux lets a child begin with its parent's peak.
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_apart(works: dict[str, tuple[Any, ...]]) -> dict[str, tuple[int, int]]:
    """Runs each work, a function with its arguments, in a fresh process; all at the same time.

    Returns:
        Peak of the process, and what of it the work added to the libraries it had imported, in bytes.
    """
    context = multiprocessing.get_context("spawn")
    pools = {name: ProcessPoolExecutor(1, context) for name in works}
    try:
        futures: dict[str, Future[tuple[int, int]]] = {
            name: pool.submit(_measured, *works[name]) for name, pool in pools.items()
        }
        return {name: future.result() for name, future in futures.items()}
    finally:
        for pool in pools.values():
            pool.shutdown()


def _measured(work: Callable[..., None], *arguments: Any) -> tuple[int, int]:
    before = peak_memory_bytes()  # the function and its imports are here by now
    work(*arguments)
    peak = peak_memory_bytes()
    return peak, peak - before
