"""Resuming with another number of processes or another ZeRO stage, by way of DeepSpeed's universal checkpoints.

DeepSpeed's shards fit only as many ranks as wrote them. The launcher converts them into one file a tensor before the
ranks start, the ranks load those, and the next save, which is an ordinary one, removes them.

    python -m sparsify.training.resize CHECKPOINT TO
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from sparsify.errors import RunError
from sparsify.files import storage_errors
from sparsify.launch.child import Child, exit_with_parent, module_command, run_child
from sparsify.methods.live_model import Engine
from sparsify.runs.state import Shape

logger = logging.getLogger(__name__)

CONVERSIONS = ".universal-*"
MOST_WORKERS = 4


def needs_conversion(saved: Shape, now: Shape) -> bool:
    """Whether a checkpoint's files do not fit the ranks as they are; at stage 0 every rank holds all of it."""
    return saved != now and not saved.zero_stage == now.zero_stage == 0


def check_convertible(checkpoint: Path, saved: Shape, now: Shape) -> None:
    """Refuses what DeepSpeed's universal checkpoints cannot carry over.

    Raises:
        RunError: If either stage is 0 and the other is not, or one of them is 3 and the other is not.
    """
    if _family(saved.zero_stage) != _family(now.zero_stage):
        stages = {0: "0", 1: "1 or 2", 3: "3"}[_family(saved.zero_stage)]
        raise RunError(
            f"{checkpoint} was written by {saved}; this run has {now}.",
            allowed=f"From there DeepSpeed continues at stage {stages}, with any number of processes.",
            next_step=f"Set engine.zero_stage={saved.zero_stage}, or start another run with run_dir=….",
        )


def _family(zero_stage: int) -> int:
    return 1 if zero_stage == 2 else zero_stage


def conversion_folder(checkpoint: Path) -> Path:
    return checkpoint.with_name(CONVERSIONS.replace("*", checkpoint.name))


@contextmanager
def resized(checkpoint: Path, saved: Shape, now: Shape, log: Path) -> Iterator[None]:
    """Keeps a checkpoint's conversion at hand while the block runs, where `now` needs one.

    Raises:
        RunError: If it cannot be converted.
        StorageError: If there is no room for it: while it is made, twice the checkpoint.
    """
    for old in checkpoint.parent.glob(CONVERSIONS):
        shutil.rmtree(old, ignore_errors=True)
    if not needs_conversion(saved, now):
        yield
        return
    check_convertible(checkpoint, saved, now)
    to = conversion_folder(checkpoint)
    logger.info(f"{checkpoint.name} was saved by {saved}, this run has {now}: converting it")
    started = time.monotonic()
    try:
        with storage_errors(to):
            _convert(checkpoint, to, log)
        logger.info(f"Converted in {time.monotonic() - started:.0f} s; the global batches stay the same")
        yield
    finally:
        shutil.rmtree(to, ignore_errors=True)


def _convert(checkpoint: Path, to: Path, log: Path) -> None:
    command = module_command(sys.modules[__name__], str(checkpoint), str(to))
    child = Child(f"converting {checkpoint}", command, log)
    try:
        code = child.wait()
    finally:
        child.kill()  # DeepSpeed's workers too
    if code != 0:
        raise child.error()


@contextmanager
def universal_loading(engine: Engine) -> Iterator[None]:
    """Lets an engine load a converted checkpoint while the block runs.

    The setting is not in the engine's configuration, because an ordinary checkpoint may have to be loaded later.

    Two things that DeepSpeed 0.19.8 gets wrong here at stage 3 are put right. It copies the settings of the first
    parameter group to all others, and with them its weight decay to the norms. And it gives all groups one and the
    same step counter, which Adam then advances once for each group.
    """
    optimizer = engine.optimizer
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    config = cast(Any, engine)._config
    config.load_universal_checkpoint = True
    try:
        yield
    finally:
        config.load_universal_checkpoint = False
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def main(checkpoint: str, to: str) -> bool:
    exit_with_parent(whole_group=True)
    from sparsify.runs.state import prepare_accelerator

    prepare_accelerator()
    from deepspeed.checkpoint import ds_to_universal

    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    arguments = Namespace(
        input_folder=checkpoint,
        output_folder=str(Path(to) / Path(checkpoint).name),
        num_extract_workers=workers,
        num_merge_workers=workers,
        keep_temp_folder=False,
        strict=True,
        # What it injects is empty: only models that split tensors over ranks have anything to say there.
        inject_missing_state=True,
    )
    ds_to_universal.main(arguments)
    return True


if __name__ == "__main__":
    sys.exit(run_child(lambda: main(*sys.argv[1:])))
