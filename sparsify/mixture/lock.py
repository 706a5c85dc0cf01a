"""The mixture's lock: what exactly a run trains on, written beside it and checked before it is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ValidationError

from sparsify.errors import RunError
from sparsify.files import write_text
from sparsify.mixture.plan import SourceSchedule
from sparsify.mixture.tokens import TokenizedSource

LOCK_FILE = "mixture.lock.json"


class SourceLock(BaseModel):
    """One source of a run. Token counts are those of the documents that the run's budget reaches."""

    fingerprint: str
    documents: int
    train_tokens: int
    held_out_tokens: int
    token_share: float
    planned_tokens: int
    epochs: float
    """How often the run sees each training document."""


class MixtureLock(BaseModel):
    """Everything that decides which token comes when."""

    tokenizer_fingerprint: str
    window_tokens: int
    seed: int
    sources: dict[str, SourceLock]


def make_lock(
    sources: Mapping[str, TokenizedSource],
    shares: Mapping[str, float],
    *,
    num_windows: int,
    window_tokens: int,
    seed: int,
) -> MixtureLock:
    """The lock of a run over `num_windows` windows."""
    counts = SourceSchedule(shares).counts(num_windows)
    return MixtureLock(
        tokenizer_fingerprint=next(iter(sources.values())).tokenizer,
        window_tokens=window_tokens,
        seed=seed,
        sources={
            name: SourceLock(
                fingerprint=sources[name].fingerprint,
                documents=sources[name].num_documents,
                train_tokens=sources[name].num_train_tokens,
                held_out_tokens=sources[name].num_validation_tokens,
                token_share=share,
                planned_tokens=counts[name] * window_tokens,
                epochs=counts[name] * window_tokens / sources[name].num_train_tokens,
            )
            for name, share in shares.items()
        },
    )


def write_lock(lock: MixtureLock, path: Path) -> None:
    """Writes a lock as JSON.

    Raises:
        StorageError: If the disk or the folder refuses.
    """
    write_text(path, lock.model_dump_json(indent=2) + "\n")


def read_lock(path: Path) -> MixtureLock:
    """Reads a lock that `write_lock` wrote.

    Raises:
        RunError: If there is none, or it is damaged.
    """
    try:
        return MixtureLock.model_validate_json(path.read_text())
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise RunError(
            f"The mixture lock {path} cannot be read: {str(error).splitlines()[0]}.",
            next_step="Restore it from a copy of the run folder, or start a new run.",
        ) from error


def check_lock(previous: MixtureLock, current: MixtureLock) -> None:
    """Refuses to resume a run on other data than it began with.

    Raises:
        RunError: Naming every source and field that differs, with its old and its new value.
    """
    differences = list(_differences(previous, current))
    if differences:
        raise RunError(
            "The mixture is not the one that this run began with:\n"
            + "\n".join(f"  {difference}" for difference in differences),
            allowed="A run is resumed on exactly the same tokens.",
            next_step="Undo the change (files, shares, tokenizer, window length, budget, seed), or start a new run "
            "under another name.",
        )


def _differences(previous: MixtureLock, current: MixtureLock) -> Iterator[str]:
    for field in ("tokenizer_fingerprint", "window_tokens", "seed"):
        yield from _changed(field, getattr(previous, field), getattr(current, field))
    for name in sorted(previous.sources.keys() | current.sources.keys()):
        old, new = previous.sources.get(name), current.sources.get(name)
        if old is None or new is None:
            yield f"source {name}: {'added' if old is None else 'removed'}"
            continue
        for field in SourceLock.model_fields:
            yield from _changed(f"source {name}: {field}", getattr(old, field), getattr(new, field))


def _changed(what: str, old: object, new: object) -> Iterator[str]:
    if old != new:
        yield f"{what} was {old}, is {new}"
