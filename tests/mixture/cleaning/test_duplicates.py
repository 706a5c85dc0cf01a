from __future__ import annotations

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.mixture.cleaning.duplicates import DigestSizes, SeenDocuments, count_duplicates
from sparsify.mixture.sources.documents import Document, conversation

SMALL = DigestSizes(recent=8, block=16, page=4, first_filter_bits=64, last_filter_bits=512)
"""Sorted files, merges and larger filters after a few documents instead of a million."""


def texts(numbers: list[int]) -> list[Document]:
    return [Document("", text=f"text {number}") for number in numbers]


def first_times(numbers: list[int]) -> list[bool]:
    return [number not in numbers[:place] for place, number in enumerate(numbers)]


def added(seen: SeenDocuments, numbers: list[int], batch: int) -> list[bool]:
    """What `seen` says of documents that come in batches."""
    answers: list[bool] = []
    for start in range(0, len(numbers), batch):
        answers += seen.add(texts(numbers[start : start + batch])).tolist()
        seen.commit()
    return answers


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 150), max_size=300),
    batches=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    data=st.data(),
)
def test_every_content_is_new_once_even_after_a_kill_at_any_document(
    numbers: list[int], batches: tuple[int, int], data: st.DataObject
) -> None:
    kept = data.draw(st.integers(0, len(numbers)), "documents whose tokens were committed")
    expected = first_times(numbers)
    with TemporaryDirectory() as folder:
        with closing(SeenDocuments(Path(folder), sizes=SMALL)) as seen:
            assert added(seen, numbers, batches[0]) == expected
        with closing(SeenDocuments(Path(folder), kept, SMALL)) as seen:
            assert added(seen, numbers[kept:], batches[1]) == expected[kept:]
            assert count_duplicates(Path(folder), len(numbers)) == len(numbers) - sum(expected)
            assert seen.num_documents == len(numbers)


def test_a_full_filter_makes_no_document_a_duplicate(tmp_path: Path) -> None:
    numbers = np.random.RandomState(0).permutation(3000).tolist()
    with closing(SeenDocuments(tmp_path, sizes=SMALL)) as seen:
        assert all(added(seen, numbers, 100))
        assert not any(added(seen, numbers[::-1], 100))


def test_a_conversation_is_compared_with_all_its_turns(tmp_path: Path) -> None:
    documents = [
        conversation("a", "one", "two"),
        conversation("b", "one", "three"),
        conversation("c", "onetwo", ""),
        conversation("d", "one", "two"),
        Document("e", text="onetwo"),
        Document("f", messages=({"role": "user", "content": "one"},)),
        Document("g", messages=({"role": "system", "content": "one"},)),
        Document("h", text="\ud800 lone surrogate"),
    ]
    with closing(SeenDocuments(tmp_path, sizes=SMALL)) as seen:
        new = seen.add(documents)
    assert new.tolist() == [document.origin != "d" for document in documents]


def test_only_an_equal_text_is_a_duplicate(tmp_path: Path) -> None:
    near = [Document("", text=text) for text in ("Same", "same", "Same ", "Same", "")]
    with closing(SeenDocuments(tmp_path, sizes=SMALL)) as seen:
        assert seen.add(near).tolist() == [True, True, True, False, True]


def test_a_log_that_lost_documents_is_not_resumed(tmp_path: Path) -> None:
    with closing(SeenDocuments(tmp_path, sizes=SMALL)) as seen:
        seen.add(texts([1, 2, 3]))
    with pytest.raises(ValueError, match="knows fewer than 4 documents"):
        SeenDocuments(tmp_path, 4, SMALL)


def test_only_the_log_remains(tmp_path: Path) -> None:
    with closing(SeenDocuments(tmp_path, sizes=SMALL)) as seen:
        added(seen, list(range(100)), 10)
        assert [path.name for path in tmp_path.iterdir()] == ["digests.bin"]
    assert (tmp_path / "digests.bin").stat().st_size == 800
