from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.mixture.sources.bad_rows import BadRows, Reason
from sparsify.mixture.sources.documents import Document
from sparsify.mixture.sources.read import read_documents
from sparsify.mixture.sources.readers import json_list
from sparsify.mixture.sources.rows import BadRowError, FieldReader
from sparsify.mixture.sources.source_files import BrokenFileError
from sparsify.mixture.tokens.chat_template import CHATML, chat_template_text
from sparsify.mixture.tokens.encoder import Encoder
from sparsify.mixture.tokens.shards import source_fingerprint
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.source import SourceSection


def reader(group: str = "instruction", **fields: str) -> FieldReader:
    return FieldReader(SourceSection(token_share=1.0, group=group, **fields))


def chat(*turns: tuple[str, str]) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": content} for role, content in turns)


QUESTION = ("user", "How?")
ANSWER = ("assistant", "So.")

ROWS: dict[str, tuple[dict[str, str], dict[str, Any], tuple[tuple[str, str], ...]]] = {
    "question and answer": (
        {"prompt_column": "q", "response_column": "a"},
        {"q": "How?", "a": "So."},
        (QUESTION, ANSWER),
    ),
    "alpaca": (
        {"prompt_column": "instruction", "input_column": "input", "response_column": "output"},
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        (("user", "Add.\n\n1 + 1"), ("assistant", "2")),
    ),
    "alpaca without input": (
        {"input_column": "input"},
        {"prompt": "How?", "input": "", "response": "So."},
        (QUESTION, ANSWER),
    ),
    "system": (
        {"system_column": "system"},
        {"prompt": "How?", "system": "Be brief.", "response": "So."},
        (("system", "Be brief."), QUESTION, ANSWER),
    ),
    "null system": (
        {"system_column": "system"},
        {"prompt": "How?", "system": None, "response": "So."},
        (QUESTION, ANSWER),
    ),
    "templates": (
        {
            "prompt_template": "{{ q }} {{ row['of what'] }}",
            "response_template": "{{ choices[gold] }}",
        },
        {"q": "Name", "of what": "it", "choices": ["no", "yes"], "gold": 1},
        (("user", "Name it"), ("assistant", "yes")),
    ),
    "messages": (
        {"messages_column": "messages"},
        {
            "messages": [
                {"role": "user", "content": "How?"},
                {"role": "assistant", "content": "So."},
            ]
        },
        (QUESTION, ANSWER),
    ),
    "ShareGPT": (
        {"messages_column": "conversations"},
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "How?"},
                {"from": "gpt", "value": "So.", "content": None},
            ]
        },
        (("system", "Be brief."), QUESTION, ANSWER),
    ),
    "content parts": (
        {"messages_column": "messages"},
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Ho"}, {"type": "text", "text": "w?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "So."}]},
            ]
        },
        (("developer", "Be brief."), QUESTION, ANSWER),
    ),
    "messages as JSON text": (
        {"messages_column": "messages"},
        {"messages": '[{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]'},
        (QUESTION, ANSWER),
    ),
}


@pytest.mark.parametrize(("fields", "row", "turns"), ROWS.values(), ids=ROWS)
def test_rows_become_conversations(
    fields: dict[str, str], row: dict[str, Any], turns: tuple[tuple[str, str], ...]
) -> None:
    assert reader(**fields).read(row) == chat(*turns)


@pytest.mark.parametrize(
    "said",
    [
        {"tool_calls": [{"id": "c0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"tool_calls": [{"id": "c0", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}]},
        {"tool_calls": '[{"id": "c0", "function": {"name": "f", "arguments": {"a": 1}}}]'},
        {"function_call": {"name": "f", "arguments": '{"a": 1}'}, "tool_calls": None},
    ],
    ids=["OpenAI", "Parquet", "text", "the older form"],
)
def test_tool_calls_have_the_form_of_chat_templates(said: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, **said}]
    turns.append({"role": "tool", "tool_call_id": "c0", "name": None, "content": "7"})
    _, call, result = reader(messages_column="m").read({"m": turns})
    assert isinstance(call, dict)
    assert call["content"] == ""
    (read,) = call["tool_calls"]
    assert read["function"] == {"name": "f", "arguments": {"a": 1}}
    assert result == {"role": "tool", "content": "7", "tool_call_id": "c0"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_tools_of_a_conversation_are_read(tmp_path: Path, kind: str) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"m": turns, "tools": tools, "other": 1}, {"m": turns, "tools": None, "other": 2}]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    source = SourceSection(token_share=1.0, group="instruction", messages_column="m", files=[str(path)])
    documents = list(read_documents("chat", source, BadRows("chat", 0.0)))
    assert [document.tools for document in documents] == [tuple(tools), None]


def test_a_text_template_sees_the_row_and_renders_null_as_nothing() -> None:
    read = reader("pretraining", text_template="# {{ title }}\n{% if body %}\n{{ body }}{% endif %}").read
    assert read({"title": "A", "body": "b"}) == "# A\nb"
    assert read({"title": None, "body": None}) == "# \n"


BAD: dict[str, tuple[dict[str, str], Any, Reason, str]] = {
    "no response": ({}, {"prompt": "q", "response": " "}, Reason.BAD_CHAT, "no response"),
    "number": ({}, {"prompt": 7, "response": "a"}, Reason.NOT_TEXT, "'prompt' holds int"),
    "column": ({}, {"prompt": "q"}, Reason.NO_COLUMN, "no column 'response'; its columns: prompt"),
    "role": (
        {"messages_column": "m"},
        {"m": [{"role": "narrator", "content": "x"}]},
        Reason.BAD_CHAT,
        "role 'narrator'; known: system, developer, user, human, assistant, gpt, tool",
    ),
    "unanswered": (
        {"messages_column": "m"},
        {"m": [{"role": "user", "content": "x"}]},
        Reason.BAD_CHAT,
        "no response",
    ),
    "no list": ({"messages_column": "m"}, {"m": "hello"}, Reason.BAD_CHAT, "str, not a list"),
    "picture": (
        {"messages_column": "m"},
        {"m": [{"role": "user", "content": [{"type": "image"}]}]},
        Reason.BAD_CHAT,
        "content part of type image; only text is known",
    ),
    "template": (
        {"prompt_template": "{{ choices[9] + 1 }}"},
        {"choices": [1], "response": "a"},
        Reason.TEMPLATE,
        "fails in the template",
    ),
    "template's column": (
        {"prompt_template": "{{ question }}"},
        {"query": "q", "response": "a"},
        Reason.NO_COLUMN,
        "no column 'question'; its columns: query, response",
    ),
    "unsafe template": (
        {"prompt_template": "{{ ''.__class__.__mro__ }}"},
        {"response": "a"},
        Reason.TEMPLATE,
        "unsafe",
    ),
}


@pytest.mark.parametrize(("fields", "row", "reason", "words"), BAD.values(), ids=BAD)
def test_a_row_that_is_not_a_document_says_why(fields: dict[str, str], row: Any, reason: Reason, words: str) -> None:
    with pytest.raises(BadRowError) as caught:
        reader(**fields).read(row)
    assert caught.value.reason is reason
    assert words in caught.value.detail


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(
    rows=st.lists(st.dictionaries(st.text(), JSON, max_size=3), min_size=1, max_size=8),
    characters=st.integers(1, 40),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
    wrapped=st.booleans(),
)
def test_a_json_list_read_in_chunks_equals_json_loads(
    rows: list[Any], characters: int, indent: int | None, ascii_only: bool, wrapped: bool
) -> None:
    value = {"tags": ["a", 1], "version": 1.5, "data": rows, "none": []} if wrapped else rows
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    chunks = [text[at : at + characters] for at in range(0, len(text), characters)]
    assert list(json_list(chunks)) == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1} {"a": 2}]', "',' expected, '{' found, at character 10"),
        ('[{"a": 1}, {"a": tru]', "not JSON"),
        ('[{"a": 1}', "the end of the file"),
        ('{"a": 1}\n{"a": 2}', "no list of objects"),
        ('[{"a": 1}]\n[]', "text after its end"),
        ('{"a": [{}], "b": [{}]}', "two lists, 'a' and 'b'"),
        ("3", "neither a list nor an object"),
    ],
)
def test_what_is_not_a_json_list_is_refused(text: str, words: str) -> None:
    with pytest.raises(BrokenFileError, match=words):
        list(json_list([text]))


def test_the_chat_template_is_the_mixtures_the_tokenizers_or_chatml(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    assert chat_template_text(None, own) == CHATML
    own.chat_template = "{{ messages }}"
    assert chat_template_text(None, own) == "{{ messages }}"
    assert chat_template_text("chatml", own) == CHATML
    (tmp_path / "a.jinja").write_text("{{ messages[0] }}")
    assert chat_template_text(str(tmp_path / "a.jinja"), own) == "{{ messages[0] }}"
    assert chat_template_text("{{ bos_token }}", own) == "{{ bos_token }}"
    for wrong in (str(tmp_path / "none.jinja"), "{% for %}"):
        with pytest.raises(MixtureError, match=r"mixture.chat_template=.* cannot be read"):
            chat_template_text(wrong, own)


def test_a_given_template_writes_the_documents_and_marks_the_responses(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    template = "{% for m in messages %}[{{ m.role[0] }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    encoder = Encoder("chat", tokenizer, responses_only=True, chat_template=template)
    row = {"m": list(chat(QUESTION, ANSWER, ("user", "Why?"), ("assistant", "Thus.")))}
    source = SourceSection(token_share=1.0, group="instruction", messages_column="m")
    messages = FieldReader(source).read(row)
    assert not isinstance(messages, str)
    encoded = encoder.encode([Document("1", messages=messages)])
    ids, mask = encoded.ids, encoded.carries_loss
    assert tokenizer.decode(ids) == "<s>[u] How? [a] So. [u] Why? [a] Thus.</s>"
    assert tokenizer.decode(ids[mask]) == " So.  Thus.</s>", "what the template puts after an answer ends it"


def test_the_fingerprint_depends_on_the_chat_template_of_instructions_only(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast
) -> None:
    def fingerprints() -> dict[str, str]:
        return {name: source_fingerprint(name, source, mixture, tokenizer) for name, source in mixture.sources.items()}

    before = fingerprints()
    mixture.chat_template = "{{ messages }}"
    mixture.max_bad_fraction = 0.5
    after = fingerprints()
    assert before["stories"] == after["stories"]
    assert before["chats"] != after["chats"]
    mixture.chat_template = "chatml"  # what the tokenizer falls back to
    assert fingerprints() == before


def test_prompts_and_messages_of_the_same_words_have_the_same_origin(
    write_jsonl: Callable[..., str],
) -> None:
    rows = [{"prompt": "q", "response": "a", "messages": list(chat(("user", "q"), ("assistant", "a")))}]
    path = write_jsonl(rows)

    def origin(**fields: str) -> str:
        source = SourceSection(token_share=1.0, group="instruction", files=[path], **fields)
        (document,) = read_documents("chat", source, BadRows("chat", 0.0))
        return document.origin

    assert origin() == origin(messages_column="messages")


@pytest.mark.parametrize("place", ["arguments", "parameters"])
def test_a_tool_that_nests_too_deep_is_a_bad_row(place: str, tmp_path: Path) -> None:
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    values = {"arguments": {}, "parameters": {}} | {place: {"a": deep}}
    call = {"type": "function", "function": {"name": "f", "arguments": values["arguments"]}}
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So.", "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": values["parameters"]}}]
    path = tmp_path / "a.jsonl"
    good = [turns[0], {"role": "assistant", "content": "So."}]
    rows = [{"messages": turns, "tools": tools}, {"messages": good}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad_rows = BadRows("chats", 1.0)
    source = SourceSection(token_share=1.0, group="instruction", files=[str(path)], messages_column="messages")
    assert len(list(read_documents("chats", source, bad_rows))) == 1
    assert bad_rows.bad_rows == {Reason.BAD_CHAT: 1}
