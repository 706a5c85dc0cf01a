from __future__ import annotations

from pathlib import Path

import pytest

from sparsify.errors import RunError
from sparsify.mixture.lock import (
    MixtureLock,
    check_lock,
    make_lock,
    read_lock,
    with_delivered,
    write_lock,
)
from sparsify.mixture.tokens.tokenized_source import TokenizedSource
from tests.mixture.conftest import documents_of


@pytest.fixture
def lock(tokenized: dict[str, TokenizedSource]) -> MixtureLock:
    shares = {"stories": 0.7, "chats": 0.3}
    sequences = {"stories": 70, "chats": 30}
    return make_lock(tokenized, shares, planned_sequences=sequences, sequence_length=16, seed=1)


def test_a_lock_counts_what_the_run_will_see(lock: MixtureLock, tokenized: dict[str, TokenizedSource]) -> None:
    stories = lock.sources["stories"]
    assert stories.planned_tokens == 70 * 16
    assert stories.epochs == 70 * 16 / tokenized["stories"].num_train_tokens
    every = sum(len(ids) for ids, _, _ in documents_of(tokenized["stories"]))
    assert (stories.train_tokens or 0) + (stories.held_out_tokens or 0) == every


def test_a_count_that_is_not_known_yet_is_not_a_difference(lock: MixtureLock) -> None:
    begun = lock.model_copy(deep=True)
    for source in begun.sources.values():
        source.documents = source.train_tokens = source.held_out_tokens = source.epochs = None
    check_lock(begun, lock)
    check_lock(lock, with_delivered(lock, {"stories": 69, "chats": 31}))


def test_delivered_shares_are_of_what_was_drawn(lock: MixtureLock) -> None:
    sources = with_delivered(lock, {"stories": 3, "chats": 1}).sources
    assert (sources["stories"].delivered_tokens, sources["stories"].delivered_share) == (48, 0.75)
    assert (sources["chats"].delivered_tokens, sources["chats"].delivered_share) == (16, 0.25)


def test_a_lock_survives_its_file_unchanged(lock: MixtureLock, tmp_path: Path) -> None:
    write_lock(lock, tmp_path / "mixture.lock.json")
    check_lock(read_lock(tmp_path / "mixture.lock.json"), lock)
    assert [path.name for path in tmp_path.iterdir() if "lock" in path.name] == ["mixture.lock.json"]


def test_every_difference_is_named_with_its_old_and_new_value(lock: MixtureLock) -> None:
    other = lock.model_copy(deep=True)
    other.seed = 2
    other.sources["stories"].token_share = 0.65
    other.sources["stories"].fingerprint = "abc"
    other.sources["more"] = other.sources.pop("chats")
    with pytest.raises(RunError) as caught:
        check_lock(lock, other)
    message = str(caught.value)
    assert "seed was 1, is 2" in message
    assert "source stories: token_share was 0.7, is 0.65" in message
    assert f"source stories: fingerprint was {lock.sources['stories'].fingerprint}, is abc" in message
    assert "source more: added" in message
    assert "source chats: removed" in message
    assert "sequence_length" not in message.partition("\n  ")[2].partition("A run is")[0]


def test_a_damaged_lock_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mixture.lock.json"
    path.write_text("{")
    with pytest.raises(RunError, match=r"mixture\.lock\.json is not a mixture lock: Expecting"):
        read_lock(path)
