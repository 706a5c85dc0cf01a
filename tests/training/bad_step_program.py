"""One of two ranks that meets bad steps on purpose: RUN_DIR… in turn; prints what it found as a line of JSON for each.

The run folders are whole, as the launcher leaves them. NaN and a wild loss come from the model itself, on rank 1 only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsify.errors import RunError
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.state import latest_checkpoint
from sparsify.training.deepspeed_engine import init_distributed
from sparsify.training.loop import train
from sparsify.training.session import Session
from sparsify.training.worker import build_session


class Poison:
    """Spoils the output of the last norm, or its gradient, at the given steps; in evaluation too where it says so."""

    def __init__(self, session: Session, kinds: dict[int, str], *, evaluation: bool = False) -> None:
        self.session, self.kinds, self.evaluation = session, kinds, evaluation
        session.engine.module.model.norm.register_forward_hook(self)

    def __call__(self, module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        kind = self.kinds.get(self.session.state.step + 1)
        if kind is None or not (dist.get_rank() == 1 if module.training else self.evaluation):
            return output
        if kind == "gradient":
            output.register_hook(lambda gradient: gradient * float("nan"))
            return output
        return output * {"nan": float("nan"), "spike": -40.0}[kind]


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value.detach().clone()
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def everything(engine: Any) -> list[torch.Tensor]:
    """Live weights as this rank holds them, master weights and moments."""
    weights = [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]
    return [*weights, *tensors(engine.optimizer.state_dict())]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def run_to(session: Session, step: int) -> None:
    """Goes on to the end of a step, as if training had been told to stop there."""
    session.stop_requested = lambda: session.state.step + 1 >= step
    train(session)


def resumed_ends_the_same(session: Session) -> bool:
    """Whether a new session that goes on from the checkpoint behind the rollback ends with the same bits."""
    run, ended = session.run, everything(session.engine)
    dist.barrier()
    (run.checkpoints / "latest").write_text("step-00000005")
    dist.barrier()
    again = build_session(run, lambda: False)
    assert again.state.step == 5
    train(again)
    return again.state == session.state and same(ended, everything(again.engine))


def main(folder: Path) -> dict[str, Any]:
    session = build_session(RunFolder(folder), lambda: False)
    kinds = {4: "nan", 5: "gradient", 6: "spike"}
    if "stop" in folder.name:
        kinds = {4: "nan"}
    if "rollback" in folder.name:
        kinds = {5: "nan"}
    if "never" in folder.name:
        kinds = dict.fromkeys(range(3, 9), "nan")
    if "harder" in folder.name or "worse" in folder.name:
        kinds = dict.fromkeys(range(4, 10), "spike")
    Poison(session, kinds, evaluation="worse" in folder.name)
    found: dict[str, Any] = {}
    if "skip" not in folder.name:
        try:
            train(session)
        except RunError as error:
            found["error"] = str(error)
        found["state"] = session.state.skipped_sequences
        if "rollback" in folder.name:
            found["resumed"] = resumed_ends_the_same(session)
        found["latest"] = getattr(latest_checkpoint(session.run.checkpoints), "name", None)
        return found
    session.state = replace(session.state, step=0)
    run_to(session, 3)
    before = everything(session.engine)
    run_to(session, 6)
    found["same"] = same(before, everything(session.engine))
    run_to(session, 7)
    found["trains_on"] = not same(before, everything(session.engine))
    found["state"] = session.state.skipped_sequences
    return found


if __name__ == "__main__":
    init_distributed()
    for name in sys.argv[1:]:
        found = main(Path(name))
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, found)
        if dist.get_rank() == 0:
            print("FOUND", json.dumps(gathered), flush=True)
    dist.barrier()
    import os

    os._exit(0)
