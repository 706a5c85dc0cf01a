from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.mixture.cleaning.contamination import ContaminationReport, contamination_report
from sparsify.mixture.cleaning.duplicates import count_duplicates
from sparsify.mixture.sources.documents import Document
from sparsify.mixture.tokens.ingest import Cleaner
from sparsify.recipe.mixture import MixtureSection

ITEMS = [" ".join(f"item{item}word{word}" for word in range(15)) for item in range(4)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> MixtureSection:
    folder = tmp_path_factory.mktemp("eval")
    for name, items in (("one.json", ITEMS[:3]), ("two.json", ITEMS[3:])):
        (folder / name).write_text(json.dumps([{"question": item} for item in items]))
    return MixtureSection(name="m", decontaminate_against=[f"{folder}/*.json"])


def document(number: int) -> Document:
    """Numbers below 4 hold an evaluation item."""
    text = f"text {number} {ITEMS[number] if number < len(ITEMS) else 'of its own'}"
    return Document(f"origin {number}", text=text)


def cleaned(mixture: MixtureSection, folder: Path, numbers: list[int], start: int, batch: int) -> list[Document]:
    """What is kept of documents from `start` on."""
    kept: list[Document] = []
    with closing(Cleaner(mixture, folder, start)) as cleaner:
        for first in range(start, len(numbers), batch):
            kept += cleaner.clean([document(number) for number in numbers[first : first + batch]])
            cleaner.commit()
        cleaner.finish(cleaner.num_documents)
        distinct = set(numbers)
        assert cleaner.num_documents == len(numbers)
        assert count_duplicates(folder, len(numbers)) == len(numbers) - len(distinct)
        report = contamination_report(folder, len(numbers))
        assert report is not None
        assert report.documents_dropped == len(distinct & {0, 1, 2, 3})
    return kept


@settings(max_examples=40, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 12), max_size=40),
    batches=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    torn=st.booleans(),
    data=st.data(),
)
def test_a_killed_ingest_resumes_as_if_it_had_not_been_killed(
    mixture: MixtureSection,
    numbers: list[int],
    batches: tuple[int, int],
    torn: bool,
    data: st.DataObject,
) -> None:
    start = data.draw(st.integers(0, len(numbers)), "documents whose tokens were committed")
    with TemporaryDirectory() as name:
        folder = Path(name)
        kept = cleaned(mixture, folder, numbers, 0, batches[0])
        assert kept == [document(number) for number in dict.fromkeys(numbers) if number > 3]
        report = (folder / "contamination.json").read_text()
        if torn:
            for log in (folder / "digests.bin", folder / "contamination.jsonl"):
                with log.open("ab") as file:
                    file.write(b'{"doc')
        origins = [one.origin for one in cleaned(mixture, folder, numbers, start, batches[1])]
        known = [document(number).origin for number in dict.fromkeys(numbers[:start]) if number > 3]
        assert known + origins == [one.origin for one in kept]
        assert (folder / "contamination.json").read_text() == report


def test_the_report_says_what_was_dropped_and_why(mixture: MixtureSection, tmp_path: Path) -> None:
    both = Document("both", text=f"{ITEMS[1]} then {ITEMS[3]}")
    with closing(Cleaner(mixture, tmp_path, 0)) as cleaner:
        assert cleaner.clean([document(9), both, document(1)]) == [document(9)]
        assert cleaner.clean([document(1), document(8)]) == [document(8)]
        cleaner.finish(cleaner.num_documents)
    report = ContaminationReport.model_validate_json((tmp_path / "contamination.json").read_text())
    assert (report.documents_read, report.documents_dropped) == (5, 2)
    one, two = report.evaluation_files
    assert (one.items, one.items_found, one.documents_dropped) == (3, 1, 2)
    assert (two.items, two.items_found, two.documents_dropped) == (1, 1, 1)
    assert two.path.endswith("two.json")
    first, second = report.examples
    assert (first.document, first.origin, first.item) == (1, "both", 1)
    assert first.evaluation_file == one.path
    assert first.ngram == " ".join(ITEMS[1].split()[:13])
    assert (second.document, second.origin) == (2, "origin 1")
    earlier = contamination_report(tmp_path, 2)
    assert earlier is not None
    assert (earlier.documents_read, earlier.documents_dropped) == (2, 1)


def test_examples_are_few_and_counts_are_all(mixture: MixtureSection, tmp_path: Path) -> None:
    with closing(Cleaner(mixture, tmp_path, 0)) as cleaner:
        cleaner.clean([Document(str(n), text=f"{n} {ITEMS[0]}") for n in range(30)])
        cleaner.finish(cleaner.num_documents)
    report = contamination_report(tmp_path, 30)
    assert report is not None
    assert report.evaluation_files[0].documents_dropped == 30
    assert [example.document for example in report.examples] == [0, 1, 2, 3, 4]


def test_both_filters_can_be_off(tmp_path: Path) -> None:
    off = MixtureSection(name="m", remove_duplicates=False)
    documents = [document(1), document(1)]
    with closing(Cleaner(off, tmp_path, 0)) as cleaner:
        assert cleaner.clean(documents) == documents
        cleaner.finish(cleaner.num_documents)
    assert list(tmp_path.iterdir()) == []
    assert contamination_report(tmp_path, 2) is None


@pytest.mark.parametrize("log", ["digests.bin", "contamination.jsonl"])
def test_ingest_does_not_resume_from_a_lost_log(mixture: MixtureSection, tmp_path: Path, log: str) -> None:
    with closing(Cleaner(mixture, tmp_path, 0)) as cleaner:
        cleaner.clean([document(1), document(7)])
        cleaner.commit()
    (tmp_path / log).unlink()
    with pytest.raises(ValueError, match=log):
        Cleaner(mixture, tmp_path, 2)
