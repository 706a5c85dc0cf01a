"""The shipped recipes, mixtures and evaluations by name, in a checkout or an installed package."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from sparsify.errors import RecipeError, nearest
from sparsify.files import write_text
from sparsify.metadata import checked_yaml, user_path

YAML = (".yaml", ".yml")
PACKAGE = Path(__file__).parents[1]
GROUPS = {"mixture": "data_mixtures", "eval": "eval"}
"""Hydra group → the top-level folder of its options. `GROUP=PATH.yaml` works as well."""
RECIPE_GROUPS = ("model", "activation", "conversion", "engine")
"""Groups whose options are files in folders of recipes/."""


def folder(name: str) -> Path:
    """Path of `recipes`, `data_mixtures` or `eval`: in the installed package, or at the top of the checkout."""
    installed = PACKAGE / "_catalogue" / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted; a recipe in a sub-folder is named FOLDER/NAME."""
    root = folder("recipes")
    paths = (path.relative_to(root) for path in root.rglob("*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in paths if path.parts[0] not in RECIPE_GROUPS)


def recipe_path(name_or_path: str) -> Path:
    """Path of a recipe given by its name in the catalogue or by a path.

    Raises:
        RecipeError: If there is no such recipe.
    """
    own = user_path(name_or_path)
    if own.suffix == ".yaml" and own.is_file():
        return own.resolve()
    names = recipe_names()
    name = name_or_path.removesuffix(".yaml")
    if name in names:
        return (folder("recipes") / f"{name}.yaml").resolve()
    raise RecipeError(
        f"There is no recipe {name_or_path!r}.",
        allowed=f"{nearest(name, names)}Recipes: {', '.join(names)}; or the path of a .yaml file.",
        next_step="`sparsify recipes list` describes them; `sparsify recipes copy NAME TO` copies one to change.",
    )


def recipe_summary(path: Path) -> str:
    """What a recipe is for: its first comment line that is not its command."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line.lstrip("# ").rstrip() for line in lines if line.startswith("#")]
    return next((line for line in comments if line and not line.startswith("sparsify ")), "")


def copy_recipe(name_or_path: str, to: Path) -> None:
    """Copies a recipe under a new name, so that its runs get folders of their own.

    Raises:
        RecipeError: If there is no such recipe, or `to` cannot be a new recipe.
        StorageError: If the disk or the folder refuses.
    """
    source = recipe_path(name_or_path)
    if to.suffix != ".yaml" or to.exists():
        raise RecipeError(
            f"{to} {'exists already' if to.exists() else 'does not end in .yaml'}.",
            allowed="The path of a new .yaml file.",
            next_step=f"For example: sparsify recipes copy {name_or_path} my_{source.stem}.yaml",
        )
    text = checked_yaml(source, RecipeError)
    name = to.stem if yaml.safe_load(to.stem) == to.stem else json.dumps(to.stem)
    # Not as a pattern's replacement: there a backslash has a meaning.
    text = re.sub(r"\A# sparsify train .*", lambda _: f"# sparsify train {to}", text)
    write_text(to, re.sub(r"(?m)^name: .*", lambda _: f"name: {name}", text))


def mixture_names() -> list[str]:
    return sorted(path.stem for path in folder("data_mixtures").glob("*.yaml"))
