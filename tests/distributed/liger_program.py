"""One of two ranks that trains runs in turn, stopped after their first step or not: RUN_DIR STOPPED …"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist

from sparsify.runs.run_folder import RunFolder
from sparsify.training.deepspeed_engine import init_distributed
from sparsify.training.loop import train
from sparsify.training.worker import build_session

if __name__ == "__main__":
    init_distributed()
    arguments = iter(sys.argv[1:])
    for folder, stopped in zip(arguments, arguments, strict=True):
        run = RunFolder(Path(folder))
        if stopped == "stopped":
            assert not train(build_session(run, lambda: True))
        assert train(build_session(run, lambda: False))
    dist.barrier()
    os._exit(0)
