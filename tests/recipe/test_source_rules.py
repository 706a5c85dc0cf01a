from __future__ import annotations

from typing import Any

import pytest

from sparsify.errors import RecipeError
from sparsify.recipe.fields import checked
from sparsify.recipe.mixture import MixtureSection, check_mixture
from sparsify.recipe.source import SourceSection, check_source

TEXT = {"files": ["a.jsonl"]}
CHAT = {"files": ["a.jsonl"], "group": "instruction"}


def check(settings: dict[str, Any]) -> None:
    key, values = "mixture.sources.web", {"token_share": 0.5} | settings
    check_source(key, checked(SourceSection, values, key=key))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no origin": ({}, "no origin"),
    "two origins": ({**TEXT, "token_files": ["a.bin"]}, "files and token_files origin"),
    "config of no hub": ({**TEXT, "hub_config": "en"}, "it belongs to hub"),
    "dtype of text": ({**TEXT, "token_dtype": "uint16"}, "it belongs to token_files"),
    "dtype": ({"token_files": ["a.bin"], "token_dtype": "int8"}, "Allowed: uint16, uint32"),
    "tokens with loss on answers": (
        {"token_files": ["a.bin"], "group": "instruction"},
        "group=pre",
    ),
    "columns of tokens": ({"token_files": ["a.bin"], "text_column": "x"}, "has no columns"),
    "stdlib questions as text": ({"stdlib": "questions"}, "stdlib: questions in group pretraining"),
    "stdlib code as answers": (
        {"stdlib": "code", "group": "instruction"},
        "stdlib: code in group instruction",
    ),
    "separator of the hub": ({"hub": "a/b", "document_separator": "x"}, "it belongs to files"),
    "separator of answers": ({**CHAT, "document_separator": "x"}, "for pretraining sources only"),
    "empty separator": ({**TEXT, "document_separator": ""}, "document_separator is empty"),
    "prompts of text": ({**TEXT, "prompt_column": "q"}, "this source is pretraining text"),
    "text of prompts": ({**CHAT, "text_template": "{{ x }}"}, "this source is instruction text"),
    "messages and prompts": (
        {**CHAT, "messages_column": "m", "system_column": "s"},
        "messages_column holds the whole conversation",
    ),
    "column and template": (
        {**TEXT, "text_column": "x", "text_template": "{{ x }}"},
        "text_template takes its place",
    ),
    "broken template": ({**CHAT, "prompt_template": "{% if %}"}, "prompt_template is not Jinja"),
}


@pytest.mark.parametrize(("settings", "words"), REFUSED.values(), ids=REFUSED)
def test_settings_that_contradict_or_ignore_each_other(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(settings)
    assert words in str(caught.value)
    assert "mixture.sources.web" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        TEXT | {"text_template": "{{ a }}", "document_separator": "\n\n"},
        CHAT | {"prompt_template": "{{ a }}", "response_column": "b", "system_column": "c"},
        CHAT | {"messages_column": "m"},
        {"token_files": ["a.bin"], "token_dtype": "uint32"},
        {"hub": "a/b", "hub_split": "test", "text_column": "body"},
        {"stdlib": "questions", "group": "instruction"},
    ],
)
def test_settings_that_work_together(settings: dict[str, Any]) -> None:
    check(settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_bad_fraction": 1.5}, "mixture.max_bad_fraction is 1.5"),
        ({"chat_template": "llama"}, "Allowed: null, chatml"),
        ({"chat_template": "chatml"}, "has no instruction source"),
    ],
)
def test_limits_and_templates_that_a_mixture_cannot_use(settings: dict[str, Any], words: str) -> None:
    sources = {"web": TEXT | {"token_share": 1.0}}
    values = {"name": "tiny", "sources": sources} | settings
    with pytest.raises(RecipeError, match=words):
        check_mixture(checked(MixtureSection, values, key="mixture"))
