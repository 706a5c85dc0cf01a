"""A launcher that starts a child with a lock and waits: `starter.py RUN LINES`; prints the child's process id."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from sparsify.launch.child import Child, module_command
from sparsify.runs.run_lock import RunLock
from tests.launch import slow_import

run, lines = Path(sys.argv[1]), sys.argv[2]
with RunLock(run) as lock:
    child = Child("rank 0", module_command(slow_import, lines), run / "rank-0.log", kept_open=[lock.descriptor])
    print(child.pid, flush=True)
    time.sleep(60)
