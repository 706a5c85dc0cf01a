"""The evaluation sets that training text must not hold: their files, and the text of their items."""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sparsify.catalogue import YAML, folder
from sparsify.errors import MixtureError, nearest
from sparsify.mixture.sources import FORMATS, ROW_READERS, file_documents
from sparsify.recipe import MixtureSection, SourceSection


def evaluation_paths(mixture: MixtureSection) -> list[Path]:
    """The files that `decontaminate_against` names, each once, sorted within each pattern.

    Raises:
        MixtureError: If an entry is neither a suite that names files, nor a path or glob that matches one.
    """
    paths: list[Path] = []
    for entry in mixture.decontaminate_against:
        for pattern in _patterns(entry):
            matches = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
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
    """Path, size and time of every evaluation file: what is left out of a source depends on them.

    Raises:
        MixtureError: If a file is missing.
    """
    stats = [(path, path.stat()) for path in evaluation_paths(mixture)]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def read_items(path: Path) -> Iterator[str]:
    """The text of each item of one evaluation file.

    A row's item is all its strings in their order, those in lists and in objects too: question, choices, answer.
    Plain text holds items separated by <|endoftext|>.

    Raises:
        MixtureError: If the file cannot be read, or its format is unknown.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    where = f"The evaluation file {path}"
    if kind not in ROW_READERS:  # plain text, or refused as any source's file is
        plain = file_documents(path, SourceSection(token_share=1.0), where)
        yield from (document.text or "" for document in plain)
        return
    try:
        for row in ROW_READERS[kind](path):
            yield "\n".join(_strings(row))
    except (OSError, EOFError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise MixtureError(
            f"{where} cannot be read: {error or type(error).__name__}.",
            next_step="Check that the file is complete and of the format that its name says.",
        ) from error


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, Iterable):
        for one in value:
            yield from _strings(one)


def _suites() -> list[str]:
    return sorted(path.stem for path in folder("eval").glob("*.yaml"))


def _patterns(entry: str) -> list[str]:
    """What an entry stands for: the files of a suite, or the entry itself."""
    if entry in _suites():
        suite = folder("eval") / f"{entry}.yaml"
    elif entry.endswith(YAML):
        suite = Path(entry).expanduser()
    else:
        return [entry]
    try:
        named = OmegaConf.to_container(OmegaConf.load(suite))
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise MixtureError(
            f"mixture.decontaminate_against: the suite {suite} cannot be read: {error}."
        ) from error
    files = named.get("evaluation_files") if isinstance(named, dict) else None
    if not files or not isinstance(files, list):
        raise MixtureError(
            f"mixture.decontaminate_against: suite {entry!r} names no evaluation_files.",
            allowed=f"A list of paths or globs of {FORMATS}.",
            next_step=f"Add evaluation_files to {suite}, or give the files themselves.",
        )
    return [str(file) for file in files]
