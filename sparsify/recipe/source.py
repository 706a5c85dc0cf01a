"""One source of a mixture: its fields, and checks of their combinations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import jinja2
from pydantic import Field

from sparsify.errors import RecipeError
from sparsify.recipe.fields import Section, Share
from sparsify.recipe.templates import LimitedEnvironment, compiled

ORIGINS = ("files", "hub", "stdlib", "token_files")
ONLY_WITH = {
    "hub_config": "hub",
    "hub_split": "hub",
    "hub_revision": "hub",
    "token_dtype": "token_files",
    "document_separator": "files",
}
"""Setting → the origin without which it would be ignored."""
TEXT_FIELDS = ("text_column", "text_template")
QUESTION_FIELDS = (
    "prompt_column",
    "prompt_template",
    "response_column",
    "response_template",
    "input_column",
    "system_column",
)
CHAT_FIELDS = ("messages_column",)
TEMPLATES = ("text", "prompt", "response")
"""Fields that are either a column or a template."""


@dataclass
class SourceSection(Section):
    """One source of a mixture: where its text is, its format, and its share of the run."""

    token_share: Share
    """Share of all training tokens, over the whole mixture; the shares of a mixture sum to 1. Where the mixture sets
    `instruction_token_share`, it may be the share within the group instead; then the shares of each group sum to 1."""
    group: Literal["pretraining", "instruction"] = "pretraining"
    """`pretraining` or `instruction`: the two sides of `instruction_token_share`."""
    max_epochs: Annotated[float, Field(ge=1, le=1e9, description="At least 1; null sets no limit.")] | None = None
    """How often a run may see each document; null repeats the source as often as the budget needs."""
    when_exhausted: Literal["stop", "redistribute"] = "stop"
    """What happens when a source reaches `max_epochs`: `stop` refuses a run that would exceed it and names the budget that
    fits; `redistribute` gives its share to the other sources from that point, in proportion."""
    files: list[str] | None = None
    """Local paths or globs: .jsonl .ndjson .json .csv .tsv .parquet .arrow .txt .text .md, each plain or .gz .zst .xz, and
    folders that `datasets.save_to_disk` wrote."""
    document_separator: str = "<|endoftext|>"
    """Separator between the documents of plain text: "\\n\\n", for example, makes each paragraph one."""
    token_files: list[str] | None = None
    """Paths or globs of text that the run's tokenizer has tokenised already: .npy or .bin, documents one after another,
    each ended by the end-of-sequence token. Pretraining only."""
    token_dtype: Literal["uint16", "uint32"] | None = None
    """`uint16` or `uint32`: integer type of .bin files."""
    hub: str | None = None
    """A Hugging Face dataset id, streamed."""
    hub_config: str | None = None
    hub_split: str = "train"
    hub_revision: str | None = None
    stdlib: Literal["code", "prose", "questions"] | None = None
    """Text from the standard library of every Python installation: `code`, `prose` or `questions`."""
    text_column: str = "text"
    """Column with the document; pretraining sources only."""
    text_template: str | None = None
    """Jinja text over a row's columns instead of `text_column`: `"# {{ title }}\\n{{ body }}"`."""
    prompt_column: str = "prompt"
    response_column: str = "response"
    """Columns of a prompt and its response; instruction sources only."""
    prompt_template: str | None = None
    response_template: str | None = None
    """Jinja text over a row's columns, each instead of the column of its name."""
    input_column: str | None = None
    """Column that is appended to the prompt after a blank line if it is not empty."""
    system_column: str | None = None
    """Column that becomes the system message if it is not empty."""
    messages_column: str | None = None
    """Column with a whole conversation, instead of all of the above: a list of {role, content}, or of {from, value}."""


def check_source(key: str, source: SourceSection) -> None:
    """Raises RecipeError if a source's settings contradict or ignore each other."""
    origins = [name for name in ORIGINS if getattr(source, name)]
    if len(origins) != 1:
        raise RecipeError(
            f"{key} states {' and '.join(origins) or 'no'} origin.",
            allowed=f"Exactly one of {', '.join(ORIGINS)}.",
        )
    _check_cap(key, source)
    given = _given(source)
    for name, origin in ONLY_WITH.items():
        if name in given and origins != [origin]:
            raise _ignored(key, name, source, f"it belongs to {origin}, and this source has {origins[0]}")
    if source.stdlib is not None:
        _check_group(key, source, "instruction" if source.stdlib == "questions" else "pretraining")
    if source.token_files is not None:
        _check_group(key, source, "pretraining")
    _check_fields(key, source, given)


def _check_cap(key: str, source: SourceSection) -> None:
    if source.max_epochs is None and source.when_exhausted != "stop":
        raise RecipeError(
            f"{key}.when_exhausted is {source.when_exhausted}, but max_epochs is not set, so the source is never exhausted.",
            next_step=f"Set {key}.max_epochs=1, for example.",
        )


def _given(source: SourceSection) -> list[str]:
    return [f.name for f in fields(source) if getattr(source, f.name) != f.default]


def _check_group(key: str, source: SourceSection, wanted: str) -> None:
    if source.group != wanted:
        origin = f"stdlib: {source.stdlib}" if source.stdlib else "token_files"
        raise RecipeError(
            f"{key} has {origin} in group {source.group}.",
            allowed="stdlib `code` and `prose` and token_files are pretraining text, stdlib `questions` is instruction text.",
            next_step=f"Set {key}.group={wanted}.",
        )


def _check_fields(key: str, source: SourceSection, given: list[str]) -> None:
    def refuse(names: Iterable[str], why: str) -> None:
        for name in names:
            if name in given:
                raise _ignored(key, name, source, why)

    if source.stdlib or source.token_files:
        origin = "stdlib" if source.stdlib else "token_files"
        refuse((*TEXT_FIELDS, *QUESTION_FIELDS, *CHAT_FIELDS), f"{origin} has no columns")
    elif source.group == "pretraining":
        if not source.document_separator:
            raise RecipeError(
                f"{key}.document_separator is empty.",
                allowed="One character or more.",
                next_step="Omit it if a file is one document.",
            )
        why = "this source is pretraining text: text_column or text_template"
        refuse((*QUESTION_FIELDS, *CHAT_FIELDS), why)
    else:
        refuse(["document_separator"], "plain text is for pretraining sources only")
        refuse(TEXT_FIELDS, "this source is instruction text: prompt and response, or messages_column")
        if source.messages_column:
            refuse(QUESTION_FIELDS, "messages_column holds the whole conversation")
    for field in TEMPLATES:
        text = getattr(source, f"{field}_template")
        if text is None:
            continue
        refuse([f"{field}_column"], f"{field}_template takes its place")
        try:
            compiled(text, LimitedEnvironment())
        except jinja2.TemplateSyntaxError as error:
            raise RecipeError(
                f"{key}.{field}_template is not Jinja: {error.message} (line {error.lineno}).",
                allowed="Text with a row's columns as {{ column }}.",
            ) from error


def _ignored(key: str, name: str, source: SourceSection, why: str) -> RecipeError:
    return RecipeError(
        f"{key}.{name} is {getattr(source, name)!r}, but would be ignored: {why}.",
        next_step=f"Omit {name}.",
    )
