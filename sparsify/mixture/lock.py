"""The mixture lock: records exactly which data a run trains on; checked before the run is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, Field

from sparsify.errors import RunError
from sparsify.files import write_text
from sparsify.metadata import read_record
from sparsify.mixture.tokens.tokenized_source import TokenizedSource


class SourceLock(BaseModel):
    """One source of a run. Counts cover the documents that the run's budget reaches.

    Counts are None while the source is still being tokenised.
    """

    fingerprint: str
    token_share: float
    """Planned share of the run's tokens."""
    planned_tokens: int
    documents: int | None = None
    train_tokens: int | None = None
    held_out_tokens: int | None = None
    epochs: float | None = None
    """Number of times the run sees each training document."""
    delivered_tokens: int | None = None
    """Tokens of the sequences that training has drawn; None until training has ended."""
    delivered_share: float | None = None


BUDGET_FIELDS = ("planned_tokens", "documents", "train_tokens", "held_out_tokens", "epochs")
"""Fields of a source that follow from its fingerprint and the budget."""


class Extension(BaseModel):
    """A longer budget that a run was given after it began."""

    step: int
    """Steps that it had trained by then."""
    from_budget_tokens: int
    to_budget_tokens: int


class MixtureLock(BaseModel):
    """Everything that determines which token comes at which position of the run."""

    tokenizer_fingerprint: str
    sequence_length: int
    seed: int
    sources: dict[str, SourceLock]
    chat_template: str | None = None
    """The Jinja text that rendered the instruction sources; None without any."""
    extensions: list[Extension] = Field(default_factory=list)
    accepted_changes: list[str] = Field(default_factory=list)
    """Differences that the user accepted when resuming on other data (launch.accept_changed_data)."""


def make_lock(
    sources: Mapping[str, TokenizedSource],
    shares: Mapping[str, float],
    *,
    planned_sequences: Mapping[str, int],
    sequence_length: int,
    seed: int,
) -> MixtureLock:
    return MixtureLock(
        tokenizer_fingerprint=next(iter(sources.values())).info.tokenizer,
        sequence_length=sequence_length,
        seed=seed,
        chat_template=next((text for one in sources.values() if (text := one.info.chat_template)), None),
        sources={
            name: _source_lock(source, shares.get(name, 0.0), planned_sequences[name] * sequence_length)
            for name, source in sources.items()
        },
    )


def _source_lock(source: TokenizedSource, share: float, planned_tokens: int) -> SourceLock:
    lock = SourceLock(fingerprint=source.fingerprint, token_share=share, planned_tokens=planned_tokens)
    if not source.ready:
        return lock
    counts = {
        "documents": source.num_documents,
        "train_tokens": source.num_train_tokens,
        "held_out_tokens": source.num_held_out_tokens,
        "epochs": planned_tokens / source.num_train_tokens,
    }
    return lock.model_copy(update=counts)


def with_delivered(lock: MixtureLock, sequences: Mapping[str, int]) -> MixtureLock:
    total = sum(sequences.values()) * lock.sequence_length
    sources = {
        name: source.model_copy(
            update={
                "delivered_tokens": sequences.get(name, 0) * lock.sequence_length,
                "delivered_share": sequences.get(name, 0) * lock.sequence_length / max(total, 1),
            }
        )
        for name, source in lock.sources.items()
    }
    return lock.model_copy(update={"sources": sources})


def write_lock(lock: MixtureLock, path: Path) -> None:
    write_text(path, lock.model_dump_json(indent=2) + "\n")


def read_lock(path: Path) -> MixtureLock:
    """Raises RunError if the lock is missing or damaged."""
    restore = "Restore it from a copy of the run folder, or start a new run."
    return read_record(path, MixtureLock, "a mixture lock", RunError, restore)


def check_lock(previous: MixtureLock, current: MixtureLock) -> None:
    """Raises unless a resumed run trains on the data that it started with.

    Raises:
        RunError: Lists every source and field that differs, with its old and its new value.
    """
    changes = differences(previous, current)
    if changes:
        raise RunError(
            "The mixture differs from the one that this run started with:\n"
            + "\n".join(f"  {change}" for change in changes),
            allowed="A run is resumed on exactly the same tokens.",
            next_step="Undo the change (files, shares, tokenizer, sequence length, budget, seed), start a new run under "
            "another name, or continue anyway with launch.accept_changed_data=true, which the lock records.",
        )


def differences(previous: MixtureLock, current: MixtureLock) -> list[str]:
    """Fields that determine the tokens and differ between the locks. Counts are compared if both locks have them."""
    return list(_differences(previous, current))


def _differences(previous: MixtureLock, current: MixtureLock) -> Iterator[str]:
    for field in ("tokenizer_fingerprint", "sequence_length", "seed"):
        yield from _changed(field, getattr(previous, field), getattr(current, field))
    for name in sorted(previous.sources.keys() | current.sources.keys()):
        old, new = previous.sources.get(name), current.sources.get(name)
        if old is None or new is None:
            yield f"source {name}: {'added' if old is None else 'removed'}"
            continue
        for field in SourceLock.model_fields:
            if not field.startswith("delivered") and not (previous.extensions and field in BUDGET_FIELDS):
                values = getattr(old, field), getattr(new, field)
                yield from _changed(f"source {name}: {field}", *values)


def _changed(what: str, old: object, new: object) -> Iterator[str]:
    if old != new and old is not None and new is not None:
        yield f"{what} was {old}, is {new}"
