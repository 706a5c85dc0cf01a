"""The section `eval`: measurements during and after training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated

from pydantic import Field

from sparsify.errors import RecipeError
from sparsify.recipe.fields import NonNegativeInt, PositiveInt, Section


@dataclass
class EvalSection(Section):
    """What to measure during and after training. The shipped options are files in `eval/`."""

    name: str
    every_tokens: PositiveInt
    """Cadence of validation loss and of the sparsity probe."""
    evaluation_files: list[str] = field(default_factory=list)
    """Paths or globs of evaluation sets, formats as in `SourceSection.files`: what `mixture.decontaminate_against` means
    by this suite's name."""
    validation_sequences_per_source: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    report_tokens: PositiveInt = 32_768
    """Held-out tokens of the sparsity report."""
    report_curve_tokens: NonNegativeInt = 0
    """Of these, tokens for CETT, CETT-PPL and top-k curves, which need about 35 passes over them; 0: no curves."""
    sample_prompts: list[str] = field(default_factory=list)
    """Pretraining-style prompts that the exported checkpoint continues in a fresh process."""
    sample_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 48
    time_decoding: bool = False
    """Whether `sparsify train` times the export's decoding at the end, dense and sparse, on this machine's CPU."""
    suite: str | None = None
    """Suite of lm-evaluation-harness tasks to evaluate during training: a name in `eval/suites`, or the path of a .yaml."""
    suite_every_tokens: PositiveInt | None = None
    """Interval between evaluations of the suite, a multiple of `checkpoint.every_tokens`; null evaluates every checkpoint. The
    last checkpoint is always evaluated."""
    suite_limit: PositiveInt | None = None
    """Number of items of each task, the first ones; null evaluates all."""
    suite_data_dir: str | None = None
    """Folder of local copies of the evaluation sets; null takes $SPARSIFY_EVAL_DATA if it is set, and the Hub's data otherwise."""
    suite_batch_size: Annotated[int, Field(ge=1, le=65_536)] = 8
    """Requests per forward pass."""


def check_suite(settings: EvalSection, checkpoint_every: int) -> None:
    """Refuses settings of a suite that is not set, and an interval that misses checkpoints.

    Raises:
        RecipeError: Naming the setting.
    """
    every = checkpoint_every
    if settings.suite is None:
        for field in fields(EvalSection):
            value = getattr(settings, field.name)
            if field.name.startswith("suite_") and value != field.default:
                raise RecipeError(
                    f"eval.{field.name}={value} would be ignored: eval.suite is not set.",
                    next_step="Set eval.suite too, or omit it.",
                )
        return
    suite_every = settings.suite_every_tokens
    if suite_every is not None and suite_every % every:
        raise RecipeError(
            f"eval.suite_every_tokens is {suite_every}, where no checkpoint is saved.",
            allowed=f"A multiple of checkpoint.every_tokens ({every}): a suite evaluates a saved checkpoint.",
            next_step=f"Set eval.suite_every_tokens={math.ceil(suite_every / every) * every}.",
        )
