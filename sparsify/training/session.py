"""One rank's share of a run that trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from transformers import PreTrainedTokenizerFast

from sparsify.methods.live_model import Engine
from sparsify.methods.objective import Objective
from sparsify.mixture.sequences.reader import PackedSequence, SequenceReader
from sparsify.recipe.recipe import Recipe
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.state import TrainingState
from sparsify.training.performance import Performance
from sparsify.training.telemetry import Telemetry


class SuiteRunner(Protocol):
    def measure(self, session: Session) -> bool:
        """Evaluates the newest checkpoint; False when a rank has to stop before that is done."""
        ...


@dataclass(kw_only=True)
class Session:
    """The engine of one rank, its data and its counters.

    Attributes:
        held_out: Validation sequences of each source.
        shares: Token share of each source.
        stop_requested: Whether this rank has to stop.
        objectives: What methods do around each step.
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
    objectives: list[Objective] = field(default_factory=list)
    suite: SuiteRunner | None = None
    saved: TrainingState | None = None

    def record(self, kind: str, message: str = "", *, step: int | None = None, **fields: Any) -> None:
        state = self.state
        step = state.step if step is None else step
        self.telemetry.record(kind, step, state.seen_tokens, message, **fields)

    def model_changed(self) -> None:
        self.state = replace(self.state, recent_losses=[], recent_rises=[])
        self.update_methods()

    def update_methods(self) -> None:
        methods = {one.name: state for one in self.objectives if (state := one.state())}
        self.state = replace(self.state, methods=methods)

    def restore(self, state: TrainingState) -> None:
        self.state = state
        for one in self.objectives:
            one.load_state(state.methods.get(one.name, {}))
