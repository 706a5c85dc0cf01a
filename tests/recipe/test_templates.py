"""A stranger's Jinja template ends: with its text, or with one message about the limit that it reached."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from sparsify.errors import RecipeError
from sparsify.mixture.sources.bad_rows import BadRows
from sparsify.mixture.sources.read import read_documents
from sparsify.mixture.tokens.chat import ChatWriter
from sparsify.recipe import templates
from sparsify.recipe.source import SourceSection, check_source
from sparsify.recipe.templates import LimitedEnvironment, TemplateLimitError, compiled
from tests.conftest import TOKENIZER

BOMBS = {
    "a product": "{{ 'a' * 10 ** 10 }}",
    "a list": "{{ [1] * 10 ** 9 }}",
    "a power": "{{ 9999999999 ** 9999999999 }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop that makes nothing": "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a filter": "{{ 'a' | center(10 ** 9) }}",
    "a method": "{{ 'a'.ljust(10 ** 9) }}",
    "a width after %": "{{ '%1000000000d' % 1 }}",
    "a width in a format": "{{ '{:{w}}'.format(1, w=10 ** 9) }}",
    "a width in the filter": "{{ '%*d' | format(10 ** 9, 1) }}",
    "replace": "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}",
    "join": "{{ ('b' * 10 ** 6).join(range(99999) | map('string')) }}",
    "the filter join": "{{ range(99999) | join('b' * 10 ** 6) }}",
    "batch": "{{ [1] | batch(10 ** 9, 0) | list }}",
    "JSON": "{{ {'a': 1} | tojson(indent=10 ** 9) }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "a block": "{% set x %}{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}{% endset %}",
}
TOO_DEEP = ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% for a in b %}" * 50 + "{% endfor %}" * 50, "{{ " + "9" * 5000 + " }}"]  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_SECONDS", 1.0)


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_template_that_would_not_end_ends_with_one_message(text: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateLimitError, match=r"^A template "):
        compiled(text, LimitedEnvironment()).render()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("text", ["{{ 'a' * 10 ** 10 }}", "{% generation %}{{ 'a' * 10 ** 10 }}{% endgeneration %}"])
def test_a_chat_template_has_the_same_limits(text: str) -> None:
    writer: Any = ChatWriter(AutoTokenizer.from_pretrained(TOKENIZER), text)
    with pytest.raises(TemplateLimitError, match="10,000,000,000 characters"):
        writer.write([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def test_a_source_stops_at_the_first_row_that_would_not_end(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"n": 1}\n' * 1000)
    source = SourceSection(1.0, files=[str(tmp_path / "rows.jsonl")], text_template="{{ 'a' * 10 ** 10 * n }}")
    with pytest.raises(TemplateLimitError):
        list(read_documents("code", source, BadRows("code", 1.0)))


@pytest.mark.parametrize("text", [*TOO_DEEP, "{{ a | no_such_filter }}", "{{ a is no_such_test }}", "{{"], ids=range(6))
def test_what_is_no_template_is_refused_when_the_recipe_is_composed(text: str) -> None:
    with pytest.raises(RecipeError, match="text_template is not Jinja"):
        check_source("mixture.sources.a", SourceSection(1.0, files=["a.jsonl"], text_template=text))


def test_an_ordinary_template_renders_as_without_limits() -> None:
    text = (
        "{% for one in rows if one.a %}{{ loop.index }}{{ one.a ~ '-' ~ one.b + 'c' }}{{ one.a | upper | tojson }}"
        "{{ '%05.2f' | format(one.n) }}{{ '{:>8}'.format(one.b) }}{{ ', '.join(['x', one.b]) * 2 }}{{ one.n % 3 }}"
        "{% else %}none{% endfor %}{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(3) }}{{ 'a\nb' | indent(4) }}"
    )
    rows = [{"a": "ä", "b": "y" * 1000, "n": 3.14159}] * 20
    expected = jinja2.Environment().from_string(text).render(rows=rows)
    assert compiled(text, LimitedEnvironment()).render(rows=rows) == expected
