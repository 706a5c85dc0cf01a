"""Chat templates: which one a mixture uses, how it is rendered, and what it writes around an answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from sparsify.errors import MixtureError
from sparsify.metadata import read_text, user_path
from sparsify.mixture.sources.documents import Message
from sparsify.mixture.tokens.chat_marks import CharacterSpan, common_end, mark
from sparsify.recipe.templates import compiled, limited

CHATML = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}<|im_end|>"
    "{{ '\\n' }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '\\n' if message['content'] or not loop.first }}<tool_call>\n{{ call['function'] | tojson }}{{ '\\n' }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Chat template for tokenizers without one: OpenAI's public ChatML format, with tools and tool calls as JSON."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SHORTEST_HEADER = 3
"""Characters of what begins a turn, at least."""

Turns = list[Message]
Spans = list[CharacterSpan]
Tools = list[dict[str, Any]]


# The environment with transformers' extensions and functions; a template is compiled by it only once it has the limits.
_ENVIRONMENT = limited(chat_template_utils._compile_jinja_template("").environment)
_STARTED = datetime.now()
# A template that writes the time writes one text however often it is rendered: its turns are found in it by rendering again.
_ENVIRONMENT.globals["strftime_now"] = _STARTED.strftime


@lru_cache
def _compile_limited(template: str) -> jinja2.Template:
    return compiled(template, _ENVIRONMENT)


# Whichever function of transformers renders a chat template, it compiles it here.
chat_template_utils._compile_jinja_template = _compile_limited


class ChatTemplateError(Exception):
    pass


def chat_template_text(setting: str | None, tokenizer: PreTrainedTokenizerFast) -> str:
    """The Jinja template that renders instruction documents. `setting` is null (the tokenizer's template, or ChatML if
    it has none), `chatml`, the path of a .jinja file, or the Jinja text itself. Raises MixtureError if it cannot be
    read or is not valid.
    """
    text = CHATML if setting == "chatml" else setting
    if text is None:
        own = tokenizer.chat_template
        text = str((own.get("default") if isinstance(own, dict) else own) or CHATML)
    try:
        if setting is not None and text.endswith(".jinja"):
            text = read_text(user_path(text), MixtureError)
        _compile_limited(text)
    except (MixtureError, jinja2.TemplateError) as error:
        what = "The tokenizer's chat template" if setting is None else f"mixture.chat_template={setting[:200]!r}"
        raise MixtureError(
            f"{what} cannot be read: {str(error).partition(chr(10))[0]}.",
            allowed="Allowed: null (the tokenizer's template, or ChatML if it has none), chatml, a Jinja text, or the "
            "path of a .jinja file.",
        ) from error
    return text


class ChatTemplate:
    """A chat template with the special tokens of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        self._text = text
        self._special_tokens: dict[str, Any] = tokenizer.special_tokens_map
        self.bos = str(tokenizer.bos_token or "")

    def render(
        self, turns: Turns, tools: Tools | None = None, *, prompt: bool = False, blocks: bool = False
    ) -> Rendered:
        """Text of the turns and its {% generation %} blocks, with the beginning of an answer for a `prompt`."""
        try:
            rendered: Any = render_jinja_template(
                [turns],
                tools=tools,  # pyright: ignore[reportArgumentType]
                chat_template=self._text,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=blocks,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise ChatTemplateError(str(error).partition("\n")[0] or type(error).__name__) from error
        (text,), found = rendered
        return Rendered(text, found[0] if blocks else [])

    @property
    def has_blocks(self) -> bool:
        return GENERATION.search(self._text) is not None

    @cached_property
    def ends(self) -> Ends:
        """How the template begins and ends the turns of an assistant, from conversations of one and two turns."""
        return Ends.of(self)


@dataclass(frozen=True)
class Rendered:
    text: str
    blocks: Spans


@dataclass(frozen=True)
class Ends:
    """What a template writes around an answer.

    Attributes:
        prompt: What is between a question and its answer: the answer begins after it. Empty if these are blanks.
        closing: What ends an answer that another turn follows.
        last: What ends the last answer; None if that is not known.
        takes_parts: Whether the template writes content parts only, and no plain text.
    """

    prompt: str = ""
    closing: str = ""
    last: str | None = None
    takes_parts: bool = False

    @classmethod
    def of(cls, template: ChatTemplate) -> Ends:
        for system in ([], ["system"]):
            for parts in (False, True):
                try:
                    ends = cls._probe(template, system, parts)
                except ChatTemplateError:
                    continue
                if ends is not None:
                    return ends
        return cls()

    @classmethod
    def _probe(cls, template: ChatTemplate, system: list[str], parts: bool) -> Ends | None:
        roles = [*system, "user", "assistant"]
        one, asked = _around(template, roles, parts), _around(template, roles[:-1], parts)
        if one is None or asked is None:
            return None
        prompted = _around(template, roles[:-1], parts, prompt=True)
        after, before = one[-1], one[-2]
        prompt = prompted[-1].removeprefix(asked[-1]) if prompted and prompted[-1].startswith(asked[-1]) else ""
        if not prompt and before.startswith(asked[-1]):
            header = before[len(asked[-1]) :]  # of a template that knows no prompt
            prompt = header if header.strip() else ""
        try:
            two = _around(template, [*roles, "user"], parts)
        except ChatTemplateError:
            two = None
        if two is None or two[-2].startswith(after):
            return cls(prompt, after, after, parts)
        # What follows the last answer differs from what follows the others: a prompt that is always added, for example.
        # The next turn begins as the first one does, and the prompt as the answer does.
        closing = two[-2][: len(two[-2]) - common_end(two[-2], asked[-2].removeprefix(template.bos))]
        begin = before.strip()
        headers = (begin[start:] for start in range(len(begin) - SHORTEST_HEADER + 1))
        header = next((after.index(header) for header in headers if header in after), len(after))
        last = closing if closing and after.startswith(closing) else after[:header]
        return cls(prompt, closing, last, parts)


def _around(template: ChatTemplate, roles: Sequence[str], parts: bool, prompt: bool = False) -> list[str] | None:
    """What the template writes before, between and after the turns of a short conversation; None if it does not write
    each of them once and in order.
    """
    contents = [f"{role} {number}" for number, role in enumerate(roles)]
    turns = [
        {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
        for role, text in zip(roles, contents, strict=True)
    ]
    marked = mark(turns)
    text, spans = marked.spans(template.render(marked.turns, prompt=prompt).text)
    if "'type'" in text or not all(spans):
        return None
    edges = [0, *(edge for ((first, last),) in spans for edge in (first, last)), len(text)]
    if edges != sorted(edges):
        return None
    return [text[first:last] for first, last in zip(edges[::2], edges[1::2], strict=True)]
