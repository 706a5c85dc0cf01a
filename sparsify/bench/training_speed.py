"""`sparsify bench train`: overhead of our loop and of the probe, and our speed against Hugging Face's Trainer.

All loops have the same weights, sequences, precision and DeepSpeed configuration, and run alternately in one process.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from sparsify.bench.timing import (
    InterleavedLoop,
    paired_ratios,
    quartiles,
    run_interleaved,
    work_seconds,
)
from sparsify.bench.training_loops import Loops, PackedSequence
from sparsify.bench.training_report import Loop, Probe, QuartileRatio, TrainBench
from sparsify.conversion.convert import convert
from sparsify.errors import RecipeError
from sparsify.launch.feeder import Feeder, is_ready
from sparsify.launch.nodes import free_port
from sparsify.methods.live_model import evaluating
from sparsify.mixture.lock import write_lock
from sparsify.mixture.sequences.reader import SequenceReader, collate
from sparsify.mixture.sequences.schedule import SourceSchedule
from sparsify.mixture.sequences.shares import token_shares
from sparsify.recipe.compose import compose_recipe, save_recipe
from sparsify.recipe.recipe import Recipe
from sparsify.runs.data import ingests_of, lock_of, open_sources, shares_of
from sparsify.runs.run_folder import RunFolder
from sparsify.sparsity.probe import SparsityProbe
from sparsify.training.deepspeed_engine import check_machine, init_distributed
from sparsify.training.session import Session
from sparsify.training.validation import validate


def bench_train(
    name_or_path: str,
    overrides: Sequence[str],
    *,
    block_steps: int,
    blocks: int,
    on_progress: Callable[[str], object],
) -> TrainBench:
    """Measures the loops; the recipe's budget, schedule, baseline and number of processes are replaced. Raises
    UserError if the recipe, its model, its data or a number is invalid.
    """
    for name, number in {"block-steps": block_steps, "blocks": blocks}.items():
        if number < 1:
            raise RecipeError(f"--{name} is {number}.", allowed="It must be 1 or more.")
    given = compose_recipe(name_or_path, [*overrides, "launch.processes=1"])
    # One additional block for warm-up, one additional step that the Trainer reads ahead.
    num_steps = (blocks + 1) * block_steps + 1
    with tempfile.TemporaryDirectory(prefix="sparsify-bench-") as folder:
        fixed = {
            "launch.processes": 1,
            "training.budget_tokens": num_steps * given.step_tokens,
            "optimizer.warmup_tokens": 0,
            "optimizer.final_learning_rate": given.optimizer.peak_learning_rate,
            "baseline.ffn_activation": "null",
            "tracking.wandb": "disabled",
            "run_dir": folder,
        }
        settings = [f"{key}={value}" for key, value in fixed.items()]
        recipe = compose_recipe(name_or_path, [*overrides, *settings])
        check_machine(recipe)
        others = deepcopy(recipe)
        others.training.liger_kernels = False  # so that the ratios include the gain of Liger
        if not torch.cuda.is_available():
            # Waiting OpenMP threads spin, which would count as CPU time.
            torch.set_num_threads(recipe.launch.threads_per_process or 1)
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            on_progress("Preparing weights and sequences")
            run = RunFolder(Path(folder))
            sequences = _prepare(recipe, run)
            _join_alone()
            try:
                return _measure(Loops(others, run, sequences), block_steps, blocks, on_progress)
            finally:
                gc.collect()
                dist.destroy_process_group()


def _prepare(recipe: Recipe, run: RunFolder) -> list[PackedSequence]:
    """Prepares the run like the launcher, and returns the sequences of all steps."""
    save_recipe(recipe, run.recipe)
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    convert(
        recipe.model,
        recipe.activation,
        run.initial,
        seed=recipe.training.seed,
        dtype=dtype,
    )
    ingests = ingests_of(recipe, run)
    with Feeder(run, ingests, recipe.launch.ingest_processes, lambda *_: None) as feeder:
        feeder.wait_until(is_ready)
    sources = open_sources(ingests)
    write_lock(lock_of(recipe, sources), run.mixture_lock)
    training = recipe.training
    schedule = SourceSchedule(shares_of(recipe, sources))
    reader = SequenceReader(sources, schedule, training.sequence_length, training.seed)
    tensors = reader.batch(0, recipe.num_steps * training.global_batch_size).tensors
    return [
        {key: value[row].clone() for key, value in tensors.items()}
        for row in range(recipe.num_steps * training.global_batch_size)
    ]


def _join_alone() -> None:
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    init_distributed()


def _measure(loops: Loops, block_steps: int, blocks: int, on_progress: Callable[[str], object]) -> TrainBench:
    recipe = loops.recipe
    controls = run_interleaved(
        {"bare engine": loops.bare, "sparsify": loops.ours, "Trainer": loops.trainer},
        block_steps,
        blocks,
        on_progress,
    )
    bare, ours, trainer = controls["bare engine"], controls["sparsify"], controls["Trainer"]
    assert loops.session is not None
    on_progress("Validation with and without the probe")
    probe = _probe(loops.session, median(ours.seconds), blocks)
    overheads = [ratio - 1 for ratio in paired_ratios(ours.seconds, bare.seconds)]
    cuda = torch.cuda.is_available()
    return TrainBench(
        recipe=recipe.name,
        parameters=sum(
            getattr(parameter, "ds_numel", parameter.numel()) for parameter in loops.session.engine.module.parameters()
        ),
        precision=recipe.training.precision,
        zero_stage=recipe.engine.zero_stage,
        device=torch.cuda.get_device_name() if cuda else "cpu",
        clock="wall" if cuda else "CPU time of this process",
        threads=torch.get_num_threads(),
        step_tokens=recipe.step_tokens,
        sequence_length=recipe.training.sequence_length,
        block_steps=block_steps,
        blocks=blocks,
        bare=_loop(bare, recipe),
        ours=_loop(ours, recipe),
        trainer=_loop(trainer, recipe),
        loop_overhead=_ratio(overheads),
        speed_against_trainer=_ratio(paired_ratios(trainer.seconds, ours.seconds)),
        probe=probe,
    )


def _loop(control: InterleavedLoop, recipe: Recipe) -> Loop:
    return Loop(
        tokens_per_second=recipe.step_tokens / median(control.seconds),
        step_seconds=control.seconds,
        losses=control.losses,
    )


def _ratio(values: Sequence[float]) -> QuartileRatio:
    middle, lower, upper = quartiles(values)
    return QuartileRatio(median=middle, lower_quartile=lower, upper_quartile=upper)


def _probe(session: Session, step_seconds: float, repeats: int) -> Probe:
    """Times validation, and the same forward passes with and without the probe, interleaved.

    Measured directly, since training blocks vary by more than the cost of a validation.
    """
    recipe = session.recipe
    shares, size = token_shares(recipe.mixture), recipe.training.micro_batch_size
    works: dict[str, Callable[[], object]] = {
        "validation": lambda: validate(session.engine, session.held_out, shares, size),
        "forward": lambda: _forward(session),
        "probed": lambda: _probed_forward(session),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name in list(works) if repeat % 2 else reversed(works):
            started = work_seconds()
            works[name]()
            if repeat:  # the first pass warms up
                seconds[name].append(work_seconds() - started)
    added = [a - b for a, b in zip(seconds["probed"], seconds["forward"], strict=True)]
    every_tokens = session.run.load_recipe().eval.every_tokens
    training_seconds = step_seconds * every_tokens / recipe.step_tokens
    validation_seconds, probe_seconds = median(seconds["validation"]), median(added)
    sequences = sum(map(len, session.held_out.values()))
    return Probe(
        every_tokens=every_tokens,
        held_out_tokens=sequences * recipe.training.sequence_length,
        validation_seconds=validation_seconds,
        probe_seconds=probe_seconds,
        validation_share=validation_seconds / training_seconds,
        probe_share=probe_seconds / training_seconds,
    )


def _probed_forward(session: Session) -> None:
    with SparsityProbe(session.engine.module) as probe:
        _forward(session)
    probe.statistics().reduce().zero_share("product")


@torch.no_grad()
def _forward(session: Session) -> None:
    engine, size = session.engine, session.recipe.training.micro_batch_size
    with evaluating(engine):
        for sequences in session.held_out.values():
            for start in range(0, len(sequences), size):
                batch = collate(sequences[start : start + size])
                engine(
                    input_ids=batch["input_ids"].to(engine.device),
                    position_ids=batch["position_ids"].to(engine.device),
                    use_cache=False,
                )
