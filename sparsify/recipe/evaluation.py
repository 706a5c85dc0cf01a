"""What is measured while a run trains, and after it: `eval`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from sparsify.errors import RecipeError
from sparsify.recipe.fields import NonNegativeInt, PositiveInt, Section


@dataclass
class EvalSection(Section):
    """What to measure during and after training. The files stand in `eval/`."""

    name: str
    every_tokens: PositiveInt
    """Cadence of validation loss and of the sparsity probe."""
    evaluation_files: list[str] = field(default_factory=list)
    """Paths or globs of evaluation sets, formats as in `SourceSection.files`: what `mixture.decontaminate_against` means
    by this suite's name."""
    validation_sequences_per_source: PositiveInt = 16
    report_tokens: PositiveInt = 32_768
    """Held-out tokens that the sparsity report rests on."""
    report_curve_tokens: NonNegativeInt = 0
    """Of these, tokens for CETT, CETT-PPL and top-k curves, which need about 35 passes over them; 0 leaves the curves out."""
    sample_prompts: list[str] = field(default_factory=list)
    """Pretraining-style prompts that the exported checkpoint continues in a fresh process."""
    sample_tokens: NonNegativeInt = 48
    suite: str | None = None
    """Tasks of lm-evaluation-harness that are asked while the run trains: a suite in `eval/suites`, or the path of a .yaml."""
    suite_every_tokens: PositiveInt | None = None
    """A multiple of `checkpoint.every_tokens`: the suite is asked of what was just saved. Null asks at every checkpoint. The end
    of the budget is always asked."""
    suite_limit: PositiveInt | None = None
    """Only the first so many items of each task; null asks all."""
    suite_data_dir: str | None = None
    """Folder of local copies of the evaluation sets; null takes what SPARSIFY_EVAL_DATA names, or else the Hub's data."""
    suite_batch_size: PositiveInt = 8
    """Requests of one forward pass."""


def check_suite(settings: EvalSection, checkpoint_every: int) -> None:
    """Refuses settings of a suite that is not asked, and times at which nothing is saved.

    Raises:
        RecipeError: Naming the setting.
    """
    every = checkpoint_every
    if settings.suite is None:
        for field in fields(EvalSection):
            value = getattr(settings, field.name)
            if field.name.startswith("suite_") and value != field.default:
                raise RecipeError(
                    f"eval.{field.name}={value} would be ignored: no suite is asked.",
                    next_step="Set eval.suite too, or leave it out.",
                )
        return
    suite_every = settings.suite_every_tokens
    if suite_every is not None and suite_every % every:
        raise RecipeError(
            f"eval.suite_every_tokens is {suite_every}, where no checkpoint is saved.",
            allowed=f"A multiple of checkpoint.every_tokens ({every}): a suite is asked of what was just saved.",
            next_step=f"Set eval.suite_every_tokens={math.ceil(suite_every / every) * every}.",
        )
