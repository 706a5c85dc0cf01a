"""Errors of Hydra, OmegaConf and YAML as a `RecipeError` in terms of recipe settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sparsify.errors import RecipeError, nearest
from sparsify.recipe.catalogue import GROUPS, RECIPE_GROUPS
from sparsify.recipe.fields import may_set, settings_of, unknown_setting
from sparsify.recipe.recipe import Recipe

NO_SECTION = "Invalid type assigned"
NO_LIST = "Invalid value assigned: AnyNode is not a ListConfig, list or tuple"
OWN_FILE = "own_file"
"""Name under which a user's own file is registered as an option."""


@contextmanager
def recipe_errors(where: str, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Turns what Hydra, OmegaConf and YAML raise inside the block into a `RecipeError`.

    Args:
        where: Name of the file that is read, for messages.
        overrides: Overrides that may cause the error.
    """
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
        raise RecipeError(
            f"{where} is not YAML: {error}", next_step="Fix the line named above."
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        chain = (error, error.__cause__, error.__context__)
        cause = next((link for link in chain if isinstance(link, OmegaConfBaseException)), error)
        raise _setting_error(cause, where, overrides) from error


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
        f"{where}: {said}."
        if not key or key in where or key in said
        else f"{where}: {key}: {said}.",
        next_step="`sparsify recipes show NAME` prints a recipe with all its settings and their types.",
    )
