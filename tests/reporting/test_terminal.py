"""Names and data are shown as they are: they style nothing, and the terminal obeys none of them."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from sparsify.errors import RecipeError
from sparsify.recipe.compose import compose_recipe, load_mixture
from sparsify.reporting.html import page_environment
from sparsify.reporting.log_lines import LineHandler
from sparsify.reporting.plotting import LIGHT, Theme, image
from sparsify.reporting.tables import Table
from sparsify.reporting.terminal import PlainConsole, marked

NAMES = ["wiki[en]", "a[/b]", "[/red]", "[bold]x", "x\\", "$\\frac$", "<img src=x onerror=alert(1)>", "a|b", ":smile:"]


def shown(renderable: object) -> str:
    console = PlainConsole()
    console.file = io.StringIO()
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is(name: str) -> None:
    for renderable in (
        name,
        Group("", name),
        Text(name),
        Table(name, ["source"], [[name]]),
        Panel(name, title=Text(name), expand=False),
        marked("Next: [cyan]sparsify report {}[/cyan]", name),
    ):
        assert name in shown(renderable)


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "\x1b[2J", "a\rb", "\x9b31m", "\u202eabc", "\x00", "\ud800"])
def test_the_terminal_obeys_no_text(text: str) -> None:
    for renderable in (text, Text(text), Table(text, [text], [[text, text]]), marked("[bold]{}[/bold]", text)):
        assert not set(shown(renderable)) & set("\x1b\x07\r\x9b\u202e\x00\ud800")


def test_a_log_line_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    handler = LineHandler(PlainConsole())
    handler.emit(logging.makeLogRecord({"msg": "source [/red]\x1b[31m", "levelno": logging.INFO}))
    assert capsys.readouterr().out == "source [/red]?[31m\n"


@pytest.mark.parametrize("name", ["$\\frac$", "$", "a_{b}^c$", "\\", "<img onerror=x>"])
def test_a_figure_writes_a_name_as_it_is(name: str) -> None:
    def draw(_: Theme) -> Figure:
        figure = Figure()
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], label=name)
        axes.set_title(name)
        axes.set_xticks([0], [name])
        axes.legend()
        return figure

    drawn = image(draw, "name", LIGHT, "svg").decode()
    assert "<img" not in drawn
    assert drawn.count(name.replace("<", "&lt;").replace(">", "&gt;")) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_a_page_and_a_card_have_no_markup_of_a_name(name: str) -> None:
    table = Table(name, ["source"], [[name]])
    page = (
        page_environment("sparsify.reporting")
        .from_string("<p>{{ name }}</p>{{ table }}")
        .render(name=name, table=table)
    )
    assert "<img" not in page
    markdown = table.markdown()
    assert "<img" not in markdown
    assert markdown.splitlines()[-1].replace("\\|", "").count("|") == 2


@pytest.mark.parametrize("name", ["", " ", "a ", "..", ".", "a\nb", "\x1b[31m", "x" * 200, "a//b", "/a", "a/"])
def test_a_name_that_is_no_folder_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    escaped = name.encode("unicode_escape").decode()
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f'defaults: [quickstart, _self_]\nname: "{escaped}"\n')
    with pytest.raises(RecipeError, match="name is"):
        compose_recipe(str(recipe))
    if "//" not in name:
        mixture = tmp_path / "mixture.yaml"
        mixture.write_text(f'name: m\nsources: {{"{escaped}": {{stdlib: code, token_share: 1}}}}\n')
        with pytest.raises(RecipeError, match=r"name of a source|sources"):
            load_mixture(str(mixture))
