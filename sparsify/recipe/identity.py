"""Which settings decide what is trained; used by folder names, resume and comparisons."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from sparsify.recipe.fields import hints, settings_of
from sparsify.recipe.recipe import Recipe

DECIDING_SECTIONS = (
    "model",
    "activation",
    "conversion",
    "blending",
    "penalty",
    "group_routing",
    "distillation",
    "mixture",
    "training",
    "optimizer",
)
"""Sections that decide what is trained. A run resumes only with the same settings, and an override of one is part of its folder's name."""
FREE_SETTINGS = (
    "training.micro_batch_size",
    "training.gradient_checkpointing",
    "training.fused_activation",
    "training.liger_kernels",
    "training.compile",
    "training.count_zeros",
    "mixture.description",
)
"""Settings of these sections that change how a step is computed or described, but not which step it is."""
SHARED_SECTIONS = ("model", "optimizer", "training")
"""Sections in which a run and its dense baseline agree. Mixtures are compared by the tokens drawn."""
BOOKKEEPING = (
    "name",
    "run_dir",
    "cache_dir",
    "mixture.description",
    "baseline",
    "checkpoint",
    "tracking",
)
"""Settings and sections that affect neither results nor speed."""
MAX_NAME_CHARACTERS = 120
HASH_CHARACTERS = 8


def decides(key: str) -> bool:
    """Whether a setting (`training.seed`) or a group (`activation`) decides what is trained."""
    return key.partition(".")[0] in DECIDING_SECTIONS and key not in FREE_SETTINGS


def is_bookkeeping(key: str) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in BOOKKEEPING)


def deciding_settings(recipe: Recipe) -> dict[str, Any]:
    sections = {name: asdict(getattr(recipe, name)) for name in DECIDING_SECTIONS}
    return {key: value for key, value in flat(sections).items() if decides(key)}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def first_difference(before: Recipe, now: Recipe) -> tuple[str, Any, Any] | None:
    """The first setting in which two recipes do not train the same, with both values; None if they do."""
    old, new = deciding_settings(before), deciding_settings(now)
    for key in [*old, *(key for key in new if key not in old)]:
        if old.get(key) != new.get(key):
            return key, old.get(key), new.get(key)
    return None


def shared_settings(recipe: Recipe) -> tuple[dict[str, Any], ...]:
    """Settings that a run shares with its dense baseline, for each of SHARED_SECTIONS; of a source with sparse weights, the dense one."""
    sections = {name: asdict(getattr(recipe, name)) for name in SHARED_SECTIONS}
    dense = sections["model"].pop("dense_source")
    sections["model"]["source"] = dense or sections["model"]["source"]
    return tuple(
        {key: value for key, value in settings.items() if decides(f"{name}.{key}")}
        for name, settings in sections.items()
    )


def short_settings(keys: Iterable[str]) -> dict[str, str]:
    """Settings without their section where no other section has a setting of that name.

    >>> short_settings(["training.seed", "penalty.target_zeros"])
    {'training.seed': 'seed', 'penalty.target_zeros': 'penalty.target_zeros'}
    """
    return {key: _short(key) for key in keys}


def _short(key: str) -> str:
    _, _, rest = key.partition(".")
    return rest if rest and rest.partition(".")[0] in _unique_names() else key


@cache
def _unique_names() -> frozenset[str]:
    # Bookkeeping is never part of a name.
    names = [
        *hints(Recipe),
        *(key.partition(".")[2] for key in settings_of(Recipe) if not is_bookkeeping(key)),
    ]
    return frozenset(name for name in names if names.count(name) == 1) - set(hints(Recipe))


def override_key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def run_name(overrides: Sequence[str]) -> str:
    """What overrides add to the name of a run's folder: one part for each that decides what is trained.

    Different overrides give different names: a value with characters that a folder's name cannot have, and a name that
    is too long, end in a hash. A part cannot read as two: values contain neither a comma nor an equals sign.
    """
    return named(override for override in overrides if decides(override_key(override)))


def named(overrides: Iterable[str]) -> str:
    """All of some overrides as the name of a folder; see `run_name`."""
    name = ",".join(f"{_short(override_key(one))}={_plain(one.partition('=')[2])}" for one in overrides)
    if len(name) <= MAX_NAME_CHARACTERS:
        return name
    return f"{name[: MAX_NAME_CHARACTERS - HASH_CHARACTERS - 1]}-{_hash(name)}"


def _plain(value: str) -> str:
    bare = value.strip().strip("'\"")
    plain = re.sub("[^-+.0-9A-Za-z_]", "_", bare)
    return plain if plain == bare else f"{plain}-{_hash(bare)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARACTERS]
