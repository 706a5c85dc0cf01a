"""Evaluation sets that training text must not contain: their files, and the text of their items."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from sparsify.errors import MixtureError, nearest
from sparsify.metadata import read_yaml, user_path
from sparsify.mixture.sources.bad_rows import BadRows
from sparsify.mixture.sources.read import file_documents
from sparsify.mixture.sources.readers import read_rows
from sparsify.mixture.sources.source_files import FORMATS, ROW_FORMATS, TEXT_FORMATS, file_state
from sparsify.recipe.catalogue import YAML, folder
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.source import SourceSection


def evaluation_paths(mixture: MixtureSection) -> list[Path]:
    """The files that `decontaminate_against` names, without repetitions, sorted within each pattern.

    Raises:
        MixtureError: If an entry is neither a suite that names files, nor a path or glob that matches one.
    """
    paths: list[Path] = []
    for entry in mixture.decontaminate_against:
        for pattern in _patterns(entry):
            matches = sorted(glob.glob(str(user_path(pattern)), recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
            found = [Path(match) for match in matches if Path(match).is_file()]
            if not found:
                raise MixtureError(
                    f"mixture.decontaminate_against: no file matches {pattern!r} (looked from {Path.cwd()}).",
                    allowed=f"{nearest(entry, _suites())}Suites: {', '.join(_suites())}; the path of a suite's "
                    f".yaml; or paths and globs of {FORMATS}.",
                    next_step="Correct the entry"
                    + ("." if pattern == entry else f", or evaluation_files of suite {entry}."),
                )
            paths += found
    return list(dict.fromkeys(path.resolve() for path in paths))


def decontamination_fingerprint(mixture: MixtureSection) -> list[list[str | int]]:
    """Path, size and time of every evaluation file: they decide which documents are dropped."""
    stats = [(path, path.stat()) for path in evaluation_paths(mixture)]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def read_items(path: Path) -> Iterator[str]:
    """The text of each item of one evaluation file.

    The item of a row is all of its strings in order, including those in lists and objects: question, choices, answer.
    Plain text holds items separated by <|endoftext|>.

    Raises:
        MixtureError: If the file cannot be read, or its format is unknown.
    """
    file, bad_rows = file_state(path), BadRows(str(path), max_bad_fraction=1.0)
    if file.format in TEXT_FORMATS:
        plain = file_documents(file, SourceSection(token_share=1.0), bad_rows)
        yield from (document.text or "" for document in plain)
    elif file.format in ROW_FORMATS:
        for _, row in read_rows(file, None, partial(bad_rows.add, str(path))):
            yield "\n".join(strings(row))
    else:
        raise MixtureError(f"The evaluation file {path} has an unknown format.", allowed=f"{FORMATS}.")
    # The file must be complete: a skipped item could not be found in the training text.
    if bad_rows.num_bad_rows:
        raise MixtureError(
            "\n".join([f"The evaluation file {path} has bad rows:", *bad_rows.lines()]),
            next_step="Check that the file is complete and in the format that its name says.",
        )


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings(list(value.values()))
    elif isinstance(value, Iterable):
        for one in value:
            yield from strings(one)


def _suites() -> list[str]:
    return sorted(path.stem for path in folder("eval").glob("*.yaml"))


def _patterns(entry: str) -> list[str]:
    """The evaluation files of a suite, or the entry itself if it is a path or glob."""
    if entry in _suites():
        suite = folder("eval") / f"{entry}.yaml"
    elif entry.endswith(YAML):
        suite = user_path(entry)
    else:
        return [entry]
    try:
        files = read_yaml(suite, MixtureError).get("evaluation_files")
    except MixtureError as error:
        raise MixtureError(f"mixture.decontaminate_against: {error.given}", next_step=error.next_step) from error
    if not files or not isinstance(files, list):
        raise MixtureError(
            f"mixture.decontaminate_against: suite {entry!r} names no evaluation_files.",
            allowed=f"A list of paths or globs of {FORMATS}.",
            next_step=f"Add evaluation_files to {suite}, or give the files themselves.",
        )
    return [str(file) for file in files]
