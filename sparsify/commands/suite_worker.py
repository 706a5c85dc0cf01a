"""Asks a checkpoint the suite of its run: `python -m sparsify.commands.suite_worker CHECKPOINT`, started by a rank under ZeRO 3."""

from __future__ import annotations

import sys
from pathlib import Path

from sparsify.commands.evaluate import evaluate_model
from sparsify.errors import UserError
from sparsify.evaluation.request import Asked
from sparsify.launch.child import exit_with_launcher, tell_user_error
from sparsify.reporting.log_lines import print_log_lines
from sparsify.runs.load import find_trained
from sparsify.training.suite import command_of


def main(checkpoint: str) -> int:
    """Measures and writes what came out; returns the exit code."""
    exit_with_launcher()
    print_log_lines()
    try:
        trained = find_trained(Path(checkpoint))
        assert trained is not None
        asked = Asked.by_recipe(trained.run.load_recipe().eval)
        command = command_of(trained.checkpoint, asked)
        evaluate_model(checkpoint, asked, command, lambda _: lambda _done, _all: None)
    except UserError as error:
        return tell_user_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
