"""Tasks of lm-evaluation-harness: ours on local copies, or the standard ones on the Hub's data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsify.errors import EvaluationError, nearest
from sparsify.evaluation.suite import Suite, SuiteTask
from sparsify.evaluation.task_file import foreign_code, read_task_file, with_functions
from sparsify.recipe.catalogue import folder
from sparsify.trust import code_is_trusted, forget_secrets

logger = logging.getLogger(__name__)

HUB_TASKS = {"truthfulqa": "truthfulqa_mc2", "lambada": "lambada_openai", "wikitext2": "wikitext"}
"""Our name of a task -> the harness's name, where they differ."""
FEWSHOT_SEED = 1234
"""The default of lm-evaluation-harness."""


@dataclass(frozen=True)
class TaskSource:
    """Where one task of a suite comes from.

    Attributes:
        config: Content of the task file, with absolute paths of data files; None for the Hub's standard task.
        files: Local data files, by split.
        code: What running it imports that is neither ours nor of lm-evaluation-harness, one name each.
    """

    name: str
    settings: SuiteTask
    config: dict[str, Any] | None
    files: dict[str, Path] = field(default_factory=dict)
    code: list[str] = field(default_factory=list)

    @property
    def data(self) -> str:
        if self.config is None:
            return f"the Hub's {HUB_TASKS.get(self.name, self.name)}"
        names = ", ".join(path.name for path in self.files.values())
        return f"local copies: {names}" if names else "this Python installation"


def task_sources(suite: Suite, data_dir: Path | None) -> list[TaskSource]:
    """Finds every task of a suite and its data, without reading the data.

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
    return sorted(path.stem for path in (folder("eval") / "tasks").glob("*.yaml"))


def _task_source(name: str, settings: SuiteTask, data_dir: Path | None, suite: Suite) -> TaskSource:
    path = Path(settings.task) if settings.task else folder("eval") / "tasks" / f"{name}.yaml"
    if not path.is_file():
        if settings.task is None and data_dir is None:
            return TaskSource(name, settings, None)
        raise EvaluationError(
            f"Suite {suite.name}: there is no task {name!r} ({path}).",
            allowed=f"{nearest(name, task_names())}Tasks: {', '.join(task_names())}; without --data-dir, any standard "
            "task of lm-evaluation-harness.",
        )
    config = read_task_file(path) | {"task": name}
    code = foreign_code(config)
    kwargs: Any = config.get("dataset_kwargs") or {}
    named: Any = kwargs.get("data_files") if isinstance(kwargs, dict) else kwargs
    if not named:
        return TaskSource(name, settings, config, code=code)
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise EvaluationError(
            f"{path} is not a valid task file: its dataset_kwargs are {str(kwargs)[:80]}.",
            allowed="dataset_kwargs: {data_files: {SPLIT: FILE}}.",
        )
    base = data_dir if data_dir is not None else path.parent if settings.task else None
    if base is None:
        return TaskSource(name, settings, None)
    files = {split: base.absolute() / file for split, file in named.items()}
    kwargs = kwargs | {"data_files": {key: str(file) for key, file in files.items()}}
    return TaskSource(name, settings, config | {"dataset_kwargs": kwargs}, files, code)


def check_code(sources: Sequence[TaskSource]) -> None:
    """Refuses tasks that run code of whoever wrote them, unless the user gave their word for it.

    Raises:
        EvaluationError: Naming the functions, and the files that name them.
    """
    code = [name for source in sources for name in source.code]
    if not code:
        return
    if not code_is_trusted():
        raise EvaluationError(
            f"The suite runs Python code of its own: {'; '.join(code)}.",
            allowed="Without your word, only tasks of plain YAML, and those that came with this package or with "
            "lm-evaluation-harness.",
            next_step="Read that code. If you trust it, add --trust-code to sparsify train, evaluate or reproduce --run.",
        )
    logger.warning(f"--trust-code: the suite runs {'; '.join(code)}")


def build_tasks(source: TaskSource) -> dict[str, Any]:
    """Loads the data of a task and prepares its items. A task with code that the user trusts is prepared, and from then on
    everything in this process runs, without the secrets of the environment.

    Returns:
        lm-evaluation-harness's tasks by name: one, or one per subject (MMLU).

    Raises:
        EvaluationError: If the data cannot be loaded, or does not have the task's format, or the task runs code that
            the user did not trust.
    """
    import datasets

    check_code([source])
    if source.code:
        forget_secrets()
    _sandbox_templates()

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
    """Raises EvaluationError for Hub tasks that lm-evaluation-harness does not know; needs no network."""
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

    config = with_functions(config)
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


def _sandbox_templates() -> None:
    """Lets templates of tasks compute with their item alone; the harness would let them call anything in Python."""
    import lm_eval.utils
    from jinja2.sandbox import SandboxedEnvironment

    own = lm_eval.utils.env
    if not isinstance(own, SandboxedEnvironment):
        settings = {name: getattr(own, name) for name in ("loader", "undefined", "keep_trailing_newline")}
        sandbox = SandboxedEnvironment(**settings)
        sandbox.filters |= own.filters
        lm_eval.utils.env = sandbox


def _only(whole: Any, column: str, value: str) -> Callable[..., Any]:
    indices = {split: [row for row, own in enumerate(rows[column]) if own == value] for split, rows in whole.items()}
    return lambda **_: {split: rows.select(indices[split]) for split, rows in whole.items()}
