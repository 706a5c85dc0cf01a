"""Chat templates: which one a mixture uses, and where the responses are in the rendered text."""

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
"""Chat template for tokenizers without one: OpenAI's public ChatML format."""

CharacterSpan = tuple[int, int]
"""Index of the first character, and one past the last."""


class ChatTemplateError(Exception):
    pass


def chat_template_text(setting: str | None, tokenizer: PreTrainedTokenizerFast) -> str:
    """The Jinja template that renders instruction documents.

    Args:
        setting: `mixture.chat_template`: null (the tokenizer's template, or ChatML if it has none), `chatml`, the path
            of a .jinja file, or the Jinja text itself.
        tokenizer: Its template is the default.

    Raises:
        MixtureError: If the file cannot be read, or the text is not valid Jinja.
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
        # Checks the syntax only: transformers decides which functions a template may call.
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        if isinstance(error, jinja2.TemplateSyntaxError) and "generation" in str(error):
            return text  # transformers' own {% generation %} tag
        raise MixtureError(
            f"mixture.chat_template={setting!r} cannot be read: {error}.",
            allowed="Allowed: null (the tokenizer's template, or ChatML if it has none), chatml, a Jinja text, or the "
            "path of a .jinja file.",
        ) from error
    return text


class ChatWriter:
    """Renders conversations as text.

    Args:
        tokenizer: Provides the special tokens that a template names.
        template: Jinja text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str) -> None:
        self._tokenizer, self._template = tokenizer, template

    def write(self, messages: Sequence[Message], *, with_responses: bool) -> tuple[str, list[CharacterSpan]]:
        """Text of a conversation, and the spans of its responses if requested.

        Raises:
            ChatTemplateError: If the template fails.
        """
        turns = list(messages)
        text = self._render(turns).rstrip()
        spans: list[CharacterSpan] = []
        if with_responses:
            for turn, message in enumerate(turns):
                if message["role"] == "assistant":
                    # The response starts where the whole text diverges from the prompt for this response, and ends
                    # where it diverges from the conversation that ends with this response.
                    prompt = self._render(turns[:turn], add_generation_prompt=True)
                    upto = text if turn == len(turns) - 1 else self._render(turns[: turn + 1])
                    spans.append((_common_characters(text, prompt), _common_characters(text, upto)))
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
            raise ChatTemplateError(str(error).partition("\n")[0] or type(error).__name__) from error
        assert isinstance(text, str)
        return text


def _common_characters(one: str, other: str) -> int:
    if one.startswith(other):
        return len(other)
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
