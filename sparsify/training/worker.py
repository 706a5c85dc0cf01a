"""One rank of a run, with its rank in the environment."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import torch.distributed as dist

from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.launch.child import StopRequest
from sparsify.methods.objective import objectives_of
from sparsify.mixture.lock import check_lock, read_lock
from sparsify.mixture.sequences.reader import SequenceReader, held_out_sequences
from sparsify.mixture.sequences.schedule import Anchor, SourceSchedule
from sparsify.mixture.sequences.shares import token_shares
from sparsify.recipe.recipe import Recipe
from sparsify.reporting.log_lines import print_log_lines
from sparsify.runs.data import ingests_of, lock_of, open_sources, shares_of
from sparsify.runs.manifest import gather_values
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.state import TrainingState, latest_checkpoint, read_state
from sparsify.training import checkpoints
from sparsify.training.deepspeed_engine import build_engine, init_distributed
from sparsify.training.dry_run import dry_run
from sparsify.training.loop import train
from sparsify.training.performance import Performance
from sparsify.training.session import Session, SuiteRunner
from sparsify.training.telemetry import RunTelemetry, Telemetry


def main(run_dir: str, suite_worker: ModuleType) -> bool:
    """Trains one rank to the end of the budget.

    Returns:
        False when a stop was requested before.
    """
    print_log_lines()
    stop_requested = StopRequest()
    run = RunFolder(Path(run_dir))
    with redirect_stdout(sys.stderr):  # DeepSpeed prints while it is set up; that belongs in the log
        init_distributed()
        session = build_session(run, stop_requested, suite_worker)
        dry_run(session)
    finished = train(session)
    session.telemetry.close()
    dist.barrier()  # a rank that leaves first would break the others' connections
    dist.destroy_process_group()
    return finished


def build_session(
    run: RunFolder, stop_requested: Callable[[], bool], suite_worker: ModuleType | None = None
) -> Session:
    """Opens the data that the launcher prepared, builds the engine, and resumes from the newest checkpoint."""
    recipe = run.load_recipe()
    training = recipe.training
    sources = open_sources(ingests_of(recipe, run), verify=False)  # the launcher did; each shard is when it is opened
    check_lock(read_lock(run.mixture_lock), lock_of(recipe, sources))
    newest = _newest_of_rank_0(run)
    anchor = None
    if newest is not None:
        saved = read_state(newest)
        anchor = Anchor(saved.step * training.global_batch_size, saved.drawn_sequences)
    schedule = SourceSchedule(shares_of(recipe, sources), anchor)
    reader = SequenceReader(sources, schedule, training.sequence_length, training.seed)
    held_out = {
        name: held_out_sequences(source, training.sequence_length, recipe.eval.validation_sequences_per_source)
        for name, source in sources.items()
    }
    engine = build_engine(recipe, run.initial)
    state = TrainingState(
        step=0,
        seen_tokens=0,
        processes=dist.get_world_size(),
        zero_stage=recipe.engine.zero_stage,
        drawn_sequences=dict.fromkeys(schedule.names, 0),
    )
    if newest is not None:
        state = checkpoints.load(engine, newest)
    is_first = dist.get_rank() == 0
    session = Session(
        recipe=recipe,
        run=run,
        engine=engine,
        reader=reader,
        held_out=held_out,
        shares=token_shares(recipe.mixture),
        telemetry=RunTelemetry(recipe, run, state.step) if is_first else Telemetry(),
        state=state,
        stop_requested=stop_requested,
        performance=Performance(
            engine.module,
            training.sequence_length,
            dist.get_world_size(),
            training.precision,
            recipe.num_steps * recipe.step_tokens - state.seen_tokens,
        ),
        tokenizer=load_tokenizer(run.initial),
        suite=_suite(recipe, run, suite_worker),
        saved=None if newest is None else state,
    )
    session.objectives = objectives_of(session)
    return session


def _suite(recipe: Recipe, run: RunFolder, worker: ModuleType | None) -> SuiteRunner | None:
    if recipe.eval.suite is None:
        return None
    from sparsify.training.suite_runner import TrainingSuite

    return TrainingSuite(recipe, run, worker)


def _newest_of_rank_0(run: RunFolder) -> Path | None:
    newest = latest_checkpoint(run.checkpoints)
    name = gather_values(None if newest is None else newest.name)[0]
    return None if name is None else run.checkpoints / name
