"""Tasks of lm-evaluation-harness: ours on local copies, or the standard ones on the Hub's data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsify.errors import EvaluationError, nearest
from sparsify.evaluation.suite import Suite, SuiteTask
from sparsify.recipe.catalogue import folder

HUB_TASKS = {"truthfulqa": "truthfulqa_mc2", "lambada": "lambada_openai", "wikitext2": "wikitext"}
"""Our name of a task -> the harness's name, where they differ."""
FEWSHOT_SEED = 1234
"""The default of lm-evaluation-harness."""


@dataclass(frozen=True)
class TaskSource:
    """Where one task of a suite comes from.

    Attributes:
        name: Name of the task in the suite.
        settings: The suite's settings for the task.
        config: Content of the task file, with absolute paths of data files; None for the Hub's standard task.
        files: Local data files, by split.
    """

    name: str
    settings: SuiteTask
    config: dict[str, Any] | None
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def data(self) -> str:
        """Description of where the items come from."""
        if self.config is None:
            return f"the Hub's {HUB_TASKS.get(self.name, self.name)}"
        names = ", ".join(path.name for path in self.files.values())
        return f"local copies: {names}" if names else "this Python installation"


def task_sources(suite: Suite, data_dir: Path | None) -> list[TaskSource]:
    """Finds every task of a suite and its data, without reading the data.

    Args:
        suite: The suite.
        data_dir: Folder of local copies; None uses the Hub's standard tasks where a task needs files.

    Raises:
        EvaluationError: If a task is unknown, or data is missing.
    """
    sources = [_task_source(name, settings, data_dir, suite) for name, settings in suite.tasks.items()]
    missing = {one.name: [path for path in one.files.values() if not path.is_file()] for one in sources}
    if any(missing.values()):
        names = dict.fromkeys(path.name for paths in missing.values() for path in paths)
        there = ",".join(name for name, paths in missing.items() if not paths)
        raise EvaluationError(
            f"Suite {suite.name} needs data that is not in {data_dir}: {', '.join(names)}.",
            allowed="Local copies with the file names of eval/tasks; docs/evaluating.md describes their content.",
            next_step="Put the files there, give another folder by --data-dir or SPARSIFY_EVAL_DATA, or omit both "
            "to read the Hub's data."
            + (f" --tasks {there} runs only the tasks whose files are there." if there else ""),
        )
    return sources


def task_names() -> list[str]:
    """Sorted names of the task files in `eval/tasks`."""
    return sorted(path.stem for path in (folder("eval") / "tasks").glob("*.yaml"))


def _task_source(name: str, settings: SuiteTask, data_dir: Path | None, suite: Suite) -> TaskSource:
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(settings.task) if settings.task else folder("eval") / "tasks" / f"{name}.yaml"
    if not path.is_file():
        if settings.task is None and data_dir is None:
            return TaskSource(name, settings, None)
        raise EvaluationError(
            f"Suite {suite.name}: there is no task {name!r} ({path}).",
            allowed=f"{nearest(name, task_names())}Tasks: {', '.join(task_names())}; without --data-dir, any standard "
            "task of lm-evaluation-harness.",
        )
    try:
        config = load_yaml(path)
    except Exception as error:  # whatever a user's task file makes Python raise
        raise EvaluationError(f"{path} is not a valid task file: {error}") from error
    named = (config.get("dataset_kwargs") or {}).get("data_files")
    if not named:
        return TaskSource(name, settings, config | {"task": name})
    base = data_dir if data_dir is not None else path.parent if settings.task else None
    if base is None:
        return TaskSource(name, settings, None)
    files = {split: base.absolute() / file for split, file in named.items()}
    kwargs = config["dataset_kwargs"] | {"data_files": {key: str(file) for key, file in files.items()}}
    return TaskSource(name, settings, config | {"task": name, "dataset_kwargs": kwargs}, files)


def build_tasks(source: TaskSource) -> dict[str, Any]:
    """Loads the data of a task and prepares its items.

    Returns:
        lm-evaluation-harness's tasks by name: one, or one per subject (MMLU).

    Raises:
        EvaluationError: If the data cannot be loaded, or does not have the task's format.
    """
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings refer to its own command line
    datasets.disable_progress_bars()
    try:
        tasks = _hub_tasks(source) if source.config is None else _local_tasks(source.config)
    except EvaluationError:
        raise
    except Exception as error:  # the exception for a missing network, file or column differs between tasks
        raise EvaluationError(
            f"Task {source.name} cannot be prepared from {source.data}: "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            next_step="Check the files in --data-dir."
            if source.config is not None
            else "Give a folder of local copies by --data-dir or SPARSIFY_EVAL_DATA, or check the network.",
        ) from error
    for task in tasks.values():
        task.set_config(key="num_fewshot", value=source.settings.shots)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return tasks


def check_hub_names(sources: Sequence[TaskSource]) -> None:
    """Refuses Hub tasks that lm-evaluation-harness does not know, without network access.

    Raises:
        EvaluationError: With the nearest known name.
    """
    from lm_eval.tasks import TaskManager

    hub = [source.name for source in sources if source.config is None]
    manager = TaskManager() if hub else None
    for name in hub:
        _known(manager, HUB_TASKS.get(name, name))


def _hub_tasks(source: TaskSource) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    name = _known(manager, HUB_TASKS.get(source.name, source.name))
    return dict(manager.load([name])["tasks"])


def _known(manager: Any, name: str) -> str:
    if name not in manager.task_index:
        raise EvaluationError(
            f"There is no task {name!r}.",
            allowed=f"{nearest(name, manager.all_tasks)}Standard tasks of lm-evaluation-harness, and "
            f"{', '.join(task_names())}.",
        )
    return name


def _local_tasks(config: dict[str, Any]) -> dict[str, Any]:
    from lm_eval.api.task import ConfigurableTask

    metadata = config.get("metadata") or {}
    column = metadata.get("split_by")
    if column is None:
        return {config["task"]: ConfigurableTask(config=dict(config))}
    import datasets

    whole: Any = datasets.load_dataset(config["dataset_path"], **config["dataset_kwargs"])
    tasks = {}
    for value in sorted(set(whole[config["test_split"]][column])):
        name = f"{config['task']}_{value}"
        own = {
            "task": name,
            "custom_dataset": _only(whole, column, value),
            "description": metadata["description"].format(value.replace("_", " ")),
            "dataset_kwargs": None,
        }
        tasks[name] = ConfigurableTask(config=config | own)
    return tasks


def _only(whole: Any, column: str, value: str) -> Callable[..., Any]:
    indices = {split: [row for row, own in enumerate(rows[column]) if own == value] for split, rows in whole.items()}
    return lambda **_: {split: rows.select(indices[split]) for split, rows in whole.items()}
