"""Compares the memory that `sparsify plan` predicts with measured peaks, over real engines in processes of their own.

Run: python scripts/validate_memory_plan.py [--json]. It takes about half an hour on two CPU cores.

Each trial converts a model of 11 to 12 million parameters, builds the run's engine and takes two steps on random tokens.
The measured value is the largest number of bytes that tensors held: on a GPU `torch.cuda.max_memory_allocated`, on a CPU
the same count from the allocator's reports to PyTorch's profiler, so that malloc's overhead is not part of it. The
growth of resident memory is printed next to it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, computed_field
from rich.console import Console
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from sparsify.bench.mixture_speed import peak_memory_bytes
from sparsify.conversion.convert import convert
from sparsify.launch.child import Child, lifeline_arguments
from sparsify.launch.nodes import free_port
from sparsify.methods.objective import objectives_of
from sparsify.mixture.sequences.reader import Batch
from sparsify.plan.estimate import architecture_of
from sparsify.plan.memory import memory
from sparsify.plan.parameters import count_parameters
from sparsify.recipe.compose import compose_recipe, save_recipe
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.sparsification import DistillationSection
from sparsify.reporting.tables import Table
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.state import TrainingState
from sparsify.training.deepspeed_engine import build_engine, init_distributed
from sparsify.training.session import Session
from sparsify.training.stability import finish_step
from sparsify.training.step import accumulate

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
            f"{'+' * key.startswith('+')}model.architecture.{key.lstrip('+')}={value}" for key, value in shape.items()
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


def validate(trials: Sequence[Trial], on_progress: Callable[[str], object]) -> list[Measured]:
    """Measures each trial.

    Raises:
        RuntimeError: If a process failed, with the end of its log.
    """
    results = []
    for number, trial in enumerate(trials, start=1):
        on_progress(f"{number} of {len(trials)}: {trial}")
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
    world = recipe.launch.processes
    common = os.environ | {
        "WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        # Resident memory then falls when a tensor is freed, so that its peak is that of what lives.
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-m", *lifeline_arguments(__file__), "--rank-of", str(run.path)]
    ranks = [
        Child(
            f"rank {rank} of a memory trial",
            command,
            run.path / f"rank{rank}.log",
            environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            output="pipe",
        )
        for rank in range(world)
    ]
    printed = [rank.stdout.read() for rank in ranks]
    for rank in ranks:
        if rank.wait():
            raise rank.error()
    return [json.loads(lines.splitlines()[-1]) for lines in printed]


def memory_table(results: Sequence[Measured]) -> Table:
    """Predicted against measured, for a terminal."""
    header = [
        "trial",
        "predicted",
        "measured",
        "error",
        "while set up",
        "resident",
        "peak expected at",
    ]
    table = Table("Peak of a process's tensors", header, left=(0, 6))
    for one in results:
        sizes = (one.predicted_bytes, one.measured_bytes, one.setup_bytes, one.resident_bytes)
        predicted, measured, setup, resident = (f"{size / 1e6:,.0f} MB" for size in sizes)
        table.add(one.trial, predicted, measured, f"{one.error:+.1%}", setup, resident, one.moment)
    return table


STEPS = 2  # the optimiser's state is whole from the second on
TRAINING = "sparsify training"


def run_rank(run_dir: str) -> None:
    """Runs one rank and prints what it measured as a line of JSON."""
    run = RunFolder(Path(run_dir))
    recipe = run.load_recipe()
    with redirect_stdout(sys.stderr):
        init_distributed()
        imported_bytes = peak_memory_bytes()
        measure = _on_gpu if torch.cuda.is_available() else _on_cpu
        setup, training = measure(lambda: _build(recipe, run), recipe)
    print(
        json.dumps(
            {
                "setup_bytes": setup,
                "training_bytes": training,
                "resident_bytes": peak_memory_bytes() - imported_bytes,
            }
        ),
        flush=True,
    )
    dist.barrier()
    os._exit(0)  # see commands.rank: an ordinary exit may abort in gloo


def _build(recipe: Recipe, run: RunFolder) -> Session:
    engine, state = build_engine(recipe, run.initial), TrainingState(0, 0, 1, 0, {})
    parts = SimpleNamespace(engine=engine, recipe=recipe, run=run, state=state)
    session = cast(Session, parts)
    session.objectives = objectives_of(session)
    return session


def _steps(session: Session, recipe: Recipe) -> None:
    engine = session.engine
    training = recipe.training
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (training.micro_batch_size, training.sequence_length)
    # Two documents a sequence: packed sequences need an attention mask, and that takes memory.
    positions = torch.arange(training.sequence_length) % -(-training.sequence_length // 2)
    for _ in range(STEPS):
        batches = []
        for _ in range(recipe.accumulation_steps):
            tokens = torch.randint(engine.module.config.vocab_size, shape, generator=generator)
            tensors = {"input_ids": tokens, "labels": tokens}
            tensors["position_ids"] = positions.expand(shape)
            batches.append(Batch(tensors, torch.zeros(shape[0], dtype=torch.int64)))
        sources = ["made up"] * training.global_batch_size
        accumulate(session, batches, sources, recipe.step_tokens, None)
        finish_step(engine)


def _on_gpu(build: Callable[[], Session], recipe: Recipe) -> tuple[int, int]:
    session = build()
    setup = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _steps(session, recipe)
    return setup, torch.cuda.max_memory_allocated()


def _on_cpu(build: Callable[[], Session], recipe: Recipe) -> tuple[int, int]:
    """Peaks from every allocation and release between the first and the last."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        session = build()
        with record_function(TRAINING):
            pass
        _steps(session, recipe)
    assert profiler.profiler is not None
    results = cast(Any, profiler.profiler.kineto_results)
    started = next(event.start_ns() for event in results.events() if event.name() == TRAINING)
    setup = training = total = 0
    live: dict[int, int] = {}
    for time_ns, pointer, change in sorted(allocations(results.experimental_event_tree())):
        # By address: the release of a storage that ZeRO-3 resizes to nothing is not always reported.
        total -= live.pop(pointer, 0)
        if change > 0:
            live[pointer] = change
            total += change
        if time_ns < started:
            setup = max(setup, total)
        else:
            training = max(training, total)
    return setup, training


def allocations(roots: list[Any]) -> Iterator[tuple[int, int, int]]:
    """Time, address and bytes of every allocation, negative for a release."""
    events = list(roots)
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size


def main() -> None:
    """Measures every trial of the grid, or one rank of a trial."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--rank-of", metavar="RUN_DIR", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        run_rank(arguments.rank_of)
    results = validate(GRID, Console(stderr=True, highlight=False).print)
    if arguments.json:
        print(json.dumps([one.model_dump() for one in results]))
    else:
        Console().print(memory_table(results))


if __name__ == "__main__":
    main()
