"""Suites: what to measure, with how many shots, and which number of it is the score."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from yaml import YAMLError

from sparsify.errors import EvaluationError, nearest
from sparsify.recipe.catalogue import YAML, folder


class SuiteTask(BaseModel):
    """One task of a suite."""

    model_config = ConfigDict(extra="forbid")

    shots: int = Field(0, ge=0)
    """Solved items that stand before each item."""
    metric: str = "acc"
    """The number that counts as the score; the task's others are recorded beside it."""
    limit: int | None = Field(None, gt=0)
    """Only the first so many items."""
    task: str | None = None
    """Path of a task file of lm-evaluation-harness; the one of this name in `eval/tasks` unless given."""


class Suite(BaseModel):
    """What to measure."""

    model_config = ConfigDict(extra="forbid")

    name: str
    description: str = ""
    tasks: dict[str, SuiteTask] = {}
    held_out_sequences_per_source: int = Field(0, ge=0)
    """Held-out sequences of each source of the mixture that perplexity is measured on; 0 for none."""
    prompts: list[str] = []
    """What the model is to go on from, so that a person sees what numbers hide."""
    prompt_tokens: int = Field(48, gt=0)
    """Length of each continuation."""


def suite_names() -> list[str]:
    """Names of the shipped suites, sorted."""
    return sorted(path.stem for path in (folder("eval") / "suites").glob("*.yaml"))


def load_suite(name_or_path: str) -> Suite:
    """Reads a suite by its name or the path of a YAML file.

    Raises:
        EvaluationError: If there is none, or it is not one.
    """
    own = Path(name_or_path).expanduser()
    path = own if own.suffix in YAML else folder("eval") / "suites" / f"{name_or_path}.yaml"
    if not path.is_file():
        raise EvaluationError(
            f"There is no suite {name_or_path!r}.",
            allowed=f"{nearest(name_or_path, suite_names())}Suites: {', '.join(suite_names())}; "
            "or the path of a YAML file.",
        )
    try:
        suite = Suite.model_validate(OmegaConf.to_container(OmegaConf.load(path)))
    except (OSError, YAMLError, OmegaConfBaseException, ValidationError) as error:
        raise EvaluationError(
            f"{path} is no suite: {_reason(error)}.",
            allowed="name, description, tasks (each with shots, metric, limit, task), held_out_sequences_per_source, prompts, prompt_tokens.",
            next_step=f"Begin with a copy of {folder('eval') / 'suites' / 'commonsense.yaml'}.",
        ) from error
    if not suite.tasks and not suite.held_out_sequences_per_source:
        raise EvaluationError(
            f"{path} measures nothing.",
            allowed="At least one task, or held_out_sequences_per_source above 0.",
        )
    for task in suite.tasks.values():
        if task.task is not None:
            task.task = str(path.parent / Path(task.task).expanduser())
    return suite


def only(suite: Suite, names: list[str]) -> Suite:
    """A suite with some of its tasks alone, and without held-out text.

    Raises:
        EvaluationError: If it has no such task.
    """
    for name in names:
        if name not in suite.tasks:
            raise EvaluationError(
                f"Suite {suite.name} has no task {name!r}.",
                allowed=f"{nearest(name, suite.tasks)}Its tasks: {', '.join(suite.tasks) or 'none'}.",
            )
    chosen = {name: suite.tasks[name] for name in names}
    return suite.model_copy(update={"tasks": chosen, "held_out_sequences_per_source": 0})


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).splitlines()[0]
