"""Composes a recipe with Hydra: its file, the groups that it names, and overrides.

Errors of Hydra, OmegaConf and YAML as a `RecipeError` in terms of recipe settings.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, field, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from omegaconf.resolvers import oc

from sparsify.errors import RecipeError, UserError, nearest
from sparsify.files import write_text
from sparsify.metadata import read_yaml, user_path
from sparsify.recipe.catalogue import (
    GROUPS,
    RECIPE_GROUPS,
    YAML,
    folder,
    mixture_names,
    recipe_path,
)
from sparsify.recipe.fields import (
    Section,
    checked,
    hints,
    may_set,
    section_type,
    settings_of,
    unknown_setting,
)
from sparsify.recipe.identity import decides, named, override_key, run_name
from sparsify.recipe.mixture import MixtureSection, check_mixture
from sparsify.recipe.recipe import Recipe, validate

NO_SECTION = "Invalid type assigned"
NO_LIST = "Invalid value assigned: AnyNode is not a ListConfig, list or tuple"
OWN_FILE = "own_file"
"""Name under which a user's own file is registered as an option."""


_composing = ContextVar("composing", default=False)


@contextmanager
def recipe_errors(where: str, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Turns what Hydra, OmegaConf and YAML raise inside the block into a `RecipeError`. `${oc.env:…}` is refused there."""
    composing = _composing.set(True)
    try:
        yield
    except OverrideParseException as error:
        raise RecipeError(
            f"{error.override!r} is not an override.",
            allowed="Overrides are KEY=VALUE: activation=swiglu, training.seed=2, mixture=my_mixture.yaml.",
            next_step="Quote values with spaces, commas or brackets: 'model.source=\"my model\"'.",
        ) from error
    except MissingConfigException as error:
        raise _missing_option(error, where) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not YAML: {error}", next_step="Fix the line named above.") from error
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        chain = (error, error.__cause__, error.__context__)
        if refused := _refusal(error):
            raise RecipeError(
                f"{where}: {refused.given}", allowed=refused.allowed, next_step=refused.next_step
            ) from error
        cause = next((link for link in chain if isinstance(link, OmegaConfBaseException)), error)
        raise _setting_error(cause, where, overrides) from error
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError, OSError) as error:
        # Hydra asserts the form of overrides and defaults in many ways.
        said = "it nests too deep" if isinstance(error, RecursionError) else str(error).strip().partition("\n")[0]
        raise RecipeError(
            f"{where} and the overrides cannot be composed: {said or type(error).__name__}.",
            allowed="Overrides are KEY=VALUE: activation=swiglu, training.seed=2, mixture=my_mixture.yaml.",
        ) from error
    finally:
        _composing.reset(composing)


def _environment(name: str, *default: Any) -> Any:
    if not _composing.get():
        return oc.env(name, *default)
    raise RecipeError(
        f"${{oc.env:{name}}} would put a variable of your environment into the recipe, and so on the screen, into the run "
        "folder and into the bundle.",
        allowed="Interpolations of the recipe's own settings: ${training.seed}.",
        next_step="Write the value itself; no setting needs a secret.",
    )


OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


def _refusal(error: BaseException | None) -> UserError | None:
    """The `UserError` that a resolver raised, wherever Hydra and OmegaConf wrapped it."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _missing_option(error: MissingConfigException, where: str) -> RecipeError:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = sorted(set(error.options or []) - {OWN_FILE})
    own = f", or {group}=PATH.yaml on the command line" if group in GROUPS else ""
    if not options:
        groups = f"Groups: {', '.join((*RECIPE_GROUPS, *GROUPS))}."
        known = groups if group else "`sparsify recipes list` names those to build on."
    else:
        known = f"{nearest(option, options)}Allowed: {', '.join(options)}{own}."
    return RecipeError(f"{where}: there is no {group or 'recipe'} {option!r}.", allowed=known)


def _setting_error(cause: BaseException, where: str, overrides: Sequence[str]) -> RecipeError:
    key = getattr(cause, "full_key", None) or ""
    where = next((override for override in overrides if may_set(override, key)), where)
    said = str(cause).strip().partition("\n")[0].rstrip(".")
    if isinstance(cause, MissingMandatoryValue):
        return RecipeError(f"{where}: {key} is not set.", next_step=f"Set {key}=VALUE.")
    if said.startswith("Key '"):
        siblings = [name for name in getattr(cause, "parent_node", None) or () if name != "hydra"]
        return unknown_setting(key, siblings, where, settings_of(Recipe))
    if said.startswith(NO_SECTION):
        inner = [name for name in settings_of(Recipe) if name.startswith(f"{key}.")]
        return RecipeError(
            f"{where}: {key} is a section, not a single value.",
            allowed=f"Its settings: {', '.join(inner)}." if inner else "",
        )
    if said == NO_LIST:
        return RecipeError(
            f"{where}: {key} is a single value.",
            allowed="It must be a list, however short.",
            next_step=f"Write {key.rpartition('.')[2]}: [VALUE].",
        )
    return RecipeError(
        f"{where}: {said}." if not key or key in where or key in said else f"{where}: {key}: {said}.",
        next_step="`sparsify recipes show NAME` prints a recipe with all its settings and their types.",
    )


AnySection = TypeVar("AnySection", bound=Section)


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Expands `key=a,b` overrides into one list of overrides for each combination, as Hydra's multirun does.

    Raises:
        RecipeError: If an override cannot be read.
    """
    with recipe_errors("overrides", overrides):
        parsed = OverridesParser.create().parse_overrides([*map(_quoted, overrides)])
    fixed = [str(one.input_line) for one in parsed if not one.is_sweep_override()]
    axes = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        for one in parsed
        if one.is_sweep_override()
    ]
    given = next((line for line in overrides if line.startswith("run_dir=")), None)
    if given is None:
        _check_axes(parsed)
    combinations = []
    for chosen in map(list, itertools.product(*axes)):
        if given and chosen:
            base = given.partition("=")[2].strip("'\"")
            chosen.append(f"run_dir={base}/{named(chosen)}")
        combinations.append([*fixed, *chosen])
    return combinations


def _check_axes(parsed: Sequence[Override]) -> None:
    for one in parsed:
        key = str(one.get_key_element())
        if one.is_sweep_override() and not decides(override_key(key)):
            raise RecipeError(
                f"{one.input_line} does not change what is trained, so that all of its runs would share one folder.",
                next_step="Set run_dir=FOLDER too: each combination then gets a folder of its own in it.",
            )


def _quoted(override: str) -> str:
    """`run_dir=` with its value quoted: the name of a run's folder has commas, which Hydra reads as a sweep."""
    key, _, value = override.partition("=")
    if key != "run_dir" or not value or value[0] in "'\"":
        return override
    return "run_dir='{}'".format(value.replace("'", r"\'"))


def compose_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Composes a recipe with overrides and checks it.

    Args:
        name_or_path: A name in the catalogue or the path of a YAML file.
        overrides: Hydra overrides such as `activation=swiglu` or `training.budget_tokens=1_000_000`.
            `mixture=` and `eval=` also take the path of a YAML file. Those that change what is trained become part
            of `run_dir`, unless it is given.

    Raises:
        RecipeError: On unknown keys, wrong types, missing values and impossible combinations.
    """
    path = recipe_path(name_or_path)

    def composed(aside: _Aside) -> Any:
        with recipe_errors(path.name, overrides):
            taken = [_register_own_file(_quoted(override), aside) for override in overrides]
            _register_groups()
            _check_files(path, path.parent)
            with _hydra(path.parent):
                return _plain(compose(config_name=path.stem, overrides=[*taken, *_search_path(path)]))

    plain = _with_sources(composed, overrides)
    recipe = validate(_typed(Recipe, plain, path.name, overrides))
    recipe.run_dir = str(user_path(recipe.run_dir))
    telling = run_name(overrides)
    if telling and not any(override.startswith("run_dir=") for override in overrides):
        recipe.run_dir = f"{recipe.run_dir},{telling}"
    return recipe


def load_mixture(name_or_path: str) -> MixtureSection:
    """Reads one mixture by its name in the catalogue or the path of a YAML file, and checks it.

    Raises:
        RecipeError: If there is no such mixture, or it is not valid.
    """
    own = user_path(name_or_path)
    path = own if own.suffix in YAML else folder("data_mixtures") / f"{name_or_path}.yaml"
    if not path.is_file():
        names = mixture_names()
        raise RecipeError(
            f"There is no mixture {name_or_path!r}.",
            allowed=f"{nearest(name_or_path, names)}Mixtures: {', '.join(names)}; or the path of a YAML file.",
        )

    def composed(aside: _Aside) -> Any:
        with recipe_errors(path.name):
            option = _register_own_file(f"mixture={path}", aside)
            _register_groups()
            with _hydra(folder("recipes").resolve()):
                return _plain(compose(overrides=[f"+{option}"]))

    mixture = _typed(MixtureSection, _with_sources(composed, ())["mixture"], path.name)
    check_mixture(mixture)
    return mixture


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a composed recipe as YAML that `load_recipe` reads back."""
    write_text(path, to_yaml(recipe))


def to_yaml(section: Section) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(asdict(section)))  # type: ignore


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe that `save_recipe` wrote.

    Raises:
        RecipeError: If the file is missing, or not a recipe of this version.
    """
    if not path.is_file():
        raise RecipeError(f"There is no recipe {path}.", next_step="Give a run folder that `sparsify train` made.")
    with recipe_errors(str(path)):
        fields = read_yaml(path, RecipeError)
        plain = fields if _is_literal(fields) else _plain(OmegaConf.create(fields))
    return _typed(Recipe, plain, str(path))


def _plain(config: Any) -> Any:
    return _without_missing(OmegaConf.to_container(config, resolve=True))


def _typed(schema: type[AnySection], plain: Any, where: str, overrides: Sequence[str] = ()) -> AnySection:
    """Checks every key and value that Hydra composed."""
    key = "" if schema is Recipe else "mixture"
    if not isinstance(plain, dict):
        raise RecipeError(f"{where} is a list.", allowed="Settings: KEY: VALUE.")
    return checked(schema, plain, key=key, where=where, overrides=overrides)


def _without_missing(value: Any) -> Any:
    """Drops mandatory values that are not set, which OmegaConf writes as ???."""
    if isinstance(value, dict):
        return {key: _without_missing(one) for key, one in value.items() if one != "???"}
    return [_without_missing(one) for one in value] if isinstance(value, list) else value


def _skeleton(schema: type[Section]) -> type:
    """The same sections without types and bounds: Hydra refuses unknown keys by it, pydantic checks the values."""
    columns = []
    for one in fields(schema):  # pyright: ignore[reportArgumentType]
        hint = hints(schema)[one.name]
        if inner := section_type(hint):
            columns.append((one.name, (made := _skeleton(inner)), field(default_factory=made)))
            continue
        inner = section_type((get_args(hint) or (None,))[-1])
        kind: Any = get_origin(hint)[*get_args(hint)[:-1], _skeleton(inner)] if inner else Any  # pyright: ignore[reportIndexIssue]
        if one.default_factory is not dataclasses.MISSING:
            columns.append((one.name, kind, field(default_factory=one.default_factory)))
        else:
            default = "???" if one.default is dataclasses.MISSING else one.default
            columns.append((one.name, kind, field(default=default)))
    return make_dataclass(schema.__name__, columns)


@contextmanager
def _hydra(config_dir: Path) -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(config_dir), version_base="1.3"):
        yield


def _check_files(path: Path, root: Path, checked_before: frozenset[Path] = frozenset()) -> None:
    """Refuses a recipe that cannot be parsed within the limits, before Hydra parses it, with the files that it builds on."""
    if path in checked_before or not path.is_file():
        return
    fields = read_yaml(path, RecipeError)
    if "hydra" in fields:
        raise RecipeError(
            f"{path.name} has settings of Hydra itself, which can import code (hydra.searchpath).",
            allowed=f"Sections of a recipe: {', '.join(hints(Recipe))}.",
            next_step="Remove the section hydra.",
        )
    defaults = fields.get("defaults", [])
    if not isinstance(defaults, list):
        raise RecipeError(
            f"{path.name}: defaults is {str(defaults)[:80]!r}.",
            allowed="A list: [recipe_schema, activation: drelu, mixture: quickstart, engine: zero1, _self_].",
        )
    for default in defaults:
        named = default.items() if isinstance(default, dict) else [("", default)]
        for group, option in named:
            group = str(group).removeprefix("override ").removeprefix("optional ").partition("@")[0]
            if f"{group or option}".strip().lstrip("/").startswith("hydra"):
                raise RecipeError(
                    f"{path.name}: defaults has {group or option!r}, an option of Hydra itself.",
                    allowed=f"Groups: {', '.join((*RECIPE_GROUPS, *GROUPS))}.",
                )
            _check_files(root / group / f"{option}.yaml", root, checked_before | {path})


def _search_path(path: Path) -> list[str]:
    """Lets a recipe outside of the catalogue use the catalogue's recipes and groups."""
    root = folder("recipes").resolve()
    quoted = str(root).replace("'", r"\'")
    return [] if path.parent == root else [f"hydra.searchpath=['file://{quoted}']"]


@cache
def _register_groups() -> None:
    store = ConfigStore.instance()
    store.store(name="recipe_schema", node=_skeleton(Recipe))
    for group, folder_name in GROUPS.items():
        for path in folder(folder_name).glob("*.yaml"):
            store.store(group=group, name=path.stem, node=OmegaConf.load(path))


class _Aside:
    """Sources of a user's own mixture file that nothing changes while Hydra composes. Hydra copies every value a dozen
    times, which costs seconds for thousands of sources, so it composes without them.
    """

    def __init__(self, overrides: Sequence[str], *, takes: bool) -> None:
        keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
        self._takes = takes and "mixture.sources" not in keys and keys.count("mixture") <= 1
        self._overrides = "\n".join(overrides)
        self._order: list[str] = []
        self.sources: dict[str, Any] = {}

    def take(self, mixture: dict[str, Any]) -> dict[str, Any]:
        """A mixture file's content without those sources."""
        sources = mixture.get("sources")
        if not self._takes or not isinstance(sources, dict) or "defaults" in mixture:
            return mixture
        self._order = list(sources)
        self.sources = {
            name: source
            for name, source in sources.items()
            if isinstance(source, dict) and name not in self._overrides and _is_literal(source)
        }
        return mixture | {"sources": {name: one for name, one in sources.items() if name not in self.sources}}

    def put_back(self, mixture: Any) -> bool:
        """Adds them to the composed mixture, in the order of the file; not if the recipe changes one of them."""
        composed = mixture.get("sources") if isinstance(mixture, dict) else None
        if not isinstance(composed, dict) or composed.keys() & self.sources.keys():
            return False
        merged = composed | self.sources
        mixture["sources"] = {name: merged[name] for name in dict.fromkeys([*self._order, *merged]) if name in merged}
        return True


def _with_sources(composed: Callable[[_Aside], Any], overrides: Sequence[str]) -> Any:
    """What a composition gives, with the sources that it could do without. It is repeated with them where it could not."""
    aside = _Aside(overrides, takes=True)
    try:
        plain = composed(aside)
        if not aside.sources or aside.put_back(plain.get("mixture")):
            return plain
    except RecipeError:
        if not aside.sources:
            raise
    return composed(_Aside(overrides, takes=False))


def _is_literal(value: Any) -> bool:
    """Whether a value means what it says: it has no interpolation, and nothing is missing."""
    if isinstance(value, dict | list):
        return all(map(_is_literal, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, str) or ("${" not in value and value != "???")


def _register_own_file(override: str, aside: _Aside) -> str:
    """Lets `mixture=` and `eval=` take a path: registers the file as an option and names that option instead."""
    group, _, value = override.partition("=")
    if group not in GROUPS or not value.endswith(YAML):
        return override
    path = user_path(value)
    if not path.is_file():
        raise RecipeError(
            f"{override}: there is no such file.",
            allowed=f"A path of a YAML file, or a name in {GROUPS[group]}/.",
        )
    with recipe_errors(path.name):
        fields = read_yaml(path, RecipeError)
        node = OmegaConf.create(aside.take(fields) if group == "mixture" else fields)
        ConfigStore.instance().store(group=group, name=OWN_FILE, node=node)
    return f"{group}={OWN_FILE}"
