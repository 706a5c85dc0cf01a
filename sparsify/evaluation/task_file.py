"""Task files of lm-evaluation-harness: reading one executes nothing. Its code is imported when the task runs, if it may be."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsify.errors import EvaluationError
from sparsify.metadata import checked_yaml, reason_of
from sparsify.recipe.catalogue import folder

MAX_INCLUDES = 16


@dataclass(frozen=True)
class Function:
    """`!function MODULE.NAME` of a task file, not imported.

    Attributes:
        file: The task file that names it.
    """

    name: str
    file: Path

    @property
    def is_shipped(self) -> bool:
        """Whether a file of this package or of lm-evaluation-harness names it: installed software."""
        return any(root in self.file.parents for root in _shipped_roots())

    def load(self) -> Any:
        from lm_eval.tasks._yaml_loader import _import_func_in_yml  # pyright: ignore[reportPrivateUsage]

        return _import_func_in_yml(self.name, self.file.parent)


class _Loader(yaml.SafeLoader):
    """Keeps `!function` as what it says; any other tag that is not plain YAML is refused."""

    file: Path


def _function(loader: _Loader, node: yaml.ScalarNode) -> Function:
    return Function(str(loader.construct_scalar(node)), loader.file)


_Loader.add_constructor("!function", _function)


def read_task_file(path: Path, included_by: Sequence[Path] = ()) -> dict[str, Any]:
    """The content of a task file with what it includes, and a `Function` for every function.

    Raises:
        EvaluationError: If it cannot be read.
    """
    file = path.resolve()
    text = checked_yaml(file, EvaluationError)
    if file in included_by or len(included_by) > MAX_INCLUDES:
        raise EvaluationError(f"{path} includes itself, or more than {MAX_INCLUDES} files in a row.")
    loader = _Loader(text)
    loader.file = file
    try:
        config = loader.get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise EvaluationError(f"{path} is not a valid task file: {reason_of(error)}.") from error
    finally:
        loader.dispose()
    fields: dict[str, Any] = config if isinstance(config, dict) else {}
    included = fields.pop("include", [])
    names: list[Any] = included if isinstance(included, list) else [included]
    if not fields or not all(isinstance(name, str) for name in [*names, *fields]):
        raise EvaluationError(
            f"{path} is not a valid task file.",
            allowed="Settings, each KEY: VALUE; include: the path of a task file, or several.",
        )
    merged: dict[str, Any] = {}
    for name in names:
        other = file.parent / name
        if not other.is_file():
            raise EvaluationError(f"{path} includes {name}, which is not there.")
        merged |= read_task_file(other, [*included_by, file])
    return merged | fields


def foreign_code(config: dict[str, Any]) -> list[str]:
    """What running a task would import that is neither of this package nor of lm-evaluation-harness, one name each."""
    found = dict.fromkeys(f"{one.name} ({one.file})" for one in _functions(config) if not one.is_shipped)
    return [*found, *(f"the metric {name}, a script of the evaluate library" for name in _metric_scripts(config))]


def with_functions(value: Any) -> Any:
    """The same content with every `Function` imported. Executes the modules that they are in."""
    if isinstance(value, Function):
        return value.load()
    if isinstance(value, dict):
        return {key: with_functions(one) for key, one in value.items()}
    return [with_functions(one) for one in value] if isinstance(value, list) else value


def _functions(value: Any) -> Iterator[Function]:
    if isinstance(value, Function):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _functions(one)


def _metric_scripts(config: dict[str, Any]) -> list[str]:
    """Metrics that lm-evaluation-harness does not have: it would load a script of this name, from here or from the Hub."""
    given = config.get("metric_list")
    metrics = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    if not metrics:
        return []
    import lm_eval.api.metrics  # noqa: F401  # registers them
    from lm_eval.api.registry import metric_registry

    names = [(one.get("metric"), bool(one.get("hf_evaluate"))) for one in metrics]
    return [name for name, script in names if isinstance(name, str) and (script or name not in metric_registry)]


def _shipped_roots() -> list[Path]:
    harness = importlib.util.find_spec("lm_eval")
    places = [*(harness.submodule_search_locations or [])] if harness else []
    return [(folder("eval") / "tasks").resolve(), *(Path(place).resolve() / "tasks" for place in places)]
