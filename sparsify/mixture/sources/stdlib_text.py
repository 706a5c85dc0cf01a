"""Text of the Python standard library: code, documentation, and questions with answers.

Nothing is downloaded and no module is imported: modules are read as text and parsed with `ast`. The origin of a
document is its module's dotted name, so a held-out module is held out as code, as prose and in questions.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sparsify.mixture.sources.documents import Document, conversation

MIN_PROSE_CHARACTERS = 200
MAX_SHOWN_LINES = 24
MAX_ANSWER_CHARACTERS = 2_000

# Some distributions remove some of these folders; the others hold data rather than text to learn from.
SKIPPED = frozenset(("test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__", "__phello__"))

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def stdlib_documents(kind: str) -> Iterator[Document]:
    """Documents of one kind (`code`, `prose` or `questions`). The order depends on names only."""
    readers = {
        "code": code_documents,
        "prose": prose_documents,
        "questions": question_documents,
    }
    return readers[kind]()


@cache
def module_paths() -> tuple[tuple[str, Path], ...]:
    """Dotted name and path of every module, in the order of the documents."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, children, files in os.walk(root):
        # Prune the walk: site-packages is often inside this folder and may hold a hundred thousand files.
        children[:] = [name for name in children if name.isidentifier() and name not in SKIPPED]
        for name in files:
            path = Path(folder, name)
            parts = path.relative_to(root).with_suffix("").parts
            if path.suffix == ".py" and parts[-1].isidentifier() and not parts[-1].startswith("_sysconfigdata"):
                found.append((".".join(parts).removesuffix(".__init__"), path))
    return tuple(sorted(found, key=_drawing_order))


def _drawing_order(named: tuple[str, object]) -> bytes:
    # Order by hash, not by name: a run that reads only the first part of a source gets a random sample of it.
    return hashlib.blake2b(named[0].encode(), digest_size=8, person=b"order").digest()


def code_documents() -> Iterator[Document]:
    """The source of every module, one document per file."""
    for module, path in module_paths():
        text = _read(path)
        if text.strip():
            yield Document(module, text=text)


def prose_documents() -> Iterator[Document]:
    """One page of documentation per module, and one per topic of the language reference."""
    from pydoc_data.topics import topics

    pages: list[tuple[str, Path | str]] = [*module_paths()]
    pages += [(f"topics.{name}", text) for name, text in topics.items()]
    for name, content in sorted(pages, key=_drawing_order):
        if isinstance(content, str):
            page = inspect.cleandoc(content).strip() + "\n"
        else:
            page = _documentation_page(name, ast.parse(_read(content)))
        if len(page) >= MIN_PROSE_CHARACTERS:
            yield Document(name, text=page)


def question_documents() -> Iterator[Document]:
    """Questions about functions and classes, answered with their docstring, signature or source."""
    every = [question for module in module_paths() for question in module_questions(*module)]
    # Shuffle over all modules: module by module, a short run would see few modules and hold out fewer.
    yield from sorted(every, key=_question_order)


def module_questions(module: str, path: Path) -> Iterator[Document]:
    text = _read(path)
    lines = text.splitlines()
    for named in _definitions(ast.parse(text), module):
        if not any(part.startswith("_") for part in named.path.split(".")):
            yield from _questions_about(module, named, lines)


def _question_order(document: Document) -> bytes:
    assert document.messages is not None
    return _drawing_order((document.messages[0]["content"], None))


@dataclass(frozen=True)
class _Named:
    """A function or class and its dotted path including the module, e.g. `json.JSONEncoder.encode`."""

    path: str
    node: Definition
    is_method: bool


def _read(path: Path) -> str:
    # tokenize.open honours the file's coding line, which a few old modules still need.
    with tokenize.open(path) as file:
        return file.read()


def _definitions(node: ast.Module | ast.ClassDef, path: str, is_method: bool = False) -> Iterator[_Named]:
    for child in node.body:
        if isinstance(child, Definition):
            yield _Named(f"{path}.{child.name}", child, is_method)
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, f"{path}.{child.name}", is_method=True)


def _docstring(node: ast.Module | Definition) -> str:
    return inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()


def _documentation_page(module: str, tree: ast.Module) -> str:
    sections = [_docstring(tree)]
    for named in _definitions(tree, module):
        text = _docstring(named.node)
        if text:
            sections.append(f"{_heading(named)}\n\n{textwrap.indent(text, '    ')}")
    body = "\n\n".join(section for section in sections if section)
    return f"{module}\n{'=' * len(module)}\n\n{body}\n" if body else ""


def _heading(named: _Named) -> str:
    if isinstance(named.node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in named.node.bases)
        return f"class {named.path}({bases})" if bases else f"class {named.path}"
    return f"{named.path}({_arguments(named)})"


def _arguments(named: _Named) -> str:
    """The arguments as a caller passes them: without `self` or `cls`."""
    assert not isinstance(named.node, ast.ClassDef)
    text = ast.unparse(named.node.args)
    decorators = {ast.unparse(decorator) for decorator in named.node.decorator_list}
    if not named.is_method or "staticmethod" in decorators:
        return text
    return text.partition(", ")[2] if not text.startswith("*") else text


def _choose(phrasings: Sequence[str], key: str) -> str:
    """One of several phrasings. The choice is a hash of `key`, so it is the same in every process."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return phrasings[int.from_bytes(digest, "big") % len(phrasings)]


WHAT = (
    "What does {name} do?",
    "Explain {name}.",
    "What is {name} for?",
    "Describe `{name}` from the Python standard library.",
)
SUMMARY = (
    "Summarise {name} in one sentence.",
    "In one line: what is {name}?",
    "Give a short description of `{name}`.",
)
ARGUMENTS = (
    "Which arguments does {name} take?",
    "How is {name} called?",
    "What is the signature of `{name}`?",
)
DEFINE = (
    "Write the signature and docstring of {name}.",
    "Write a Python stub with a docstring for `{name}`.",
)
SOURCE = (
    "Show the source of {name}.",
    "How is {name} implemented?",
    "Write the Python code of `{name}`.",
)
METHODS = (
    "Which methods does {name} have?",
    "List the public methods of the class `{name}`.",
)


def _questions_about(module: str, named: _Named, lines: list[str]) -> Iterator[Document]:
    for phrasings, answer in (
        *_answers_from_docstring(named),
        *_answers_from_structure(named, lines),
    ):
        if 0 < len(answer) <= MAX_ANSWER_CHARACTERS:
            question = _choose(phrasings, named.path).format(name=named.path)
            yield conversation(module, question, answer)


def _answers_from_docstring(named: _Named) -> Iterator[tuple[Sequence[str], str]]:
    text = _docstring(named.node)
    if not text:
        return
    yield WHAT, text
    summary = " ".join(text.partition("\n\n")[0].split())
    if summary != text:
        yield SUMMARY, summary
    if not isinstance(named.node, ast.ClassDef):
        stub = f'def {named.node.name}({ast.unparse(named.node.args)}):\n    """{text}"""'
        yield DEFINE, f"```python\n{stub}\n```"


def _answers_from_structure(named: _Named, lines: list[str]) -> Iterator[tuple[Sequence[str], str]]:
    node = named.node
    if isinstance(node, ast.ClassDef):
        methods = [child.name for child in node.body if isinstance(child, ast.FunctionDef)]
        public = [f"`{name}`" for name in dict.fromkeys(methods) if not name.startswith("_")]
        if public:
            yield (
                METHODS,
                f"The public methods of `{named.path}` are {', '.join(public)}.",
            )
        return
    arguments = _arguments(named)
    takes = f"`{named.path}({arguments})`" if arguments else "no arguments"
    yield (
        ARGUMENTS,
        f"`{named.path}` takes {takes}." if not arguments else f"It is called as {takes}.",
    )
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    shown = lines[first - 1 : node.end_lineno]
    if len(shown) <= MAX_SHOWN_LINES:
        yield SOURCE, "```python\n" + textwrap.dedent("\n".join(shown)) + "\n```"
