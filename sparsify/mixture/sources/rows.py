"""Turns a row into a text or a conversation, as the source's columns and templates say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.meta

from sparsify.metadata import MAX_DEPTH, parse_json
from sparsify.mixture.sources.bad_rows import Reason
from sparsify.mixture.sources.documents import REASONING_KEYS, Message
from sparsify.mixture.sources.source_files import MAX_ROW_BYTES
from sparsify.recipe.source import SourceSection
from sparsify.recipe.templates import LimitedEnvironment, TemplateLimitError, compiled

Row = Mapping[str, Any]
Content = str | tuple[Message, ...]

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Role names of chat templates, of OpenAI's messages and of ShareGPT, mapped to those of chat templates."""

TOOLS_COLUMN = "tools"
"""Column with the tools that a conversation may call, read where a row has it."""
KEPT_KEYS = ("name", "tool_call_id", *REASONING_KEYS)
"""Other texts of a turn that chat templates read."""


class BadRowError(Exception):
    """A row that cannot become a document.

    Args:
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
        self.reads_tools = False
        if source.group == "pretraining":
            self._read = _field(source.text_column, source.text_template)
            columns, templates = [source.text_column], [source.text_template]
        elif source.messages_column:
            self._read = _chat(source.messages_column)
            columns, templates = [source.messages_column], []
            self.reads_tools = True
        else:
            self._read = _question(source)
            columns = [source.prompt_column, source.response_column]
            columns += [c for c in (source.input_column, source.system_column) if c]
            templates = [source.prompt_template, source.response_template]
        if not any(templates):
            self.columns = frozenset(columns)

    def read(self, row: Any) -> Content:
        """The text of a pretraining row, or the messages of an instruction row; raises BadRowError if it holds neither."""
        if not isinstance(row, Mapping):
            raise BadRowError(Reason.NOT_AN_OBJECT, f"is {type(row).__name__}, not an object")
        content = self._read(row)
        if isinstance(content, str) and not content.strip():
            raise BadRowError(Reason.EMPTY, "is empty")
        size = len(content) if isinstance(content, str) else sum(len(str(turn["content"])) for turn in content)
        if size > MAX_ROW_BYTES:
            raise BadRowError(Reason.TOO_LONG, f"holds {size:,} characters, more than {MAX_ROW_BYTES:,}")
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
        turns = _parsed(_value(row, column))
        if not isinstance(turns, list):
            raise BadRowError(Reason.BAD_CHAT, f"column {column!r} holds {type(turns).__name__}, not a list")
        messages = tuple(map(_message, turns))
        if not any(message["role"] == "assistant" for message in messages):
            raise BadRowError(Reason.BAD_CHAT, "has no response")
        return messages

    return read


def tools_of(row: Row) -> tuple[dict[str, Any], ...] | None:
    """The tools that a conversation may call, as JSON schemas; None without any. Raises BadRowError if it holds something different."""
    tools = _parsed(row.get(TOOLS_COLUMN))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRowError(
            Reason.BAD_CHAT, f"column {TOOLS_COLUMN!r} holds {type(tools).__name__}, not a list of objects"
        )
    return tuple(_without_null(tool) for tool in tools)


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
    calls = _tool_calls(turn) if role == "assistant" else []
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = "".join(map(_part, content))
    if not isinstance(content, str):
        raise BadRowError(Reason.BAD_CHAT, f"has a turn of {role} that holds {type(content).__name__}, not text")
    if role == "assistant" and not content.strip() and not calls:
        raise BadRowError(Reason.BAD_CHAT, "has an empty response")
    message: Message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    message |= {key: turn[key] for key in KEPT_KEYS if isinstance(turn.get(key), str)}
    return message


def _part(part: Any) -> str:
    """Text of a content part, `{"type": "text", "text": ...}`."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise BadRowError(Reason.BAD_CHAT, f"has a content part of type {kind}; only text is known")
    return part["text"]


def _tool_calls(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tool calls in the form of chat templates: `function` with `name` and `arguments`, an object."""
    calls = _parsed(turn.get("tool_calls")) or []
    if turn.get("function_call"):  # the older form, of one call
        calls = [{"type": "function", "function": _parsed(turn["function_call"])}]
    if not isinstance(calls, list):
        raise BadRowError(Reason.BAD_CHAT, f"has tool_calls that are {type(calls).__name__}, not a list")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str):
            raise BadRowError(Reason.BAD_CHAT, "has a tool call without function.name")
        # A JSON text in OpenAI's messages; chat templates take the object.
        arguments = _without_null(_parsed(function.get("arguments")))
        function = {"name": name, "arguments": {} if arguments is None else arguments}
        others = {key: call[key] for key in ("id", "type") if isinstance(call.get(key), str)}
        read.append({"type": "function", **others, "function": function})
    return read


def _parsed(value: Any) -> Any:
    """The list or object that a JSON text holds; every other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def _without_null(value: Any, depth: int = 0) -> Any:
    """A value without the null fields that a Parquet file gives every object. Raises BadRowError if it nests too deep."""
    if depth > MAX_DEPTH:
        raise BadRowError(Reason.BAD_CHAT, f"has a tool or a call that nests deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        return {key: _without_null(one, depth + 1) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_null(one, depth + 1) for one in value]
    return value


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
        environment = LimitedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
            finalize=lambda value: "" if value is None else value,
        )
        self._template = compiled(text, environment)
        self._variables = jinja2.meta.find_undeclared_variables(environment.parse(text)) - {"row"}

    def render(self, row: Row) -> str:
        """Raises BadRowError if the template fails on the row, TemplateLimitError if it would not end."""
        try:
            return self._template.render({**row, "row": row})
        except TemplateLimitError:
            raise
        except Exception as error:  # a template may apply any operation to the row's values
            missing = sorted(self._variables - row.keys())
            if missing and isinstance(error, jinja2.UndefinedError):
                raise MissingColumnError(missing[0], row) from None
            detail = f"fails in the template: {type(error).__name__}: {error}"
            raise BadRowError(Reason.TEMPLATE, detail) from None
