"""Trains the quickstart without its baseline and writes their losses to tests/golden/quickstart.json.

    python scripts/update_golden.py

Run it only after a change that is meant to move losses, and say in the commit why they move.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sparsify.mixture.lock import read_lock
from sparsify.runs.history import read_lines, validation_records
from sparsify.runs.run_folder import RunFolder

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "quickstart.json"
OVERRIDES = ("baseline.ffn_activation=null",)


def measure(run_dir: Path) -> dict[str, Any]:
    """Trains a new run and reads its losses.

    Returns:
        The command, the fingerprint of each source's text, the training loss of each step, and every validation;
        losses in nats per token.
    """
    command = ["train", "quickstart", *OVERRIDES, f"run_dir={run_dir}"]
    program = "from sparsify.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", program, *command], check=True)
    return found(RunFolder(run_dir))


def found(run: RunFolder) -> dict[str, Any]:
    """What `measure` returns, of a run that is finished."""
    steps = [record for record in read_lines(run.metrics) if record["kind"] == "train"]
    lock = read_lock(run.mixture_lock)
    return {
        "command": f"sparsify train quickstart {' '.join(OVERRIDES)}",
        "text": {name: source.fingerprint for name, source in lock.sources.items()},
        "losses": [round(step["loss"], 6) for step in steps],
        "validation": [
            {
                "label": record["label"],
                "tokens": record["tokens"],
                "loss": round(record["loss"], 6),
                "zeros": round(record["zeros"], 6),
            }
            for record in validation_records(run)
        ],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        golden = measure(Path(folder) / "run")
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{GOLDEN}: {len(golden['losses'])} losses\n")
