"""One of two ranks that trains with the blending, the penalty or the target: RUN_DIR… in turn, each to its end.

A folder with `cut` in its name is stopped on the way, saved, and gone on with by a new session.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch.distributed as dist

from sparsify.methods.objective import Objective, TrainingRun, objective
from sparsify.runs.run_folder import RunFolder
from sparsify.training.deepspeed_engine import init_distributed
from sparsify.training.loop import train
from sparsify.training.worker import build_session
from tests.ranks import tokenise


@objective
class StepCount(Objective):
    """A method that the product does not know: its field is in every step's line, and its state in the checkpoints."""

    name: ClassVar[str] = "step_count"

    def __init__(self) -> None:
        self._steps = self._forwards = 0

    @classmethod
    def of(cls, run: TrainingRun) -> Self:
        return cls()

    @contextmanager
    def step(self) -> Iterator[None]:
        self._forwards = 0
        yield

    def before_forward(self, batch: Any) -> None:
        self._forwards += 1

    def after_step(self, loss: float) -> dict[str, Any]:
        self._steps += 1
        return {self.name: [self._steps, self._forwards]}

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state(self, state: dict[str, Any]) -> None:
        self._steps = state.get("steps", 0)


def main(run: RunFolder) -> None:
    recipe = run.load_recipe()
    tokenise(run)
    session = build_session(run, lambda: False)
    if "cut" in run.path.name:
        session.stop_requested = lambda: session.state.step + 1 >= recipe.num_steps // 6
        assert not train(session)
        session = build_session(run, lambda: False)
    assert train(session)


if __name__ == "__main__":
    init_distributed()
    for name in sys.argv[1:]:
        main(RunFolder(Path(name)))
        if dist.get_rank() == 0:
            print('FOUND ["done"]', flush=True)
    dist.barrier()
    os._exit(0)
