"""A child for the tests: `python -m tests.launch.child_program DEED`."""

from __future__ import annotations

import sys
import time

from sparsify.errors import MixtureError
from sparsify.launch.child import StopRequest, run_child


def main(deed: str) -> bool:
    stop_requested = StopRequest()
    if deed == "mistake":
        raise MixtureError("text.jsonl is empty.", allowed="Some text.", next_step="Add text.")
    if deed == "defect":
        raise LookupError("no such neuron")
    print("ready", flush=True)
    while deed == "wait" and not stop_requested():
        time.sleep(0.01)
    while deed == "deaf":
        time.sleep(1)
    return deed == "done"


if __name__ == "__main__":
    sys.exit(run_child(lambda: main(sys.argv[1])))
