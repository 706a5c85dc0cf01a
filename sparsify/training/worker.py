"""One rank of a run: `python -m sparsify.training.worker RUN_DIR`, with its rank in the environment."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch.distributed as dist

from sparsify.errors import UserError
from sparsify.mixture.lock import check_lock, read_lock
from sparsify.mixture.windows import WindowReader
from sparsify.recipe import token_shares
from sparsify.training import checkpoints
from sparsify.training.checkpoints import TrainingState, latest_checkpoint
from sparsify.training.data import lock_of, open_sources
from sparsify.training.engine import build_engine, init_distributed
from sparsify.training.launcher import INTERRUPTED, USER_ERROR, UserErrorMarker
from sparsify.training.loop import Session, train
from sparsify.training.run_folder import RunFolder
from sparsify.training.telemetry import Telemetry

WATCH_SECONDS = 0.5


class StopRequest:
    """Remembers that SIGTERM or SIGINT came; training looks at it between steps."""

    def __init__(self) -> None:
        self.came = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, *_: object) -> None:
        self.came = True

    def __call__(self) -> bool:
        return self.came


def exit_with_launcher() -> None:
    """Ends this rank soon after its launcher is gone, so that no orphan writes into a run that is started again."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(run_dir: str) -> int:
    """Trains one rank to the end of the budget; returns its exit code."""
    exit_with_launcher()
    stop_requested = StopRequest()
    run = RunFolder(Path(run_dir))
    try:
        with redirect_stdout(
            sys.stderr
        ):  # DeepSpeed prints while it is set up; that belongs in the log
            init_distributed()
            session = build_session(run, stop_requested)
        finished = train(session)
        session.telemetry.close()
        dist.barrier()  # a rank that leaves first would break the others' connections
        dist.destroy_process_group()
    except UserError as error:
        print(f"{UserErrorMarker.START}{error}{UserErrorMarker.END}", file=sys.stderr, flush=True)
        return USER_ERROR
    return 0 if finished else INTERRUPTED


def build_session(run: RunFolder, stop_requested: StopRequest) -> Session:
    """Opens the data that the launcher prepared, builds the engine, and goes on from the newest checkpoint."""
    recipe = run.load_recipe()
    sources = open_sources(recipe, run)
    shares = token_shares(recipe.mixture)
    check_lock(read_lock(run.mixture_lock), lock_of(recipe, sources))
    reader = WindowReader(sources, shares, recipe.training.window_tokens, recipe.training.seed)
    held_out = {
        name: reader.validation_windows(name, recipe.eval.validation_windows_per_source)
        for name in sources
    }
    engine = build_engine(recipe, run.initial)
    state = TrainingState(0, 0, dist.get_world_size(), recipe.engine.zero_stage)
    newest = latest_checkpoint(run.checkpoints)
    if newest is not None:
        state = checkpoints.load(engine, newest)
    telemetry = Telemetry(recipe, run, state.step, silent=dist.get_rank() != 0)
    return Session(recipe, run, engine, reader, held_out, shares, telemetry, state, stop_requested)


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is on disk and said. An ordinary exit would tear down gloo's threads in an order that C++ does not
    # fix, and now and then end a finished rank with SIGABRT.
    os._exit(code)
