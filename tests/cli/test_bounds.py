"""Every number on the command line has bounds, and a value outside them is refused before any work."""

from __future__ import annotations

import math
import sys
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from sparsify.cli.bounds import Bounded
from sparsify.cli.main import app, main
from sparsify.errors import RecipeError

BEYOND = [
    "inf",
    "-inf",
    "nan",
    "1e30",
    "-1e30",
    "100000000000000000000",
    "-1",
    "9" * 4500,
    "1e-300",
    "",
    "x",
    "0x10",
    "१",
]


def commands(group: typer.Typer, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for command in group.registered_commands:
        name = command.name or command.callback.__name__.replace("_", "-")  # pyright: ignore[reportOptionalMemberAccess]
        yield (*path, name), command.callback
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        # A group without a name adds its commands to the one that holds it.
        name = (inner.name,) if isinstance(inner.name, str) else ()
        yield from commands(inner.typer_instance, (*path, *name))


def numbers_of(callback: Any) -> Iterator[tuple[str, type, Any]]:
    """Name, type and option of each numeric parameter."""
    for name, hint in typing.get_type_hints(callback, include_extras=True).items():
        if typing.get_origin(hint) is typing.Annotated:
            inner, option = typing.get_args(hint)[:2]
            flat = str(inner)
            kind = float if "float" in flat else int if "int" in flat else None
            if kind is not None:
                yield name, kind, option


FOUND = [(path, name, kind, option) for path, callback in commands(app) for name, kind, option in numbers_of(callback)]


def test_every_number_of_every_command_has_bounds() -> None:
    assert len(FOUND) > 45
    without = [f"{' '.join(path)} {name}" for path, name, _, option in FOUND if bounds(option) is None]
    assert without == []


def bounds(option: Any) -> Bounded | None:
    owner = getattr(option.callback, "__self__", None)
    return owner if isinstance(owner, Bounded) else None


@pytest.mark.parametrize("value", BEYOND)
def test_no_number_is_infinite_or_without_end(value: str) -> None:
    """0 and 1e-300 are allowed for some; what is allowed is finite and within the stated bounds."""
    for _, name, kind, option in FOUND:
        bounded = bounds(option)
        assert bounded is not None
        number, refused = math.nan, None
        try:
            number = bounded.parse(name, value)
        except RecipeError as error:
            refused = str(error)
        if refused is None:
            assert isinstance(number, kind)
            assert number in bounded.also or bounded.least <= number <= bounded.most
        else:
            assert "Allowed: " in refused
            assert len(refused) < 200


REQUIRED = {
    ("mixture", "tune"): ["--over", "token_shares", "--trials", "4", "--trial-tokens", "4096"],
    ("convert",): ["--to", "out"],
    ("export", "write"): ["--to", "out"],
    ("simulate",): ["--device", "phone"],
}


@pytest.mark.parametrize(
    ("path", "name", "option"),
    [
        pytest.param(path, name, option, id=" ".join(path))
        for path, (name, option) in {path: (name, option) for path, name, _, option in FOUND}.items()
    ],
)
def test_every_command_refuses_a_number_outside_its_bounds(
    path: tuple[str, ...],
    name: str,
    option: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flag = next((one for one in option.param_decls or () if one.startswith("--")), f"--{name.replace('_', '-')}")
    value = "1" + "0" * 40
    command = [*path, "none", "none", *REQUIRED.get(path, []), f"{flag}={value}"]
    monkeypatch.setattr(sys, "argv", ["sparsify", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(f"error {flag} is '1")
    assert "Allowed: " in said


def test_bounds_are_said_as_a_recipe_says_them() -> None:
    assert Bounded(float, 0.001, 1e6).words == "numbers from 0.001 to 1,000,000"
    assert Bounded(int, 1, 10**6).words == "integers from 1 to 1,000,000"
