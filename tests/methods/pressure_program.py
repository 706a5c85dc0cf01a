"""One of two ranks that trains with the blending, the penalty or the target: RUN_DIR… in turn, each to its end.

A folder with `cut` in its name is stopped on the way, saved, and gone on with by a new session.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist

from sparsify.runs.run_folder import RunFolder
from sparsify.training.engine import init_distributed
from sparsify.training.loop import train
from sparsify.training.worker import build_session
from tests.ranks import tokenise


def main(run: RunFolder) -> None:
    recipe = run.load_recipe()
    tokenise(run)
    session = build_session(run, lambda: False)
    if "cut" in run.path.name:
        session.stop_requested = lambda: session.state.step + 1 >= recipe.num_steps // 6
        assert not train(session)
        session = build_session(run, lambda: False)
    assert train(session)


if __name__ == "__main__":
    init_distributed()
    for name in sys.argv[1:]:
        main(RunFolder(Path(name)))
        if dist.get_rank() == 0:
            print('FOUND ["done"]', flush=True)
    dist.barrier()
    os._exit(0)
