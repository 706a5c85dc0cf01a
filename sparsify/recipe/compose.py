"""Hydra composes a recipe from its file, the groups that it names, and overrides."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from sparsify.errors import RecipeError, nearest
from sparsify.files import write_text
from sparsify.recipe.catalogue import GROUPS, YAML, folder, mixture_names, recipe_path
from sparsify.recipe.hydra_errors import OWN_FILE, recipe_errors
from sparsify.recipe.mixture import MixtureSection, check_mixture
from sparsify.recipe.recipe import Recipe, validate
from sparsify.recipe.training import EXECUTION_SETTINGS

Section = TypeVar("Section")
NEUTRAL_OVERRIDES = (
    "run_dir=",
    "cache_dir=",
    "name=",
    "launch.",
    "tracking.",
    "stability.",
    "checkpoint.",
    "eval.",
    "eval=",
    *(f"training.{key}=" for key in EXECUTION_SETTINGS),
)
"""Overrides that do not change what is trained."""
MAX_NAME_CHARACTERS = 120


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Expands `key=a,b` overrides into one list of overrides for each combination, as Hydra's multirun does.

    Raises:
        RecipeError: If an override cannot be read.
    """
    with recipe_errors("overrides", overrides):
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    fixed = [str(one.input_line) for one in parsed if not one.is_sweep_override()]
    axes = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        for one in parsed
        if one.is_sweep_override()
    ]
    given = next((line for line in fixed if line.startswith("run_dir=")), None)
    combinations = []
    for chosen in map(list, itertools.product(*axes)):
        folder = [f"{given}/{_telling_name(chosen)}"] if given and chosen else []
        combinations.append([*fixed, *chosen, *folder])
    return combinations


def _telling_name(overrides: Sequence[str]) -> str:
    """What a run's folder adds to the recipe's name, so that every variant of a recipe has a folder of its own."""
    pairs = [one.partition("=") for one in overrides if not one.startswith(NEUTRAL_OVERRIDES)]
    keyed = [f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs]
    return re.sub("[^-+.,=0-9A-Za-z_]", "_", ",".join(keyed))[:MAX_NAME_CHARACTERS]


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
    with recipe_errors(path.name, overrides):
        taken = [_register_own_file(override) for override in overrides]
        _register_groups()
        with _hydra(path.parent):
            config = compose(config_name=path.stem, overrides=[*taken, *_search_path(path)])
        recipe = validate(_typed(Recipe, config))
    telling = _telling_name(overrides)
    if telling and not any(override.startswith("run_dir=") for override in overrides):
        recipe.run_dir = f"{recipe.run_dir},{telling}"
    return recipe


def load_mixture(name_or_path: str) -> MixtureSection:
    """Reads one mixture by its name in the catalogue or the path of a YAML file, and checks it.

    Raises:
        RecipeError: If there is no such mixture, or it cannot be drawn.
    """
    own = Path(name_or_path).expanduser()
    path = own if own.suffix in YAML else folder("data_mixtures") / f"{name_or_path}.yaml"
    if not path.is_file():
        names = mixture_names()
        raise RecipeError(
            f"There is no mixture {name_or_path!r}.",
            allowed=f"{nearest(name_or_path, names)}Mixtures: {', '.join(names)}; or the path of a YAML file.",
        )
    with recipe_errors(path.name):
        option = _register_own_file(f"mixture={path}")
        _register_groups()
        with _hydra(folder("recipes").resolve()):
            config = compose(overrides=[f"+{option}"])
        mixture = _typed(MixtureSection, config.mixture)
    check_mixture(mixture)
    return mixture


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a composed recipe as YAML that `load_recipe` reads back.

    Raises:
        StorageError: If the disk or the folder refuses.
    """
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(recipe)))


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe that `save_recipe` wrote.

    Raises:
        RecipeError: If the file is missing or is no recipe of this version.
    """
    if not path.is_file():
        raise RecipeError(
            f"There is no recipe {path}.", next_step="Give a run folder that `sparsify train` made."
        )
    with recipe_errors(str(path)):
        return _typed(Recipe, OmegaConf.load(path))


def _typed(schema: type[Section], config: Any) -> Section:
    """Checks every key and type against the schema: also what `+key=value` slipped past the composing."""
    plain = OmegaConf.to_container(config, resolve=True)
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))  # type: ignore


@contextmanager
def _hydra(config_dir: Path) -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(config_dir), version_base="1.3"):
        yield


def _search_path(path: Path) -> list[str]:
    """Lets a recipe outside of the catalogue use the catalogue's recipes and groups."""
    root = folder("recipes").resolve()
    quoted = str(root).replace("'", r"\'")
    return [] if path.parent == root else [f"hydra.searchpath=['file://{quoted}']"]


@cache
def _register_groups() -> None:
    store = ConfigStore.instance()
    store.store(name="recipe_schema", node=Recipe)
    for group, folder_name in GROUPS.items():
        for path in folder(folder_name).glob("*.yaml"):
            store.store(group=group, name=path.stem, node=OmegaConf.load(path))


def _register_own_file(override: str) -> str:
    """Lets `mixture=` and `eval=` take a path: registers the file as an option and names that option instead."""
    group, _, value = override.partition("=")
    if group not in GROUPS or not value.endswith(YAML):
        return override
    path = Path(value).expanduser()
    if not path.is_file():
        raise RecipeError(
            f"{override}: there is no such file.",
            allowed=f"A path of a YAML file, or a name in {GROUPS[group]}/.",
        )
    with recipe_errors(path.name):
        ConfigStore.instance().store(group=group, name=OWN_FILE, node=OmegaConf.load(path))
    return f"{group}={OWN_FILE}"
