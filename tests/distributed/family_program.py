"""One of two ranks that trains the given runs to their end, one after the other, each on tokens of its own budget: RUN_DIR …"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import torch.distributed as dist

from sparsify.runs.run_folder import RunFolder
from sparsify.training.deepspeed_engine import init_distributed
from sparsify.training.loop import train
from sparsify.training.worker import build_session
from tests.ranks import tokenise

if __name__ == "__main__":
    init_distributed()
    for folder in sys.argv[1:]:
        run = RunFolder(Path(folder))
        tokenise(run)
        assert train(build_session(run, lambda: False))
        gc.collect()
    dist.barrier()
    os._exit(0)
