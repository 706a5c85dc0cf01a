"""Tests of Triton kernels, in a process of their own: Triton must be told to interpret before it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
INTERPRETER = Path(__file__).with_name("interpreter")


def interpreter_environment() -> dict[str, str]:
    """The environment of processes in which Triton interprets its kernels, Liger's among them."""
    folders = [str(INTERPRETER), os.environ.get("PYTHONPATH", "")]
    return {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def run_checks(checks: Path, **variables: str) -> None:
    """Runs a file of tests on the GPU, or in Triton's interpreter, with these variables in its environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | variables
    if not torch.cuda.is_available():
        environment |= interpreter_environment()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:]
