"""One rank of a memory trial: `python -m sparsify.bench.memory_trial RUN_DIR`, with its rank in the environment.

Builds the run's engine, takes two steps on made-up tokens and prints the most bytes that tensors held. On a GPU that is
`torch.cuda.max_memory_allocated`; on a CPU it is the same count, taken from the allocator's reports to PyTorch's
profiler, so that malloc's habits are no part of it. The resident memory is printed beside it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from sparsify.bench.memory import peak_memory_bytes
from sparsify.launch.child import exit_with_launcher
from sparsify.methods.distillation import Teacher, load_teacher
from sparsify.mixture.sequences.reader import Batch
from sparsify.recipe.recipe import Recipe
from sparsify.runs.run_folder import RunFolder
from sparsify.training.engine import build_engine, init_distributed
from sparsify.training.loop import Session, accumulate
from sparsify.training.objective import Objective
from sparsify.training.stability import finish_step

STEPS = 2  # the optimiser's state is whole from the second on
TRAINING = "sparsify training"
Built = tuple[Any, Teacher | None]
"""The engine, and the model that it learns from."""


def main(run_dir: str) -> None:
    """Runs one rank and prints what it measured as a line of JSON."""
    exit_with_launcher()
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
    os._exit(0)  # see training.worker: an ordinary exit may abort in gloo


def _build(recipe: Recipe, run: RunFolder) -> Built:
    engine = build_engine(recipe, run.initial)
    return engine, load_teacher(recipe, run, engine.device)


def _steps(built: Built, recipe: Recipe) -> None:
    engine, teacher = built
    session = cast(Session, SimpleNamespace(engine=engine, recipe=recipe))
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
        with Objective(recipe, engine, None, teacher) as objective:
            accumulate(session, batches, sources, recipe.step_tokens, None, objective)
            finish_step(engine)


def _on_gpu(build: Callable[[], Built], recipe: Recipe) -> tuple[int, int]:
    built = build()
    setup = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _steps(built, recipe)
    return setup, torch.cuda.max_memory_allocated()


def _on_cpu(build: Callable[[], Built], recipe: Recipe) -> tuple[int, int]:
    """Peaks from every allocation and release between the first and the last."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        built = build()
        with record_function(TRAINING):
            pass
        _steps(built, recipe)
    assert profiler.profiler is not None
    results = cast(Any, profiler.profiler.kineto_results)
    started = next(event.start_ns() for event in results.events() if event.name() == TRAINING)
    setup = training = total = 0
    live: dict[int, int] = {}
    for time_ns, pointer, change in sorted(_allocations(results.experimental_event_tree())):
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


def _allocations(roots: list[Any]) -> Iterator[tuple[int, int, int]]:
    """Time, address and bytes of every allocation, negative for a release."""
    events = list(roots)
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size


if __name__ == "__main__":
    main(sys.argv[1])
