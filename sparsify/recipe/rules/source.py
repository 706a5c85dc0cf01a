"""Which settings of a source can work together, and what to say where they cannot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

import jinja2

from sparsify.errors import RecipeError, nearest
from sparsify.recipe.recipe import MixtureSection, SourceSection

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


def check_choice(key: str, value: str | None, allowed: tuple[str, ...]) -> None:
    """Refuses a value that is none of those allowed.

    Raises:
        RecipeError: With the nearest allowed value.
    """
    if value not in allowed:
        raise RecipeError(
            f"{key} is {value!r}.",
            allowed=f"{nearest(str(value), allowed)}Allowed: {', '.join(allowed)}.",
            next_step=f"Set {key}={allowed[0]}, for example.",
        )


def check_source(key: str, source: SourceSection) -> None:
    """Refuses a source whose settings contradict or ignore each other.

    Args:
        key: The source's key in the recipe, for messages.
        source: The source.

    Raises:
        RecipeError: Naming the setting.
    """
    check_choice(f"{key}.group", source.group, ("pretraining", "instruction"))
    origins = [name for name in ORIGINS if getattr(source, name)]
    if len(origins) != 1:
        raise RecipeError(
            f"{key} states {' and '.join(origins) or 'no'} origin.",
            allowed=f"Exactly one of {', '.join(ORIGINS)}.",
        )
    if not 0 <= source.token_share <= 1:
        raise RecipeError(f"{key}.token_share is {source.token_share}.", allowed="Allowed: 0 to 1.")
    _check_cap(key, source)
    given = _given(source)
    for name, origin in ONLY_WITH.items():
        if name in given and origins != [origin]:
            raise _ignored(
                key, name, source, f"it belongs to {origin}, and this source has {origins[0]}"
            )
    if source.stdlib is not None:
        check_choice(f"{key}.stdlib", source.stdlib, ("code", "prose", "questions"))
        _check_group(key, source, "instruction" if source.stdlib == "questions" else "pretraining")
    if source.token_files is not None:
        _check_group(key, source, "pretraining")
        if source.token_dtype is not None:
            check_choice(f"{key}.token_dtype", source.token_dtype, ("uint16", "uint32"))
    _check_fields(key, source, given)


def _check_cap(key: str, source: SourceSection) -> None:
    check_choice(f"{key}.when_exhausted", source.when_exhausted, ("stop", "redistribute"))
    if source.max_epochs is None and source.when_exhausted != "stop":
        raise RecipeError(
            f"{key}.when_exhausted is {source.when_exhausted}, but max_epochs is not set, so the source is never exhausted.",
            next_step=f"Set {key}.max_epochs=1, for example.",
        )
    if source.max_epochs is not None and not source.max_epochs >= 1:
        raise RecipeError(
            f"{key}.max_epochs is {source.max_epochs}.", allowed="At least 1; null sets no limit."
        )


def check_dirt_and_chat(mixture: MixtureSection) -> None:
    """Refuses limits and a chat template that a mixture cannot use.

    Raises:
        RecipeError: Naming the setting.
    """
    if not 0 <= mixture.max_bad_fraction <= 1:
        raise RecipeError(
            f"mixture.max_bad_fraction is {mixture.max_bad_fraction}.", allowed="Allowed: 0 to 1."
        )
    template = mixture.chat_template
    if template is None:
        return
    if template != "chatml" and not template.endswith(".jinja") and "{" not in template:
        raise RecipeError(
            f"mixture.chat_template is {template!r}.",
            allowed="Allowed: null, chatml, a Jinja text, or the path of a .jinja file.",
        )
    if not any(source.group == "instruction" for source in mixture.sources.values()):
        raise RecipeError(
            f"mixture.chat_template is set, but mixture {mixture.name!r} has no instruction source that would use it.",
            next_step="Set mixture.chat_template=null, or group: instruction of a source.",
        )


def _given(source: SourceSection) -> list[str]:
    """Settings that do not have their default."""
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
                next_step="Leave it out where a file is one document.",
            )
        why = "this source is pretraining text: text_column or text_template"
        refuse((*QUESTION_FIELDS, *CHAT_FIELDS), why)
    else:
        refuse(["document_separator"], "plain text is for pretraining sources only")
        refuse(
            TEXT_FIELDS, "this source is instruction text: prompt and response, or messages_column"
        )
        if source.messages_column:
            refuse(QUESTION_FIELDS, "messages_column holds the whole conversation")
    for field in TEMPLATES:
        text = getattr(source, f"{field}_template")
        if text is None:
            continue
        refuse([f"{field}_column"], f"{field}_template takes its place")
        try:
            jinja2.Environment().parse(text)
        except jinja2.TemplateSyntaxError as error:
            raise RecipeError(
                f"{key}.{field}_template is not Jinja: {error.message} (line {error.lineno}).",
                allowed="Text with a row's columns as {{ column }}.",
            ) from error


def _ignored(key: str, name: str, source: SourceSection, why: str) -> RecipeError:
    return RecipeError(
        f"{key}.{name} is {getattr(source, name)!r}, but would be ignored: {why}.",
        next_step=f"Leave {name} out.",
    )
