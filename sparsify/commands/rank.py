"""The program of one rank: `python -m sparsify.commands.rank RUN_DIR`, started by the launcher."""

from __future__ import annotations

import os
import sys

from sparsify.commands import suite_worker
from sparsify.launch.child import run_child
from sparsify.training.worker import main

if __name__ == "__main__":
    code = run_child(lambda: main(sys.argv[1], suite_worker))
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written and flushed. An ordinary exit tears down gloo's threads in an undefined order, which
    # sometimes ends a finished rank with SIGABRT.
    os._exit(code)
