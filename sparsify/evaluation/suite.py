"""Suites: which tasks to run, with how many shots, and which metric is the score."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsify.errors import EvaluationError, nearest
from sparsify.metadata import read_yaml, user_path
from sparsify.recipe.catalogue import YAML, folder


class SuiteTask(BaseModel):
    model_config = ConfigDict(extra="forbid")

    shots: int = Field(0, ge=0)
    """Number of few-shot examples before each item."""
    metric: str = "acc"
    """The metric that is the score; the task's other metrics are recorded too."""
    limit: int | None = Field(None, gt=0)
    """Maximum number of items; None for all."""
    task: str | None = None
    """Path of a task file of lm-evaluation-harness; default: the file of this name in `eval/tasks`."""


class Suite(BaseModel):
    """An evaluation suite."""

    model_config = ConfigDict(extra="forbid")

    name: str
    description: str = ""
    tasks: dict[str, SuiteTask] = {}
    held_out_sequences_per_source: int = Field(0, ge=0)
    """Held-out sequences per source of the mixture to measure perplexity on; 0 for none."""
    prompts: list[str] = []
    """Prompts that the model continues, as samples to read."""
    prompt_tokens: int = Field(48, gt=0)
    """Length of each continuation in tokens."""


def suite_names() -> list[str]:
    return sorted(path.stem for path in (folder("eval") / "suites").glob("*.yaml"))


def load_suite(name_or_path: str) -> Suite:
    """Reads a suite by its name or the path of a YAML file.

    Raises:
        EvaluationError: If it does not exist or is not a valid suite.
    """
    own = user_path(name_or_path)
    path = own if own.suffix in YAML else folder("eval") / "suites" / f"{name_or_path}.yaml"
    if not path.is_file():
        raise EvaluationError(
            f"There is no suite {name_or_path!r}.",
            allowed=f"{nearest(name_or_path, suite_names())}Suites: {', '.join(suite_names())}; "
            "or the path of a YAML file.",
        )
    try:
        suite = Suite.model_validate(read_yaml(path, EvaluationError))
    except ValidationError as error:
        raise EvaluationError(
            f"{path} is not a valid suite: {_reason(error)}.",
            allowed="name, description, tasks (each with shots, metric, limit, task), held_out_sequences_per_source, prompts, prompt_tokens.",
            next_step=f"Start from a copy of {folder('eval') / 'suites' / 'commonsense.yaml'}.",
        ) from error
    if not suite.tasks and not suite.held_out_sequences_per_source:
        raise EvaluationError(
            f"{path} measures nothing.",
            allowed="At least one task, or held_out_sequences_per_source above 0.",
        )
    for task in suite.tasks.values():
        if task.task is not None:
            task.task = str(path.parent / user_path(task.task))
    return suite


def only(suite: Suite, names: list[str]) -> Suite:
    """A suite with only the named tasks, and without held-out text.

    Raises:
        EvaluationError: If it does not have one of the tasks.
    """
    for name in names:
        if name not in suite.tasks:
            raise EvaluationError(
                f"Suite {suite.name} has no task {name!r}.",
                allowed=f"{nearest(name, suite.tasks)}Its tasks: {', '.join(suite.tasks) or 'none'}.",
            )
    chosen = {name: suite.tasks[name] for name in names}
    return suite.model_copy(update={"tasks": chosen, "held_out_sequences_per_source": 0})


def _reason(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
