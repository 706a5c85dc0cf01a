"""One rank's share of a run that trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerFast

from sparsify.methods.distillation import Teacher
from sparsify.methods.live_model import Engine
from sparsify.mixture.sequences.reader import PackedSequence, SequenceReader
from sparsify.recipe.recipe import Recipe
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.state import TrainingState
from sparsify.training.performance import Performance
from sparsify.training.telemetry import Telemetry


class Suite(Protocol):
    """What is evaluated at checkpoints."""

    def measure(
        self,
        engine: Engine,
        state: TrainingState,
        telemetry: Telemetry,
        stop_requested: Callable[[], bool],
    ) -> bool:
        """Evaluates the checkpoint of this state; False when a rank was asked to stop before that was done."""
        ...


@dataclass(kw_only=True)
class Session:
    """The engine of one rank, its data and its counters.

    Attributes:
        held_out: Validation sequences of each source.
        shares: Token share of each source.
        stop_requested: Whether this rank was asked to stop.
        teacher: The dense source, where the recipe distils from it.
        suite: What is evaluated at checkpoints, where the recipe names a suite.
        saved: The state that the newest checkpoint holds, or None before the first.
    """

    recipe: Recipe
    run: RunFolder
    engine: Engine
    reader: SequenceReader
    held_out: Mapping[str, Sequence[PackedSequence]]
    shares: Mapping[str, float]
    telemetry: Telemetry
    state: TrainingState
    stop_requested: Callable[[], bool]
    performance: Performance
    tokenizer: PreTrainedTokenizerFast
    teacher: Teacher | None = None
    suite: Suite | None = None
    saved: TrainingState | None = None
