"""DeepSpeed's shards, read without executing them.

They are pickles, and DeepSpeed loads them as such. Inside `plain_shards` torch reads tensors, plain values and the three classes
that DeepSpeed stores; a shard that names anything else is refused before any of it is called.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sparsify.errors import RunError

LATEST = "latest"
"""The file in `checkpoints/` that names the newest one."""
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""torch's own switch: `torch.load` ignores `weights_only=False`, also in processes that inherit it."""
FORBID = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_FOREIGN = re.compile(r"GLOBAL ([\w.]+)|type[^`]*`([\w.]+)`|function ([\w.]+)")


@contextmanager
def plain_shards(checkpoint: Path) -> Iterator[None]:
    """Refuses pickled code in all that torch loads inside the block, here and in processes that are forked here.

    Raises:
        RunError: Naming the checkpoint, if a shard of it has pickled code, is missing or was cut off.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except (OSError, EOFError, pickle.UnpicklingError, RuntimeError) as error:
        said = str(error)
        if said.startswith("Weights only load failed"):
            raise _has_code(checkpoint, said) from error
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in said:
            raise
        raise damaged_checkpoint(checkpoint, said.partition("\n")[0]) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _has_code(checkpoint: Path, said: str) -> RunError:
    found = _FOREIGN.search(said)
    named = next(filter(None, found.groups()), "") if found else ""
    return RunError(
        f"{checkpoint} holds more than tensors and plain values{f': a shard names {named}' if named else ''}. Loading it "
        "could run code, so nothing was loaded.",
        allowed="Shards as `sparsify train` writes them.",
        next_step="Use another checkpoint, or get the weights as safetensors from whoever trained them: `sparsify export`.",
    )


def damaged_checkpoint(checkpoint: Path, reason: str) -> RunError:
    """The error for a checkpoint that cannot be used, with the way out of it."""
    return RunError(
        f"{checkpoint} is not whole: {reason}.",
        next_step=f"Write the name of another checkpoint into {checkpoint.parent / LATEST}.",
    )
