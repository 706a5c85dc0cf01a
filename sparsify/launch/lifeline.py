"""Runs a program that ends with the process which started it: `python lifeline.py PARENT PROGRAM ARGUMENTS...`.

PARENT is the starter's process id. It is given, not looked up: a program that imports for ten seconds may be an orphan
before it could ask. PROGRAM is the name of a module or the path of a file. Imports the standard library only, so that
the guard is there before anything slow begins.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time
from contextlib import suppress

WATCH_SECONDS = 0.5
PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Ends this process when `parent` is gone."""
    if sys.platform == "linux":
        # The kernel also ends a process that is busy outside Python.
        with suppress(OSError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def end() -> None:
        with suppress(OSError):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        end()

    if os.getppid() != parent:
        end()
    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parent, program, *arguments = sys.argv[1:]
    end_with(int(parent))
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
