"""Bounds of fields, and the errors about values outside of them.

Pydantic checks the values. `checked` reports its findings in terms of a recipe: the dotted key, the given value, the
allowed values, and the nearest name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from sparsify.errors import RecipeError, bound, nearest

MOST = 10**15
"""Largest integer of a recipe: no corpus has so many tokens, and sums of positions stay below 64 bits."""
PositiveInt = Annotated[int, Field(ge=1, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
Processes = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""What both numpy and torch accept."""
PositiveFloat = Annotated[float, Field(gt=0, le=1e6)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e6)]
LearningRate = Annotated[float, Field(gt=0, le=10)]
Share = Annotated[float, Field(ge=0, le=1)]

TYPES = {int: "Integer", float: "Number", bool: "true or false", str: "Text"}
ONE_OF = "one_of"
UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
ADVICE = {
    "model.architecture": "To add it, write +{key}=VALUE.",
    "conversion.method_settings": "To add it, write +{key}=VALUE.",
    "mixture.sources": "Sources are added in a mixture file: mixture=PATH.yaml.",
}
"""Sections with names chosen by the user → how to add a name."""
OLD_NAMES = {
    "window_tokens": "sequence_length",
    "batch_windows": "global_batch_size",
    "micro_batch_windows": "micro_batch_size",
    "swap": "blending",
    "sparsity": "penalty",
    "control": "baseline",
}
"""What sections and settings were called before → what they are called."""
AnySection = TypeVar("AnySection", bound="Section")


class Section:
    """A part of a recipe; subclasses are dataclasses. Constructing one checks nothing, `checked` does."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True
    )


_NOT_IN_NAMES = re.compile("[/\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_NAME_BYTES = 120


def check_name(key: str, name: str) -> None:
    """Refuses a name that cannot be that of a folder, or that a terminal would obey.

    Raises:
        RecipeError: Naming the setting.
    """
    size = len(name.encode("utf-8", "replace"))
    if not 1 <= size <= MAX_NAME_BYTES or name != name.strip() or name in (".", "..") or _NOT_IN_NAMES.search(name):
        raise RecipeError(
            f"{key} is {name[:MAX_NAME_BYTES]!r}.",
            allowed=f"1 to {MAX_NAME_BYTES} bytes, without / and control characters, and no spaces at its ends: folders are "
            "named after it.",
        )


def one_of(names: Collection[str]) -> AfterValidator:
    """Allows the names of a table, where a `Literal` cannot spell them."""

    def check(value: str) -> str:
        if value not in names:
            raise PydanticCustomError(ONE_OF, "not a name", {"names": tuple(names)})
        return value

    return AfterValidator(check)


@cache
def _adapter(schema: type[AnySection]) -> TypeAdapter[AnySection]:
    return TypeAdapter(schema)


def checked(
    schema: type[AnySection],
    values: Mapping[str, Any],
    *,
    key: str = "",
    where: str = "",
    overrides: Sequence[str] = (),
) -> AnySection:
    """Builds a section and those inside it from plain values; `key`, `where` and the overrides name them in errors.
    Raises RecipeError on an unknown key, a missing one, a wrong type or a value that is not allowed.
    """
    try:
        return _adapter(schema).validate_python(dict(values))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A misspelt name explains why another is missing.
        first = next((one for one in errors if one["type"] in UNKNOWN), errors[0])
        raise _refusal(schema, first, key, where, overrides) from error


def may_set(override: str, key: str) -> bool:
    """Whether an override names the setting, or is the option of its group: mixture=my_mixture.yaml."""
    return bool(key) and (key in override or override.partition("=")[0] == key.partition(".")[0])


def unknown_setting(key: str, siblings: Iterable[str], where: str, settings: Iterable[str]) -> RecipeError:
    """The error about an unknown setting; it names the nearest of the section's or, from another section, of all
    settings.
    """
    parent, _, leaf = key.rpartition(".")
    siblings = list(siblings)
    now = ".".join(OLD_NAMES.get(part, part) for part in key.split("."))
    renamed = "" if now == key else f"It is called {now} now. "
    elsewhere = [name for name in settings if name.rpartition(".")[2] == leaf]
    return RecipeError(
        f"{where}: there is no setting {key!r}.",
        allowed=f"{renamed or nearest(key, elsewhere) or nearest(leaf, siblings)}"
        f"Settings{parent and f' of {parent}'}: {', '.join(siblings) or 'none yet'}.",
        next_step=ADVICE.get(parent, "").format(key=key),
    )


def settings_of(schema: type[Section]) -> list[str]:
    """SECTION.KEY of every setting directly in a section of `schema`."""
    sections = {name: section_type(hint) for name, hint in hints(schema).items()}
    return [f"{name}.{key}" for name, inner in sections.items() if inner for key in hints(inner)]


@cache
def hints(schema: type[Section]) -> dict[str, Any]:
    found = get_type_hints(schema, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(schema)}  # pyright: ignore[reportArgumentType]


def section_type(hint: Any) -> type[Section] | None:
    return hint if isinstance(hint, type) and issubclass(hint, Section) else None


def _refusal(schema: type[Section], error: ErrorDetails, key: str, where: str, overrides: Sequence[str]) -> RecipeError:
    hint, siblings = _at(schema, error["loc"])
    key = ".".join(str(part) for part in (key, *error["loc"]) if part != "")
    override = next((override for override in overrides if may_set(override, key)), "")
    source = override or where
    if error["type"] in UNKNOWN:
        return unknown_setting(key, siblings, source, settings_of(schema))
    prefix = f"{source}: " if source and not override.lstrip("+").startswith(f"{key}=") else ""
    if error["type"] in ("missing", "missing_argument"):
        return RecipeError(f"{prefix}{key} is not set.", next_step=f"Set {key}=VALUE.")
    value = error["input"]
    if error["type"] == "list_type":
        return RecipeError(
            f"{prefix}{key} is {value!r}, a single value.",
            allowed="It must be a list, however short.",
            next_step=f"Write {key.rpartition('.')[2]}: [VALUE].",
        )
    kind, allowed = _allowed(hint, name_type=error["type"].endswith(("_type", "_parsing", "_from_float")))
    names = error.get("ctx", {}).get("names") or (get_args(kind) if get_origin(kind) is Literal else ())
    if names:
        words = [str(name) for name in names]
        return RecipeError(
            f"{prefix}{key} is {value!r}.",
            allowed=f"{nearest(str(value), words)}Allowed: {', '.join(words)}.",
            next_step=f"Set {key}={words[0]}, for example.",
        )
    if inner := section_type(kind):
        allowed = f"A section with these settings: {', '.join(hints(inner))}."
    next_step = "" if allowed else "`sparsify recipes show NAME` prints a recipe with all its settings."
    return RecipeError(f"{prefix}{key} is {value!r}.", allowed=allowed or f"{error['msg']}.", next_step=next_step)


def _at(schema: type[Section], location: Sequence[int | str]) -> tuple[Any, list[str]]:
    """The annotation of the value at a location, and the names allowed there."""
    hint: Any = schema
    siblings: list[str] = []
    for step in location:
        kind = _without_null(hint)[0]
        if inner := section_type(kind):
            siblings = list(hints(inner))
            hint = hints(inner).get(str(step), Any)
        else:
            siblings, hint = [], (get_args(kind) or (Any,))[-1]
    return hint, siblings


def _without_null(hint: Any) -> tuple[Any, list[FieldInfo], bool]:
    """The type that an annotation is about, its constraints, and whether it may be null."""
    constraints: list[FieldInfo] = []
    nullable = False
    while True:
        if get_origin(hint) is Annotated:
            hint, *more = get_args(hint)
            constraints += [one for one in more if isinstance(one, FieldInfo)]
        elif get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint):
            hint = next(one for one in get_args(hint) if one is not NoneType)
            nullable = True
        else:
            return hint, constraints, nullable


def _allowed(hint: Any, *, name_type: bool) -> tuple[Any, str]:
    kind, constraints, nullable = _without_null(hint)
    stated = next((one.description for one in constraints if one.description), None)
    if stated:
        return kind, stated
    bounds = {
        name: getattr(one, name)
        for field in constraints
        for one in field.metadata
        for name in ("gt", "ge", "lt", "le")
        if hasattr(one, name)
    }
    match bounds:
        case {"ge": lowest, "le": highest}:
            words = f"{bound(lowest)} to {bound(highest)}"
        case {"gt": lowest, "lt": highest}:
            words = f"above {bound(lowest)} and below {bound(highest)}"
        case {"gt": lowest, "le": highest}:
            words = f"above {bound(lowest)}, up to {bound(highest)}"
        case {"ge": lowest, "lt": highest}:
            words = f"{bound(lowest)} or above, and below {bound(highest)}"
        case {"ge": lowest}:
            words = f"{bound(lowest)} or above"
        case {"gt": lowest}:
            words = f"above {bound(lowest)}"
        case _:
            words = ""
    name = TYPES.get(kind, "") if name_type or not words else ""
    if not (name or words):
        return kind, ""
    return kind, f"Allowed: {', '.join(filter(None, [name, words]))}{' or null' * nullable}."
