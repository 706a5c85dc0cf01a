"""Jinja templates that somebody else wrote, in a sandbox that ends them: limits on time, memory and output.

Every loop, call, filter and concatenation of a template passes through its environment, which counts what it makes.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Sized
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from sparsify.errors import MixtureError

MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_SECONDS = 10.0
MAX_CALLS = 5_000_000
"""Iterations of loops and calls of one rendering."""
MAX_VALUE = 1 << 26
"""Characters of one text, or items of one list."""
MAX_TOTAL = 1 << 28
"""Characters and items of everything that one rendering makes."""
MAX_WIDTH = 100_000
"""Width to pad, indent or cut to, and digits of a number."""

_FORMAT_WIDTH = re.compile(r"\d{6,}|\{[^{}]*:[^{}]*\{")
_PERCENT_WIDTH = re.compile(r"%[^a-zA-Z%]*(?:\d{6,}|\*)")
_PADDING = {
    "center",
    "indent",
    "ljust",
    "rjust",
    "zfill",
    "expandtabs",
    "wordwrap",
    "truncate",
    "batch",
    "slice",
    "tojson",
}


class TemplateLimitError(MixtureError):
    """A template that takes too long, or makes too much."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"A template {what}.",
            allowed=f"{MAX_SECONDS:g} seconds, {MAX_CALLS:,} calls and iterations, and {MAX_TOTAL:,} characters for one row.",
            next_step="Correct text_template, prompt_template, response_template or chat_template of the mixture, or the "
            "chat template of the tokenizer.",
        )


class _Spent(threading.local):
    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.calls = self.total = 0
        self.deadline = time.monotonic() + MAX_SECONDS


class _LimitedTemplate(jinja2.Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        self.environment.spent.begin()  # pyright: ignore[reportAttributeAccessIssue]
        try:
            return super().render(*args, **kwargs)
        except (RecursionError, MemoryError) as error:
            raise TemplateLimitError("calls itself without end, or needs too much memory") from error


class _Counted(NodeTransformer):
    """Makes every loop and every concatenation a call of the environment, which counts it."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None, lineno=node.lineno)


class _Limits:
    """What LimitedEnvironment adds to a sandboxed environment."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])
    template_class = _LimitedTemplate
    spent: _Spent

    def limit(self) -> None:
        """Begins to count; the environment has all its filters."""
        environment: Any = self
        self.spent = _Spent()
        environment.globals.pop("lipsum", None)
        environment.filters = {name: self._limited(name, one) for name, one in environment.filters.items()}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)  # pyright: ignore[reportAttributeAccessIssue]
        return _Counted().visit(tree)

    def tick(self) -> None:
        """Counts one iteration or call. Raises TemplateLimitError if there were too many, or time is over."""
        self.spent.calls += 1
        if self.spent.calls > MAX_CALLS:
            raise TemplateLimitError(f"makes more than {MAX_CALLS:,} calls and iterations")
        if time.monotonic() > self.spent.deadline:
            raise TemplateLimitError(f"takes more than {MAX_SECONDS:g} seconds for one row")

    def made(self, value: Any) -> Any:
        """Counts a value, and returns it. Raises TemplateLimitError if there were too many."""
        if isinstance(value, str | bytes | list | tuple):
            self._check_size(len(value))
            self.spent.total += len(value)
            if self.spent.total > MAX_TOTAL:
                raise TemplateLimitError(f"makes more than {MAX_TOTAL:,} characters")
        return value

    def joined(self, *parts: Any) -> str:
        texts = [str(part) for part in parts]
        self._check_size(sum(map(len, texts)))
        return "".join(texts)

    def concat(self, parts: Iterable[str]) -> str:
        kept = []
        for part in parts:
            self.spent.total += len(part)
            if self.spent.total > MAX_TOTAL:
                raise TemplateLimitError(f"makes more than {MAX_TOTAL:,} characters")
            kept.append(part)
        return "".join(kept)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(one, Sized) and isinstance(times, int):
                    self._check_size(len(one) * times)
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            digits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            self._check_width(digits)
        if operator == "%" and isinstance(left, str) and _PERCENT_WIDTH.search(left):
            raise TemplateLimitError(f"pads to more than {MAX_WIDTH:,} characters")
        return self.made(super().call_binop(context, operator, left, right))  # pyright: ignore[reportAttributeAccessIssue]

    def call(_self, _context: Any, _called: Any, *args: Any, **kwargs: Any) -> Any:
        _self.tick()
        if _called == _self.tick:
            return None
        _self._check(getattr(_called, "__name__", ""), getattr(_called, "__self__", ""), args, kwargs)
        return _self.made(super().call(_context, _called, *args, **kwargs))  # pyright: ignore[reportAttributeAccessIssue]

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)  # pyright: ignore[reportAttributeAccessIssue]
        if wrapped is not None and _FORMAT_WIDTH.search(value.__self__):
            raise TemplateLimitError(f"pads to more than {MAX_WIDTH:,} characters")
        return wrapped

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        passes = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            own = args[passes] if len(args) > passes else ""
            self._check(name, own, args[passes + 1 :], kwargs)
            if name == "format" and isinstance(own, str) and _PERCENT_WIDTH.search(own):
                raise TemplateLimitError(f"pads to more than {MAX_WIDTH:,} characters")
            return self.made(function(*args, **kwargs))

        return limited

    def _check(self, name: str, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses a call whose result would be too large, before it is made."""
        given = [*args, *kwargs.values()]
        if name in _PADDING:
            for one in given:
                if isinstance(one, int):
                    self._check_width(one)
        elif name in ("replace", "join", "translate"):
            size = len(own) if isinstance(own, Sized) else MAX_WIDTH
            largest = max((len(one) for one in given if isinstance(one, Sized)), default=0)
            if name == "join" and isinstance(own, str):  # SEPARATOR.join(ITEMS)
                items = given[0] if given else ()
                size, largest = len(items) if isinstance(items, Sized) else MAX_WIDTH, len(own)
            self._check_size((size + 1) * largest if largest > 1 else 0)

    def _check_size(self, size: int) -> None:
        if size > MAX_VALUE:
            raise TemplateLimitError(f"makes a text or list of {size:,} characters or items")

    def _check_width(self, width: int) -> None:
        if abs(width) > MAX_WIDTH:
            raise TemplateLimitError(f"pads to more than {MAX_WIDTH:,} characters, or makes a number of as many digits")


class LimitedEnvironment(_Limits, ImmutableSandboxedEnvironment):
    """A sandbox with limits, whose templates raise TemplateLimitError when they reach one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.limit()


def limited(environment: jinja2.Environment) -> jinja2.Environment:
    """Gives a sandboxed environment, with its own filters and extensions, the limits."""
    kind = type(environment)
    environment.__class__ = type(f"Limited{kind.__name__}", (_Limits, kind), {})
    environment.limit()  # pyright: ignore[reportAttributeAccessIssue]
    return environment


def compiled(text: str, environment: jinja2.Environment) -> jinja2.Template:
    """A template of an environment with limits.

    Raises:
        jinja2.TemplateSyntaxError: If the text is not a template, or nests too deep to be one.
    """
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        raise jinja2.TemplateSyntaxError(f"more than {MAX_TEMPLATE_CHARACTERS:,} characters", 1)
    try:
        return environment.from_string(text)
    except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise jinja2.TemplateSyntaxError("it nests too deep, or has too large a number", 1) from error
