"""Two ranks, or others, of a test's own program, on whole run folders, without the launcher."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsify.conversion.convert import convert
from sparsify.mixture.lock import write_lock
from sparsify.recipe.compose import save_recipe
from sparsify.recipe.model import ModelSection
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.sparsification import ActivationSection
from sparsify.runs.data import ingests_of, lock_of, open_sources
from sparsify.runs.run_folder import RunFolder

RANKS = 2
SECONDS = 300


def prepare_run(whole: Path, path: Path, change: Callable[[Recipe], None]) -> RunFolder:
    """A run folder as the launcher leaves it before ranks start, with the model and the data of a finished run."""
    run, recipe = RunFolder(path), RunFolder(whole).load_recipe()
    shutil.copytree(whole / "initial", run.initial)
    shutil.copy(whole / "mixture.lock.json", run.mixture_lock)
    recipe.run_dir, recipe.launch.processes = str(path), RANKS
    recipe.tracking.wandb = "disabled"
    change(recipe)
    save_recipe(recipe, run.recipe)
    return run


def replace_model(run: RunFolder, source: Path, dtype: torch.dtype = torch.float32) -> None:
    """Gives a prepared run another checkpoint to start from, with dReLU."""
    shutil.rmtree(run.initial)
    model, activation = ModelSection(source=str(source)), ActivationSection("drelu")
    convert(model, activation, run.initial, seed=0, dtype=dtype)


def tokenise(run: RunFolder) -> None:
    """In a rank: has the first one tokenise what the run's recipe needs, as the launcher would."""
    recipe = run.load_recipe()
    if dist.get_rank() == 0:
        ingests = ingests_of(recipe, run)
        for ingest in ingests.values():
            ingest.run()
        write_lock(lock_of(recipe, open_sources(ingests)), run.mixture_lock)
    dist.barrier()


def run_ranks(program: Path, arguments: Sequence[str], processes: int = RANKS) -> list[list[dict[str, Any]]]:
    """What the program printed after FOUND, one for each case; each has an answer of every rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place |= {"LOCAL_RANK": "0", "LOCAL_SIZE": str(processes), "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), *arguments],
            env=os.environ | place | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * processes, "\n".join(said)[-6000:]
    return [json.loads(line[6:]) for line in said[0].splitlines() if line.startswith("FOUND ")]


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
