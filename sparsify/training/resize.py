"""Resuming with another number of processes or another ZeRO stage, by way of DeepSpeed's universal checkpoints.

DeepSpeed's shards fit only as many ranks as wrote them, at the same stage. The launcher converts them into one file a tensor before
the ranks start (`sparsify.training.universal`), the ranks load those, and the next save, which is an ordinary one, removes them.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from sparsify.files import storage_errors
from sparsify.launch.child import Child, module_command
from sparsify.methods.live_model import Engine
from sparsify.runs.state import Shape
from sparsify.training import universal

logger = logging.getLogger(__name__)

CONVERSIONS = ".universal-*"


def needs_conversion(saved: Shape, now: Shape) -> bool:
    """Whether a checkpoint's files do not fit the ranks as they are; at stage 0 every rank holds all of it."""
    return saved != now and not saved.zero_stage == now.zero_stage == 0


def conversion_folder(checkpoint: Path) -> Path:
    return checkpoint.with_name(CONVERSIONS.replace("*", checkpoint.name))


@contextmanager
def resized(checkpoint: Path, saved: Shape, now: Shape, log: Path) -> Iterator[None]:
    """Keeps a checkpoint's conversion at hand while the block runs, where `now` needs one.

    Raises:
        RunError: If it is damaged.
        StorageError: If there is no room for it: 12 bytes a parameter.
    """
    _remove_conversions(checkpoint.parent)
    if not needs_conversion(saved, now):
        yield
        return
    to = conversion_folder(checkpoint)
    logger.info(f"{checkpoint.name} was saved by {saved}, this run has {now}: converting it")
    started = time.monotonic()
    try:
        with storage_errors(to):
            _convert(checkpoint, to, log)
        logger.info(f"Converted in {time.monotonic() - started:.0f} s; the global batches stay the same")
        yield
    finally:
        _remove_conversions(checkpoint.parent)


def _remove_conversions(checkpoints: Path) -> None:
    for old in checkpoints.glob(CONVERSIONS):
        shutil.rmtree(old, ignore_errors=True)


def _convert(checkpoint: Path, to: Path, log: Path) -> None:
    child = Child(f"converting {checkpoint}", module_command(universal, str(checkpoint), str(to)), log)
    try:
        code = child.wait()
    finally:
        child.kill()
    if code != 0:
        raise child.error()


@contextmanager
def universal_loading(engine: Engine) -> Iterator[None]:
    """Lets an engine load a converted checkpoint while the block runs.

    The setting is not in the engine's configuration, because an ordinary checkpoint may have to be loaded later.
    """
    config = cast(Any, engine)._config
    config.load_universal_checkpoint = True
    try:
        yield
    finally:
        config.load_universal_checkpoint = False


@contextmanager
def own_adam(engine: Engine) -> Iterator[None]:
    """Makes what an engine of stage 1 or above loads in the block fit its own Adam: torch's, or DeepSpeed's for a CPU.

    DeepSpeed 0.19.8 replaces the settings of each group by those that were saved, and either Adam needs some that the other has
    not. torch's counts steps in a tensor, DeepSpeed's in a number. And at stage 3 a universal checkpoint gives all groups one
    and the same counter, which torch's then advances once for each group.
    """
    optimizer = engine.optimizer
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    is_torch = isinstance(optimizer.optimizer, torch.optim.AdamW)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32) if is_torch else int(state["step"])
