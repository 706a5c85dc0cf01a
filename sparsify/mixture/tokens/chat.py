"""Chat templates: which one a mixture uses, and where the answers are in what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.mixture.sources.documents import Message

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Chat template for tokenizers that have none. Public format of OpenAI's ChatML."""

Span = tuple[int, int]
"""First character, and the one after the last."""


class ChatTemplateError(Exception):
    """A template refuses a conversation, or fails on it."""


def chat_template_text(setting: str | None, tokenizer: PreTrainedTokenizerFast) -> str:
    """The Jinja text that instruction documents are written with.

    Args:
        setting: `mixture.chat_template`: null for the tokenizer's own or else ChatML, `chatml`, a path of a .jinja file, or
            the Jinja text itself.
        tokenizer: Whose own template may be used.

    Raises:
        MixtureError: If the file cannot be read, or the text is no Jinja.
    """
    if setting is None:
        own = tokenizer.chat_template
        return (own.get("default") if isinstance(own, dict) else own) or CHATML
    if setting == "chatml":
        return CHATML
    text = setting
    try:
        if setting.endswith(".jinja"):
            text = Path(setting).expanduser().read_text(encoding="utf-8")
        # Only the grammar: what a template may call is known to transformers alone.
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        if isinstance(error, jinja2.TemplateSyntaxError) and "generation" in str(error):
            return text  # transformers' own {% generation %} tag
        raise MixtureError(
            f"mixture.chat_template={setting!r} cannot be read: {error}.",
            allowed="Allowed: null (the tokenizer's own, or else ChatML), chatml, a Jinja text, or the path of a .jinja file.",
        ) from error
    return text


class ChatWriter:
    """Writes conversations as text.

    Args:
        tokenizer: Knows the special tokens that a template names.
        template: Jinja text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str) -> None:
        self._tokenizer, self._template = tokenizer, template

    def write(self, messages: Sequence[Message], *, with_answers: bool) -> tuple[str, list[Span]]:
        """Text of a conversation, and the spans of its answers if they are asked for.

        Raises:
            ChatTemplateError: If the template fails.
        """
        turns = list(messages)
        text = self._render(turns).rstrip()
        spans: list[Span] = []
        if with_answers:
            for turn, message in enumerate(turns):
                if message["role"] == "assistant":
                    # Where the whole text leaves the one that waits for this answer, the answer begins.
                    waiting = self._render(turns[:turn], add_generation_prompt=True)
                    upto = text if turn == len(turns) - 1 else self._render(turns[: turn + 1])
                    spans.append(
                        (_common_characters(text, waiting), _common_characters(text, upto))
                    )
        return text, spans

    def _render(self, turns: list[Message], add_generation_prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                turns,
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ChatTemplateError(
                str(error).partition("\n")[0] or type(error).__name__
            ) from error
        assert isinstance(text, str)
        return text


def _common_characters(one: str, other: str) -> int:
    """Length of the longest common beginning."""
    if one.startswith(other):
        return len(other)
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
