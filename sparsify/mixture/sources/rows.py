"""Turns a row into a text or a conversation, as the source's columns and templates say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sparsify.mixture.sources.bad_rows import Reason
from sparsify.mixture.sources.documents import Message
from sparsify.recipe.source import SourceSection

Row = Mapping[str, Any]
Content = str | tuple[Message, ...]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""Role names of chat templates and of ShareGPT, mapped to those of chat templates."""


class BadRowError(Exception):
    """A row that cannot become a document.

    Args:
        reason: The reason under which the row is counted.
        detail: What is wrong; a predicate whose subject is the row.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class MissingColumnError(BadRowError):
    def __init__(self, column: str, row: Row) -> None:
        self.column = column
        self.present = ", ".join(sorted(map(str, row))) or "none"
        super().__init__(Reason.NO_COLUMN, f"has no column {column!r}; its columns: {self.present}")


class FieldReader:
    """Reads the content of rows from the columns and templates of a source."""

    def __init__(self, source: SourceSection) -> None:
        self._read: Callable[[Row], Content]
        self.columns: frozenset[str] | None = None
        """The columns that are read; None if templates choose them."""
        if source.group == "pretraining":
            self._read = _field(source.text_column, source.text_template)
            columns, templates = [source.text_column], [source.text_template]
        elif source.messages_column:
            self._read = _chat(source.messages_column)
            columns, templates = [source.messages_column], []
        else:
            self._read = _question(source)
            columns = [source.prompt_column, source.response_column]
            columns += [c for c in (source.input_column, source.system_column) if c]
            templates = [source.prompt_template, source.response_template]
        if not any(templates):
            self.columns = frozenset(columns)

    def read(self, row: Any) -> Content:
        """The text of a pretraining row, or the messages of an instruction row.

        Raises:
            BadRowError: If the row holds neither.
        """
        if not isinstance(row, Mapping):
            raise BadRowError(Reason.NOT_AN_OBJECT, f"is {type(row).__name__}, not an object")
        content = self._read(row)
        if isinstance(content, str) and not content.strip():
            raise BadRowError(Reason.EMPTY, "is empty")
        return content


def _field(column: str, template: str | None) -> Callable[[Row], str]:
    if template is not None:
        return RowTemplate(template).render
    return lambda row: _text(row, column)


def _question(source: SourceSection) -> Callable[[Row], Content]:
    read_prompt = _field(source.prompt_column, source.prompt_template)
    read_response = _field(source.response_column, source.response_template)
    input_column, system_column = source.input_column, source.system_column

    def read(row: Row) -> Content:
        prompt, response = read_prompt(row), read_response(row)
        more = _optional_text(row, input_column)
        system = _optional_text(row, system_column)
        if not prompt.strip():
            raise BadRowError(Reason.EMPTY, "has an empty prompt")
        if not response.strip():
            raise BadRowError(Reason.BAD_CHAT, "has no response")
        if more:
            prompt = f"{prompt}\n\n{more}"
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return ({"role": "system", "content": system}, *turns) if system else tuple(turns)

    return read


def _chat(column: str) -> Callable[[Row], Content]:
    def read(row: Row) -> Content:
        turns = _value(row, column)
        if not isinstance(turns, list):
            raise BadRowError(Reason.BAD_CHAT, f"column {column!r} holds {type(turns).__name__}, not a list")
        messages = tuple(map(_message, turns))
        if not any(message["role"] == "assistant" for message in messages):
            raise BadRowError(Reason.BAD_CHAT, "has no response")
        return messages

    return read


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRowError(Reason.BAD_CHAT, f"has a turn that is {type(turn).__name__}")
    speaker = turn.get("role") or turn.get("from")
    content = turn.get("content", turn.get("value"))
    # In a Parquet file that mixes both spellings, every row has both keys, one of them null.
    content = turn.get("value") if content is None else content
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise BadRowError(Reason.BAD_CHAT, f"has a turn of role {speaker!r}; known: {known}")
    if not isinstance(content, str):
        raise BadRowError(Reason.BAD_CHAT, f"has a turn of {role} that holds {type(content).__name__}, not text")
    if role == "assistant" and not content.strip():
        raise BadRowError(Reason.BAD_CHAT, "has an empty response")
    return {"role": role, "content": content}


def _value(row: Row, column: str) -> Any:
    try:
        value = row[column]
    except KeyError:
        raise MissingColumnError(column, row) from None
    if value is None:
        raise BadRowError(Reason.NULL, f"column {column!r} is null")
    return value


def _text(row: Row, column: str) -> str:
    value = _value(row, column)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise BadRowError(Reason.NOT_TEXT, f"column {column!r} holds {kind}, not text")
    return value


def _optional_text(row: Row, column: str | None) -> str:
    """The text of a column that may be empty or null, but must exist."""
    if column is None or (column in row and row[column] is None):
        return ""
    text = _text(row, column)
    return text if text.strip() else ""


class RowTemplate:
    """A Jinja template over the columns of a row, in a sandbox.

    Each column is a variable of its name; `row` holds all of them, for names with blanks:
    `{{ row["Best Answer"] }}`. A null renders as an empty string.
    """

    def __init__(self, text: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
            finalize=lambda value: "" if value is None else value,
        )
        self._template = environment.from_string(text)
        self._variables = jinja2.meta.find_undeclared_variables(environment.parse(text)) - {"row"}

    def render(self, row: Row) -> str:
        """Renders one row.

        Raises:
            BadRowError: If the template fails on the row.
        """
        try:
            return self._template.render({**row, "row": row})
        except Exception as error:  # a template may apply any operation to the row's values
            missing = sorted(self._variables - row.keys())
            if missing and isinstance(error, jinja2.UndefinedError):
                raise MissingColumnError(missing[0], row) from None
            detail = f"fails in the template: {type(error).__name__}: {error}"
            raise BadRowError(Reason.TEMPLATE, detail) from None
