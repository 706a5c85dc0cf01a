"""One of two ranks that trains with a suite, or without: RUN_DIR… in turn; prints a hash of weights and optimiser of each.

A folder with `cut` in its name is stopped by rank 1 while the suite runs, and resumed by a new session.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from sparsify.commands import suite_worker
from sparsify.runs.run_folder import RunFolder
from sparsify.training.deepspeed_engine import init_distributed
from sparsify.training.loop import train
from sparsify.training.session import Session
from sparsify.training.worker import build_session
from tests.training.bad_step_program import everything


def digest(session: Session) -> str:
    """Hash of everything that the rank trains, and of its random number generators."""
    found = xxhash.xxh3_128()
    for tensor in [*everything(session.engine), torch.get_rng_state()]:
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    found.update(repr((random.random(), np.random.rand())).encode())
    assert session.engine.module.training
    return found.hexdigest()


def main(run: RunFolder) -> list[str]:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    session = build_session(run, lambda: False, suite_worker)
    if "cut" in run.path.name:
        session.stop_requested = lambda: dist.get_rank() == 1 and len(journal_lines(run)) > 2
        assert not train(session)
        assert journal_lines(run)
        session = build_session(run, lambda: False, suite_worker)
        assert session.state.step == 4
    assert train(session)
    both = [""] * dist.get_world_size()
    dist.all_gather_object(both, digest(session))
    return both


def journal_lines(run: RunFolder) -> list[str]:
    """Lines of the journals of a suite that is not done."""
    journals = run.path.glob("evaluations/*/journal/*.jsonl")
    return [line for path in journals for line in path.read_text().splitlines()]


if __name__ == "__main__":
    init_distributed()
    for name in sys.argv[1:]:
        hashes = main(RunFolder(Path(name)))
        if dist.get_rank() == 0:
            print("FOUND " + str(hashes).replace("'", '"'), flush=True)
    dist.barrier()
    os._exit(0)
