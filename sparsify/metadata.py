"""Reading of the small files that describe a model, a recipe or a run: JSON and YAML that somebody else wrote.

Their content decides only what a command says, never whether it ends: size, depth, numbers and aliases have limits here.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from sparsify.errors import UserError

MAX_BYTES = 64 << 20
"""The index of a model with 10,000 shards and a tokenizer of 256,000 pieces have half of this."""
MAX_LINES_BYTES = 1 << 30
"""A file of JSON lines: 2,000,000 steps of a run, or 10,000,000 scores of items."""
MAX_DEPTH = 64
MAX_NUMBER_CHARACTERS = 100
MAX_YAML_NODES = 1_000_000
"""Nodes of a YAML text with its aliases written out; a mixture of 5,000 sources has 50,000."""
COPY_AGAIN = "Download or copy this file again."

Record = TypeVar("Record")
_adapter = lru_cache(TypeAdapter)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBER = re.compile(r"[-+]?[0-9a-fA-FxXoeE_.:+-]+")
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Refused(ValueError):
    """Content beyond a limit."""


def user_path(given: str | Path) -> Path:
    """A path that somebody typed, with `~` written out.

    Raises:
        UserError: If no file can have it: another user's home that does not exist, characters that no name has.
    """
    text = str(given)
    try:
        path = Path(text).expanduser()
        os.fsencode(path)
    except (RuntimeError, UnicodeEncodeError) as error:
        raise UserError(f"{text!r} is not a path: {error}.", next_step="Correct the path.") from error
    if "\0" in text or any(len(os.fsencode(part)) > 255 for part in path.parts) or len(os.fsencode(path)) > 4095:
        shown = text if len(text) < 80 else f"{text[:60]}…"
        raise UserError(
            f"{shown!r} is not a path.",
            allowed="Names of at most 255 bytes, 4,095 in total, without NUL.",
            next_step="Correct the path.",
        )
    return path


def read_text(path: Path, kind: type[UserError], next_step: str = COPY_AGAIN) -> str:
    """The UTF-8 text of a regular file of at most MAX_BYTES. Raises `kind` with the reason otherwise."""
    try:
        return _content(path, MAX_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        _refuse(path, "", error, kind, next_step)


def _content(path: Path, most_bytes: int) -> bytes:
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _Refused("it is not a regular file")
        if status.st_size > most_bytes:
            raise _Refused(f"it has {status.st_size:,} bytes, more than {most_bytes:,}")
        return file.read()


def read_json(path: Path, kind: type[UserError], next_step: str = COPY_AGAIN) -> dict[str, Any]:
    """The JSON object that a file holds. Raises `kind` with the reason if it holds none, or one beyond the limits."""
    text = read_text(path, kind, next_step)
    try:
        value = parse_json(text)
        if not isinstance(value, dict):
            raise _Refused(f"it holds {type(value).__name__}, not an object")
        return value
    except ValueError as error:
        _refuse(path, " as JSON", error, kind, next_step)


def holds_json(path: Path, value: dict[str, Any]) -> bool:
    """Whether a file holds this JSON object; not if it is damaged or not there."""
    try:
        return read_json(path, UserError) == value
    except UserError:
        return False


def parse_json(text: str | bytes) -> Any:
    """Any JSON value within the limits. Raises ValueError otherwise."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise _Refused(f"it nests deeper than {MAX_DEPTH} levels") from error
    _check_plain(value)
    return value


def read_record(
    path: Path, schema: type[Record], what: str, kind: type[UserError], next_step: str = COPY_AGAIN
) -> Record:
    """The record of a schema that a JSON file holds.

    Args:
        path: The file.
        schema: Its fields and their types: a pydantic model or a dataclass.
        what: What the file should be, with its article: "a comparison of schema version 1".
        kind: The error to raise.
        next_step: What to do if it is not.

    Raises:
        UserError: Of `kind`, with the reason: there is no such file, it is beyond the limits, or a field does not fit.
    """
    try:
        return parse_record(_content(path, MAX_BYTES).decode("utf-8-sig"), schema)
    except (OSError, ValueError) as error:
        raise kind(f"{path} is not {what}: {reason_of(error)}.", next_step=next_step) from error


def parse_record(text: str | bytes, schema: type[Record]) -> Record:
    """The record of a schema in a JSON text. Raises ValueError if it holds none, or one beyond the limits."""
    return _adapter(schema).validate_python(parse_json(text))


def text_lines(path: Path, kind: type[UserError], next_step: str = COPY_AGAIN) -> list[str]:
    """The lines of a UTF-8 text of at most MAX_LINES_BYTES, split at line feeds alone. Raises `kind` with the reason
    otherwise.
    """
    try:
        return _content(path, MAX_LINES_BYTES).decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        _refuse(path, "", error, kind, next_step)


def checked_yaml(path: Path, kind: type[UserError], next_step: str = "Fix the line named above.") -> str:
    """The text of a YAML file that is safe to parse: its depth, its numbers and its aliases are within the limits.
    Raises `kind` with the reason otherwise.
    """
    text = read_text(path, kind, next_step)
    try:
        check_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        _refuse(path, " as YAML", error, kind, next_step)
    return text


def read_yaml(path: Path, kind: type[UserError], next_step: str = "Fix the line named above.") -> dict[str, Any]:
    """The mapping that a YAML file holds, with its interpolations as they are written. Raises `kind` with the reason if
    it holds none, or one beyond the limits.
    """
    text = checked_yaml(path, kind, next_step)
    try:
        config = OmegaConf.load(io.StringIO(text)) if _holds_mapping(text) else None
        value = OmegaConf.to_container(config) if config is not None else None
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise _Refused("it holds no settings, each KEY: VALUE")
        return value  # pyright: ignore[reportReturnType]
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError, RecursionError) as error:
        _refuse(path, " as YAML", error, kind, next_step)


def _holds_mapping(text: str) -> bool:
    """Whether a checked YAML text is a mapping, or empty."""
    node = yaml.compose(text, Loader=_LOADER)
    return node is None or isinstance(node, yaml.MappingNode)


def check_yaml(text: str) -> None:
    """Refuses a YAML text that would not end, or not fit into memory, once its aliases are written out.

    Raises:
        yaml.YAMLError: If it is not YAML.
        ValueError: If it is beyond the limits.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]

    def add(nodes: int) -> None:
        anchor, size = open_nodes[-1]
        if size + nodes > MAX_YAML_NODES:
            raise _Refused(f"its aliases stand for more than {MAX_YAML_NODES:,} values")
        open_nodes[-1] = anchor, size + nodes

    for event in yaml.parse(text, Loader=_LOADER):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > MAX_DEPTH:
                raise _Refused(f"it nests deeper than {MAX_DEPTH} levels, line {line}")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = size
            add(size)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _Refused(f"*{event.anchor} is used before its end, line {line}")
            add(sizes[event.anchor])
        elif isinstance(event, yaml.ScalarEvent):
            if event.anchor is not None:
                sizes[event.anchor] = 1
            long = len(event.value) > MAX_NUMBER_CHARACTERS and not event.style
            if long and _NUMBER.fullmatch(event.value):
                raise _Refused(f"it has a number of {len(event.value):,} characters, line {line}")
            if _SURROGATE.search(event.value):
                raise _Refused(f"it has half of a surrogate pair, line {line}")
            add(1)


def _check_plain(value: Any) -> None:
    """Refuses nesting and numbers beyond the limits, and characters that no UTF-8 file can hold."""
    level = [value]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                deeper += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                deeper += one
            elif isinstance(one, str):
                if _SURROGATE.search(one):
                    raise _Refused("it has half of a surrogate pair")
            elif isinstance(one, int) and abs(one) >= 10**MAX_NUMBER_CHARACTERS:
                raise _Refused(f"it has an integer of more than {MAX_NUMBER_CHARACTERS} digits")
        if not deeper:
            return
        level = deeper
    raise _Refused(f"it nests deeper than {MAX_DEPTH} levels")


def _refuse(path: Path, how: str, error: Exception, kind: type[UserError], next_step: str) -> NoReturn:
    raise kind(f"{path} cannot be read{how}: {reason_of(error)}", next_step=next_step) from error


def reason_of(error: Exception) -> str:
    """What is wrong with a file, in one line that does not name it."""
    if isinstance(error, RecursionError):
        return f"it nests deeper than {MAX_DEPTH} levels"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        parts = [one for one in (error.context, error.problem) if one]
        return f"{', '.join(parts)}, line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text at byte {error.start:,}"
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
        return f"{where[:100]}: {first['msg']}{more}" if where else f"{first['msg']}{more}"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
