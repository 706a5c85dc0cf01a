"""Training under a frozen mask of weights: what is zero where training begins is zero where it ends.

A weight of zero with a gradient of zero stays zero under AdamW: its moments are zero, and so is its decay. So gradients are set to
zero where the weight is; no optimiser state and no partition is written to, whatever the ZeRO stage. That the zeros hold is
not assumed: they are compared with those of the checkpoint that training started from, every CHECK_EVERY_STEPS steps and before
every save, in the optimiser's fp32 weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist

from sparsify.conversion.weight_zeros import TensorReader, part_of, sparse_tensors, weight_sparsity
from sparsify.errors import RecipeError, RunError
from sparsify.methods.live_model import full_weight
from sparsify.methods.objective import Objective, TrainingRun, objective

CHECK_EVERY_STEPS = 100


@objective
class FrozenZeros(Objective):
    """Keeps the zeros of a checkpoint whose `config.weight_sparsity` says that it has some."""

    name: ClassVar[str] = "weight_sparsity"

    def __init__(self, run: TrainingRun) -> None:
        self._run, self._config = run, run.engine.module.config
        self._parts = sparse_tensors(self._config)
        self._parameters = {
            name: parameter for name, parameter in run.engine.module.named_parameters() if name in self._parts
        }
        assert self._parameters.keys() == self._parts.keys()
        self._steps_since_check = 0
        for name, parameter in self._parameters.items():
            parameter.register_hook(partial(_without_gradient_at_zeros, name, parameter))

    @classmethod
    def of(cls, run: TrainingRun) -> Self | None:
        if weight_sparsity(run.engine.module.config) is None:
            return None
        milestones = run.recipe.blending.refit_milestones
        if milestones:
            raise RecipeError(
                f"blending.refit_milestones is {milestones}, and the model has sparse weights, which a refit would make dense.",
                next_step="Set blending.refit_milestones=0, or make the weights sparse after this run.",
            )
        return cls(run)

    def after_step(self, loss: float) -> dict[str, Any]:
        self._steps_since_check += 1
        if self._steps_since_check >= CHECK_EVERY_STEPS:
            self.check()
        return {}

    def before_save(self) -> None:
        self.check()

    @torch.no_grad()
    def check(self) -> None:
        """Compares the zeros with those that training started from; every rank calls it.

        Raises:
            RunError: If any is another number now.
        """
        self._steps_since_check = 0
        revived: dict[str, int] = {}
        initial = TensorReader(self._run.run.initial) if dist.get_rank() == 0 else None
        for name, parameter in self._parameters.items():
            value = full_weight(parameter)
            for on_disk, place in self._parts[name] if initial is not None else ():
                assert initial is not None
                was_zero = (initial(on_disk) == 0).to(value.device)
                if count := int(torch.count_nonzero(part_of(value, place)[was_zero])):
                    revived[on_disk] = count
        total = torch.tensor([sum(revived.values())], device=self._run.engine.device)
        dist.broadcast(total, 0)
        if not int(total):
            return
        first = next(iter(revived.items()), None)
        where = f", of them {first[1]:,} in {first[0]}" if first else ""
        raise RunError(
            f"{int(total):,} weights that were zero are not any more, at step {self._run.state.step:,}{where}.",
            allowed="A model with sparse weights keeps its zeros: they were frozen, so something else writes to them.",
            next_step="The last checkpoint has them all: the same command continues from it.",
        )


def _without_gradient_at_zeros(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
    # Under ZeRO-3 too a parameter is whole here: its layer's backward pass has just read it.
    assert parameter.shape == gradient.shape, f"{name} is not whole when its gradient comes"
    return gradient.masked_fill(parameter.detach() == 0, 0.0)
