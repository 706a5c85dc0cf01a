"""The console of all output: text is shown as it is. Names and data neither style it nor reach the terminal as commands."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, which a terminal obeys, changes of the writing direction, and surrogates."""


def plain(text: str) -> str:
    """Text with a question mark for each character that a terminal would obey instead of showing it."""
    return _COMMANDS.sub("?", text)


def marked(template: str, *values: object) -> Text:
    """Text from a template with console markup and {} for values, which are shown as they are.

    >>> marked("[bold]{}[/bold]", "wiki[en]").plain
    'wiki[en]'
    """
    return Text.from_markup(template.format(*(escape(str(value)) for value in values)), emoji=False)


class PlainConsole(Console):
    """A console without markup and highlighting; only what is a `Text` has a style."""

    def __init__(self, *, stderr: bool = False, soft_wrap: bool = False) -> None:
        super().__init__(stderr=stderr, soft_wrap=soft_wrap, markup=False, highlight=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))
