"""Runs a run's suite on a checkpoint: `python -m sparsify.commands.suite_worker CHECKPOINT`, started by rank 0 under ZeRO 3."""

from __future__ import annotations

import sys
from pathlib import Path

from sparsify.commands.evaluate import evaluate_model
from sparsify.evaluation.request import EvalRequest
from sparsify.launch.child import run_child
from sparsify.reporting.log_lines import print_log_lines
from sparsify.runs.load import find_trained
from sparsify.training.suite_results import command_of


def main(checkpoint: str) -> bool:
    print_log_lines()
    trained = find_trained(Path(checkpoint))
    assert trained is not None
    request = EvalRequest.from_recipe(trained.run.load_recipe().eval)
    command = command_of(trained.checkpoint, request)
    evaluate_model(checkpoint, request, command, lambda _: lambda _done, _all: None)
    return True


if __name__ == "__main__":
    sys.exit(run_child(lambda: main(sys.argv[1])))
