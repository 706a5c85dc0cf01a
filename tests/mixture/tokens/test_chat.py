"""The law of chats: no label outside an answer, and every answer labelled or counted, whatever the chat template does.

Each role writes in an alphabet of its own, and templates in ASCII, so that a character says whose it is.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sparsify.mixture.sources.bad_rows import BadRows, Reason
from sparsify.mixture.sources.documents import Document, Message
from sparsify.mixture.tokens.chat import ChatWriter, WrittenChat
from sparsify.mixture.tokens.chat_template import CHATML, ChatTemplateError
from sparsify.mixture.tokens.encoder import Encoder

LETTERS = {"assistant": "αβγδε", "user": "абвгд", "system": "אבגדה", "developer": "אבגדה", "tool": "あいうえお"}
GREEK, OTHERS = re.compile("[α-ω]"), re.compile("[а-яא-ת぀-ゟ]")

MISTRAL_V3 = """{%- if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif -%}{{- bos_token -}}
{%- for m in turns -%}
{%- if m['role'] == 'user' -%}
{%- if loop.last and sys is defined -%}{{ '[INST] ' + sys + '\\n\\n' + m['content'] + '[/INST]' }}
{%- else -%}{{ '[INST] ' + m['content'] + '[/INST]' }}{%- endif -%}
{%- elif m.tool_calls is defined -%}
{{- '[TOOL_CALLS] [' -}}{%- for call in m.tool_calls -%}{{- call.function | tojson -}}{%- endfor -%}{{- ']' + eos_token -}}
{%- elif m['role'] == 'assistant' -%}{{ ' ' + m['content'] | trim + eos_token }}
{%- elif m['role'] == 'tool' -%}{{ '[TOOL_RESULTS] ' + m['content'] + '[/TOOL_RESULTS]' }}
{%- else -%}{{ raise_exception('Only user and assistant roles are supported!') }}
{%- endif -%}{%- endfor -%}"""
QWEN3 = """{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}
{%- endif %}{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role in ['user', 'system'] %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content %}{%- set reasoning = '' %}
{%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<|im_start|>' + m.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA3 = """{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'
+ m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}
{%- endfor %}"""
LLAMA3_PROMPT = "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
LLAMA3_ALWAYS = LLAMA3 + LLAMA3_PROMPT
LLAMA3_ASKED = LLAMA3 + "{% if add_generation_prompt %}" + LLAMA3_PROMPT + "{% endif %}"
BLOCKS = """{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}
{{- m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"""
PARTS = """{% for m in messages %}{{ m['role'] + ':' }}{% for part in m['content'] %}{% if part['type'] == 'text' %}
{{- part['text'] }}{% endif %}{% endfor %}<end>{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


def writer(tokenizer: PreTrainedTokenizerFast, template: str) -> ChatWriter:
    return ChatWriter(tokenizer, template)


def turn(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def labelled(chat: WrittenChat) -> list[str]:
    return [chat.text[first:last] for first, last in chat.answers]


SYSTEM, ASK, AGAIN = turn("system", "אאא"), turn("user", "абв"), turn("user", "где?")
CALL = turn(
    "assistant", "", tool_calls=[{"type": "function", "function": {"name": "αα", "arguments": {"t": "β", "n": 3}}}]
)
FAMILIES: dict[str, tuple[str, list[Message], list[str], str]] = {
    "Mistral moves the system prompt": (
        MISTRAL_V3,
        [SYSTEM, ASK, turn("assistant", "αβ"), AGAIN, turn("assistant", "γ")],
        [" αβ</s>", " γ</s>"],
        "<s>[INST] абв[/INST] αβ</s>[INST] אאא\n\nгде?[/INST] γ</s>",
    ),
    "Mistral trims": (
        MISTRAL_V3,
        [ASK, turn("assistant", "  αβ \n"), AGAIN, turn("assistant", "\nγ ")],
        [" αβ</s>", " γ</s>"],
        "<s>[INST] абв[/INST] αβ</s>[INST] где?[/INST] γ</s>",
    ),
    "Mistral's tools": (
        MISTRAL_V3,
        [ASK, CALL, turn("tool", "いい"), turn("assistant", "γ")],
        ['[TOOL_CALLS] [{"name": "αα", "arguments": {"t": "β", "n": 3}}]</s>', " γ</s>"],
        '<s>[INST] абв[/INST][TOOL_CALLS] [{"name": "αα", "arguments": {"t": "β", "n": 3}}]</s>'
        "[TOOL_RESULTS] いい[/TOOL_RESULTS] γ</s>",
    ),
    "Qwen3 strips earlier reasoning": (
        QWEN3,
        [ASK, turn("assistant", "<think>\nαα\n</think>\n\nβ"), AGAIN, turn("assistant", "<think>γ</think>δ")],
        ["β<|im_end|>\n", "<think>\nγ\n</think>\n\nδ<|im_end|>"],
        "<|im_start|>user\nабв<|im_end|>\n<|im_start|>assistant\nβ<|im_end|>\n<|im_start|>user\nгде?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nγ\n</think>\n\nδ<|im_end|>",
    ),
    "Qwen3's reasoning of its own": (
        QWEN3,
        [ASK, turn("assistant", "δ", reasoning_content="γ")],
        ["<think>\nγ\n</think>\n\nδ<|im_end|>"],
        "<|im_start|>user\nабв<|im_end|>\n<|im_start|>assistant\n<think>\nγ\n</think>\n\nδ<|im_end|>",
    ),
    "Qwen3's tools": (
        QWEN3,
        [ASK, CALL, turn("tool", "いい"), turn("assistant", "γ", reasoning_content="δ")],
        [
            '<tool_call>\n{"name": "αα", "arguments": {"t": "β", "n": 3}}\n</tool_call><|im_end|>\n',
            "<think>\nδ\n</think>\n\nγ<|im_end|>",
        ],
        '<|im_start|>user\nабв<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{"name": "αα", "arguments": {"t": "β", "n": 3}}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nいい\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nδ\n</think>\n\nγ<|im_end|>",
    ),
    "a developer's prompt is a system prompt": (
        QWEN3,
        [turn("developer", "אאא"), ASK, turn("assistant", "δ", reasoning_content="γ")],
        ["<think>\nγ\n</think>\n\nδ<|im_end|>"],
        "<|im_start|>system\nאאא<|im_end|>\n<|im_start|>user\nабв<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nγ\n</think>\n\nδ<|im_end|>",
    ),
    "Llama-3 always adds a prompt": (
        LLAMA3_ALWAYS,
        [ASK, turn("assistant", " αβ"), AGAIN, turn("assistant", "γ")],
        ["αβ<|eot_id|>", "γ<|eot_id|>"],
        "<s><|start_header_id|>user<|end_header_id|>\n\nабв<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nαβ<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nгде?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nγ<|eot_id|>",
    ),
    "Llama-3": (
        LLAMA3_ASKED,
        [ASK, turn("assistant", " αβ")],
        ["αβ<|eot_id|>"],
        "<s><|start_header_id|>user<|end_header_id|>\n\nабв<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nαβ<|eot_id|>",
    ),
    "ChatML calls tools": (
        CHATML,
        [ASK, CALL, turn("tool", "いい"), turn("assistant", "γ")],
        [
            '<tool_call>\n{"name": "αα", "arguments": {"t": "β", "n": 3}}\n</tool_call><|im_end|>\n',
            "γ<|im_end|>",
        ],
        '<|im_start|>user\nабв<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{"name": "αα", "arguments": {"t": "β", "n": 3}}\n'
        "</tool_call><|im_end|>\n<|im_start|>tool\nいい<|im_end|>\n<|im_start|>assistant\nγ<|im_end|>",
    ),
    "blocks of generation": (
        BLOCKS,
        [ASK, turn("assistant", "αβ"), AGAIN, turn("assistant", "γ")],
        ["αβ<|im_end|>", "γ<|im_end|>"],
        "<|im_start|>user\nабв<|im_end|>\n<|im_start|>assistant\nαβ<|im_end|>\n<|im_start|>user\nгде?<|im_end|>\n"
        "<|im_start|>assistant\nγ<|im_end|>",
    ),
    "content parts only": (
        PARTS,
        [ASK, turn("assistant", "αβ")],
        ["αβ<end>"],
        "user:абв<end>\nassistant:αβ<end>",
    ),
    "a question of the answer's words": (
        CHATML,
        [turn("user", "αβ"), turn("assistant", "αβ"), turn("user", "αβ"), turn("assistant", "αβ")],
        ["αβ<|im_end|>\n", "αβ<|im_end|>"],
        "<|im_start|>user\nαβ<|im_end|>\n<|im_start|>assistant\nαβ<|im_end|>\n<|im_start|>user\nαβ<|im_end|>\n"
        "<|im_start|>assistant\nαβ<|im_end|>",
    ),
}


@pytest.mark.parametrize(("template", "turns", "answers", "text"), FAMILIES.values(), ids=FAMILIES)
def test_the_answers_of_known_templates(
    tokenizer: PreTrainedTokenizerFast, template: str, turns: list[Message], answers: list[str], text: str
) -> None:
    chat = writer(tokenizer, template).write(turns)
    assert chat.text == text
    assert labelled(chat) == answers
    assert not chat.dropped_turns


def test_tools_reach_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    for template in (QWEN3, CHATML):
        chat = writer(tokenizer, template).write([ASK, turn("assistant", "α")], tools)
        assert '{"name": "weather"}' in chat.text
        assert chat.text.index("weather") < chat.answers[0][0]


@pytest.mark.parametrize(
    ("template", "turns", "words"),
    [
        ("{% for m in messages %}{{ m['role'] }}{{ m['content'] }}{% endfor %}", [ASK, CALL], "tool calls of turn 2"),
        (
            "{% for m in messages %}{{ m['content'][:1] }}{% endfor %}",
            [ASK, turn("assistant", "αβ")],
            "none of the answers",
        ),
        (
            "{% for m in messages %}{{ m['content'] }} {{ m['content'] }}{% endfor %}",
            [ASK, turn("assistant", "αβ")],
            "an answer more than once",
        ),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ range(10 ** 4) | list | random }}",
            [ASK, turn("assistant", "αβ")],
            "another text each time",
        ),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", [ASK, CALL], "tool calls"),
        (MISTRAL_V3, [ASK, turn("critic", "αβ")], "Only user and assistant"),
        (CHATML, [ASK, turn("assistant", "α\U000f0000β")], "private Unicode plane"),
    ],
    ids=[
        "no tool calls",
        "no answers",
        "answers twice",
        "random",
        "only users",
        "an unknown role",
        "marks in the data",
    ],
)
def test_a_conversation_without_its_answers_is_refused(
    tokenizer: PreTrainedTokenizerFast, template: str, turns: list[Message], words: str
) -> None:
    with pytest.raises(ChatTemplateError, match=words):
        writer(tokenizer, template).write(turns)


def test_a_template_that_writes_the_time_keeps_its_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{{ strftime_now('%H:%M:%S.%f') }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    chat = writer(tokenizer, template).write([ASK, turn("assistant", "αβ")])
    assert [chat.text[first:last] for first, last in chat.answers] == ["αβ"]


def test_turns_that_the_template_drops_are_counted_and_reported(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{% for m in messages[-2:] %}{{ m['role'] + ':' + m['content'] }}<end>{% endfor %}"
    bad_rows = BadRows("chat", 0.0)
    encoder = Encoder("chat", tokenizer, responses_only=True, chat_template=template, bad_rows=bad_rows)
    turns = (SYSTEM, ASK, turn("assistant", "αβ"), AGAIN, turn("assistant", "γ"))
    encoder.encode([Document("a", messages=turns)] * 3)
    assert bad_rows.dropped_turns == {"answer": 3, "system": 3, "user": 3}
    assert "turns that the chat template drops: 3 answer, 3 system, 3 user" in bad_rows.summary()


def test_the_end_of_a_document_carries_loss_only_after_an_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder("chat", tokenizer, responses_only=True, chat_template="chatml")
    answered = (turn("user", "river"), turn("assistant", "stone"))
    for turns, ends in ((answered, True), ((*answered, turn("user", "cloud")), False)):
        encoded = encoder.encode([Document("a", messages=turns)])
        assert encoded.carries_loss is not None
        assert encoded.ids[-1] == tokenizer.eos_token_id
        assert bool(encoded.carries_loss[-1]) is ends
        assert "cloud" not in tokenizer.decode(encoded.ids[encoded.carries_loss])


HEADERS_AND_ENDS = [
    ("'<|im_start|>' + m['role'] + '\\n'", "<|im_end|>\\n"),
    ("'<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'", "<|eot_id|>"),
    ("'### ' + m['role'] + ':\\n'", "\\n\\n"),
    ("'[' + m['role'] + '] '", "</s>"),
    ("m['role'] + ':'", ""),
]
CONTENTS = [
    "m['content']",
    "m['content'] | trim",
    "m['content'].lstrip()",
    "m['content'].split('</think>')[-1].lstrip('\\n')",
    "(m['content'] | trim if not loop.last else m['content'])",
    "(m['content'] if m['role'] == 'user' else m['content'].replace('β', 'ζ'))",
]
CHOICES = ["messages", "messages | reverse", "messages[-3:]", "messages | rejectattr('role', 'eq', 'tool')"]
SYSTEM_MOVES = (
    "{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{% for m in turns %}"
    "{% if m['role'] == 'user' and loop.last and sys is defined %}{{ sys + '\\n\\n' }}{% endif %}"
)


@st.composite
def templates(draw: st.DrawFn) -> str:
    """Templates that write, move, trim, strip, turn around or leave out turns."""
    header, end = draw(st.sampled_from(HEADERS_AND_ENDS))
    content = draw(st.sampled_from(CONTENTS))
    end = draw(st.sampled_from(["{{ '" + end + "' }}", "</s>{{ '' if loop.last else '\\n' }}"]))
    begin, written = "{{ " + header + " }}", "{{ " + content + " }}" + end
    body = begin + written
    if draw(st.booleans()):
        blocks = "{% generation %}" + written + "{% endgeneration %}"
        body = begin + "{% if m['role'] == 'assistant' %}" + blocks + "{% else %}" + written + "{% endif %}"
    turns = draw(st.sampled_from(CHOICES))
    moves = draw(st.booleans())
    loop = SYSTEM_MOVES if moves else "{% set turns = (" + turns + ") | list %}{% for m in turns %}"
    prompt = "{% set m = {'role': 'assistant'} %}" + begin
    prompts = ["", prompt, "{% if add_generation_prompt %}" + prompt + "{% endif %}"]
    footer = draw(st.sampled_from(["", "{{ eos_token }}"]))
    return (
        draw(st.sampled_from(["", "{{ bos_token }}"]))
        + loop
        + body
        + "{% endfor %}"
        + draw(st.sampled_from(prompts))
        + footer
    )


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    def text(role: str) -> str:
        core = draw(st.text(LETTERS[role], min_size=1, max_size=6))
        return draw(st.sampled_from(["", " ", "\n"])) + core + draw(st.sampled_from(["", "", "\n", " "]))

    turns = [turn("system", text("system"))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(turn("user", text("user")))
        if draw(st.booleans()):
            turns.append(turn("tool", text("tool")))
        answer = text("assistant")
        if draw(st.booleans()):
            answer = f"<think>\n{text('assistant')}\n</think>\n\n{answer}"
        turns.append(turn("assistant", answer))
    return turns


@settings(max_examples=300)
@given(templates(), conversations())
def test_no_label_is_outside_an_answer_and_every_answer_is_labelled_or_counted(
    tokenizer: PreTrainedTokenizerFast, template: str, turns: list[Message]
) -> None:
    try:
        chat = writer(tokenizer, template).write(turns)
    except ChatTemplateError:
        assert "replace(" in template, "only a template that changes an answer may lose it"
        return
    with_loss = "".join(labelled(chat))
    assert not OTHERS.search(with_loss), "a label is on another turn"
    assert not re.search(r"user|system|tool|assistant", with_loss), "a label is on the beginning of a turn"
    spans = sorted(chat.answers)
    assert all(first < last for first, last in spans)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
    # Every answer whose last part is in the text carries loss, or it is counted.
    found = sum(bool(GREEK.search(part)) for part in labelled(chat))
    answers = sum(message["role"] == "assistant" for message in turns)
    assert found + chat.dropped_turns.get("answer", 0) >= answers
    unlabelled = GREEK.findall("".join(_outside(chat)))
    if not chat.dropped_turns.get("answer"):
        assert not unlabelled, "part of an answer carries no loss"
    if "replace(" not in template and "[-3:]" not in template:
        assert not chat.dropped_turns.keys() & {"answer", "user"}
    system = next((message["content"].strip() for message in turns if message["role"] == "system"), "")
    assert system in chat.text or chat.dropped_turns["system"] == 1


def _outside(chat: WrittenChat) -> list[str]:
    edges = [0, *(edge for span in sorted(chat.answers) for edge in span), len(chat.text)]
    return [chat.text[first:last] for first, last in zip(edges[::2], edges[1::2], strict=True)]


def test_chats_without_answers_are_bad_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    bad_rows = BadRows("chat", 0.9)
    encoder = Encoder(
        "chat", tokenizer, responses_only=True, chat_template="{{ messages[0]['content'] }}", bad_rows=bad_rows
    )
    encoder.encode([Document("a", messages=(ASK, turn("assistant", "αβ")))])
    assert bad_rows.bad_rows == {Reason.CHAT_TEMPLATE: 1}
