"""What is measured while a run trains, and after it: `eval`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from omegaconf import MISSING

from sparsify.errors import RecipeError


@dataclass
class EvalSection:
    """What to measure during and after training. The files stand in `eval/`."""

    name: str = MISSING
    every_tokens: int = MISSING
    """Cadence of validation loss and of the sparsity probe."""
    evaluation_files: list[str] = field(default_factory=list)
    """Paths or globs of evaluation sets, formats as in `SourceSection.files`: what `mixture.decontaminate_against` means
    by this suite's name."""
    validation_sequences_per_source: int = 16
    report_tokens: int = 32_768
    """Held-out tokens that the sparsity report rests on."""
    report_curve_tokens: int = 0
    """Of these, tokens for CETT, CETT-PPL and top-k curves, which need about 35 passes over them; 0 leaves the curves out."""
    sample_prompts: list[str] = field(default_factory=list)
    """Pretraining-style prompts that the exported checkpoint continues in a fresh process."""
    sample_tokens: int = 48
    suite: str | None = None
    """Tasks of lm-evaluation-harness that are asked while the run trains: a suite in `eval/suites`, or the path of a .yaml."""
    suite_every_tokens: int | None = None
    """A multiple of `checkpoint.every_tokens`: the suite is asked of what was just saved. Null asks at every checkpoint. The end
    of the budget is always asked."""
    suite_limit: int | None = None
    """Only the first so many items of each task; null asks all."""
    suite_data_dir: str | None = None
    """Folder of local copies of the evaluation sets; null takes what SPARSIFY_EVAL_DATA names, or else the Hub's data."""
    suite_batch_size: int = 8
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
    for key in ("suite_every_tokens", "suite_limit", "suite_batch_size"):
        value = getattr(settings, key)
        if value is not None and value < 1:
            raise RecipeError(f"eval.{key} is {value}.", allowed="It must be above 0.")
    suite_every = settings.suite_every_tokens
    if suite_every is not None and suite_every % every:
        raise RecipeError(
            f"eval.suite_every_tokens is {suite_every}, where no checkpoint is saved.",
            allowed=f"A multiple of checkpoint.every_tokens ({every}): a suite is asked of what was just saved.",
            next_step=f"Set eval.suite_every_tokens={math.ceil(suite_every / every) * every}.",
        )
