"""The documentation holds: its commands run, its options and settings exist, its links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command

from sparsify.cli import main
from sparsify.recipe.compose import compose_recipe, sweep
from sparsify.recipe.fields import settings_of
from sparsify.recipe.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
FENCE = re.compile(r"^(?:<!-- test: (?P<test>\S+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
SETTING = re.compile(r"(?<![\w./-])([a-z_]+(?:\.[a-z_]+)+)=")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@dataclass(frozen=True)
class Fence:
    """A fenced block. `test` is `tiny` (run it), a file's name (write it there for the commands), or None."""

    language: str
    text: str
    test: str | None

    @property
    def commands(self) -> list[list[str]]:
        """Arguments of every `sparsify` command in a console block."""
        lines = [line[2:] for line in self.text.splitlines() if line.startswith("$ ")]
        words = [shlex.split(line, comments=True) for line in lines if self.language == "console"]
        return [arguments for program, *arguments in words if program == "sparsify"]


def fences(page: Path) -> list[Fence]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Fence(match["language"], match["text"], match["test"]) for match in found]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, stock: dict[str, Path], recipe_file: Path) -> Iterator[Path]:
    """The folder that the pages are written for, as the current and the home folder: my_model, my_text.txt, ..."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(stock["mistral"], folder / "my_model")
    texts = [f"Note {i}: " + f"word{i % 7} value{i % 11} " * 20 for i in range(200)]
    (folder / "my_text.txt").write_text("<|endoftext|>".join(texts))
    _write_rows(folder / "my_documents.jsonl", [{"body": f"On {text}"} for text in texts])
    turns = [{"question": f"What is {i}?", "answer": f"It is number {i}." * 3} for i in range(300)]
    _write_rows(folder / "my_questions.jsonl", turns)
    for fence in (fence for page in PAGES for fence in fences(page)):
        if fence.test not in (None, "tiny"):
            (folder / fence.test).write_text(fence.text)
    recipe = recipe_file.read_text().replace("mixture: quickstart", "mixture: my_mixture")
    (folder / "my_recipe.yaml").write_text(recipe.replace("name: tiny", "name: my_recipe"))
    (folder / "mixture").mkdir()
    shutil.copy(folder / "my_mixture.yaml", folder / "mixture")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        yield folder


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def run_command(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sparsify", *arguments])
        with pytest.raises(SystemExit) as end:
            main.main()
    assert end.value.code in (0, None), arguments


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Path:
    """`workplace` with the run that all pages share."""
    run_command(["train", "my_recipe.yaml"])
    return workplace


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(fence.test == "tiny" for fence in fences(page))],
    ids=lambda page: page.name,
)
@pytest.mark.xdist_group("docs")
def test_marked_blocks_run(page: Path, trained: Path) -> None:
    for fence in fences(page):
        if fence.test != "tiny":
            continue
        if fence.language == "python":
            subprocess.run([sys.executable, "-c", fence.text], check=True)
            continue
        assert fence.commands, fence
        for arguments in fence.commands:
            run_command(arguments)


def parse(arguments: list[str]) -> dict[str, Any]:
    """What a command line means to the command line interface, without running it."""
    command: Any = get_command(main.app)
    while isinstance(command, TyperGroup):
        _, command, arguments = command.resolve_command(typer.Context(command), arguments)
    return command.make_context(command.name, list(arguments)).params


@each_page
def test_commands_and_their_settings_exist(page: Path, workplace: Path) -> None:
    for arguments in (arguments for fence in fences(page) for arguments in fence.commands):
        asked = parse(arguments)
        if "overrides" in asked:
            overrides = asked["overrides"] or []
            # A benchmark of several recipes names none.
            recipe = asked.get("recipe", "proof/dense" if arguments[:2] == ["bench", "proof"] else "quickstart")
            for choice in sweep(overrides) if asked.get("multirun") else [overrides]:
                compose_recipe(recipe, choice)


@each_page
def test_settings_in_the_text_exist(page: Path) -> None:
    settings = settings_of(Recipe)
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for code in INLINE_CODE.findall(text):
        for setting in SETTING.findall(code):
            assert setting in settings, setting


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    missing = [link for link in links if "://" not in link and not (page.parent / link).resolve().exists()]
    assert not missing


def test_extras_that_are_named_exist() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    files = [*PAGES, *(ROOT / "recipes").glob("*.yaml"), *(ROOT / "sparsify").rglob("*.py")]
    named = {
        extra.strip(): file.name
        for file in files
        for extras in re.findall(r"(?:sparsify-lm|-e '?\.)\[([a-z0-9, -]+)\]", file.read_text())
        for extra in extras.split(",")
    }
    assert "eval" in named
    assert {extra: file for extra, file in named.items() if extra not in known} == {}
