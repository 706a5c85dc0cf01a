"""One of two ranks that trains models with sparse weights: RUN_DIR… in turn.

A folder with `cut` in its name is stopped on the way, saved, and continued by a new session. In one with `planted` in its name a
zero gets another value after the second step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import ClassVar, Self

import torch
import torch.distributed as dist

from sparsify.errors import RunError
from sparsify.methods.live_model import full_weight, set_full_weight
from sparsify.methods.objective import Objective, TrainingRun
from sparsify.methods.weights import frozen
from sparsify.methods.weights.frozen import FrozenZeros
from sparsify.runs.run_folder import RunFolder
from sparsify.training.deepspeed_engine import init_distributed
from sparsify.training.loop import train
from sparsify.training.worker import build_session
from tests.ranks import tokenise


class Planted(Objective):
    """Writes to the optimiser's weights, as nothing that trains under a mask may do."""

    name: ClassVar[str] = "planted"

    def __init__(self, session: TrainingRun) -> None:
        self._session, self._steps = session, 0

    @classmethod
    def of(cls, run: TrainingRun) -> Self | None:
        return cls(run)

    def between_steps(self) -> bool:
        self._steps += 1
        if self._steps == 3:
            parameter = dict(self._session.engine.module.named_parameters())["model.layers.1.self_attn.o_proj.weight"]
            value = full_weight(parameter).clone()
            row, column = (value == 0).nonzero()[5].tolist()
            value[row, column] = 0.25
            set_full_weight(parameter, value)
        return True


def main(run: RunFolder) -> str:
    tokenise(run)
    session = build_session(run, lambda: False)
    assert any(isinstance(one, FrozenZeros) for one in session.objectives)
    if "cut" in run.path.name:
        session.stop_requested = lambda: session.state.step >= 2
        assert not train(session)
        session = build_session(run, lambda: False)
    if "planted" in run.path.name:
        frozen.CHECK_EVERY_STEPS = 1
        session.objectives.append(Planted(session))
    try:
        assert train(session)
    except RunError as error:
        return f"step {session.state.step}: {error.given}"
    return "done"


if __name__ == "__main__":
    torch.set_num_threads(1)
    init_distributed()
    for name in sys.argv[1:]:
        said = main(RunFolder(Path(name)))
        if dist.get_rank() == 0:
            print(f"FOUND {json.dumps([said])}", flush=True)
    dist.barrier()
    os._exit(0)
