"""The seam between methods and training: what a method may do around each step, and which methods take part in a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch

from sparsify.methods import import_all
from sparsify.methods.live_model import Engine
from sparsify.mixture.sequences.reader import SequenceReader
from sparsify.recipe.recipe import Recipe
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.state import TrainingState


@dataclass(frozen=True)
class MicroBatch:
    """What one rank passes through the model at a time.

    Every label of the global batch weighs the same. DeepSpeed averages gradients over ranks, so a sum over this rank's labels
    counts `label_weight` = ranks / labels of the global batch; a mean over a micro-batch's tokens is divided by `per_step`.

    Attributes:
        tensors: `input_ids`, `position_ids` and `labels`, [sequences, tokens] each, on the engine's device.
        label_weight: Factor of a sum over the labels.
        per_step: Micro-batches of a rank in a step.
    """

    tensors: dict[str, torch.Tensor]
    label_weight: float
    per_step: int


class TrainingRun(Protocol):
    """What an objective may use of the run that trains; `sparsify.training.session.Session` is one."""

    recipe: Recipe
    run: RunFolder
    engine: Engine
    reader: SequenceReader
    state: TrainingState
    stop_requested: Callable[[], bool]

    def record(self, kind: str, message: str = "", *, step: int | None = None, **fields: Any) -> None:
        """Adds a line to metrics.jsonl and a sentence to the log; `step` is that of the state where it is not given."""
        ...

    def model_changed(self) -> None:
        """Says that the model was changed outside a step: earlier losses do not predict the next one."""
        ...


class Objective(Protocol):
    """What a method adds to the loss of a step or does around it. Every hook does nothing unless a method overrides it.

    All ranks call every hook, in the same order. An objective does not depend on the order of objectives.

    Attributes:
        name: Key of its state in a checkpoint, and of its field in a step's line in metrics.jsonl.
        forward_options: What the model is called with in addition.
    """

    name: ClassVar[str]
    forward_options: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def of(cls, run: TrainingRun) -> Self | None:
        """The objective of a run; None where its recipe does not ask for it. The engine is built by now."""
        ...

    def between_steps(self) -> bool:
        """Before a step's data is waited for: the place to change weights.

        Returns:
            False when any rank has to stop before it was done; the same on every rank.
        """
        return True

    def step(self) -> AbstractContextManager[object]:
        """Around the forward and backward passes of a step, and of the dry run before the first."""
        return nullcontext()

    def before_forward(self, batch: MicroBatch) -> None:
        """Before each micro-batch."""

    def loss(self, batch: MicroBatch, output: Any) -> torch.Tensor | None:
        """What is added to a micro-batch's loss. []"""
        return None

    def after_step(self, loss: float) -> dict[str, Any]:
        """After a step that changed the weights, with its mean cross-entropy in nats; `state` counts the step already.

        Returns:
            What the step's line in metrics.jsonl holds of it.
        """
        return {}

    def before_validation(self) -> dict[str, Any]:
        """Makes the model ready to be validated as it is after the newest step.

        Returns:
            What the validation's lines hold in addition; `label` where the model is not yet what it is to become.
        """
        return {}

    def before_save(self) -> None:
        """Before a checkpoint is saved: the place to refuse what must not be kept. Raises UserError."""

    def as_saved(self) -> AbstractContextManager[object]:
        """Makes the model compute what a checkpoint saved now computes after loading."""
        return nullcontext()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON can hold it: `TrainingState.methods[name]`."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned; an empty dict before the first step."""


_OBJECTIVES: list[type[Objective]] = []


Kind = TypeVar("Kind", bound=type[Objective])


def objective(kind: Kind) -> Kind:
    """Class decorator: the objective takes part in every run whose recipe asks for it."""
    _OBJECTIVES.append(kind)
    return kind


def objectives_of(run: TrainingRun) -> list[Objective]:
    """The objectives that a run's recipe asks for, by name, with the state of the run's newest checkpoint."""
    import_all()
    found = [one for kind in _OBJECTIVES if (one := kind.of(run)) is not None]
    found.sort(key=lambda one: one.name)
    for one in found:
        one.load_state(run.state.methods.get(one.name, {}))
    return found


@contextmanager
def as_saved(objectives: Sequence[Objective]) -> Iterator[None]:
    """Makes the model compute, within the block, what a checkpoint saved now computes after loading."""
    with ExitStack() as stack:
        for one in objectives:
            stack.enter_context(one.as_saved())
        yield
