from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.errors import MixtureError
from sparsify.mixture.cleaning import decontaminate
from sparsify.mixture.cleaning.decontaminate import Decontaminator, Overlap
from sparsify.mixture.cleaning.eval_items import decontamination_fingerprint, evaluation_paths
from sparsify.mixture.sources.documents import Document, conversation
from sparsify.recipe.mixture import MixtureSection

ITEM = "A caravan of eleven camels left the old city before dawn, carrying salt and copper to the coast."
"""18 words."""
WORDS = ITEM.lower().replace(",", "").replace(".", "").split()
SHORT_ITEM = "Which planet has the most moons known today?"
"""8 words."""


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def evaluation_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("eval")
    first = write_rows(folder / "first.jsonl", [{"q": "Too short?"}, {"q": ITEM, "gold": 3}])
    second = write_rows(folder / "second.jsonl", [{"q": SHORT_ITEM, "choices": []}])
    return [first, second]


@pytest.fixture(scope="module")
def decontaminator(evaluation_files: list[Path]) -> Decontaminator:
    return Decontaminator(evaluation_files)


def overlap(decontaminator: Decontaminator, text: str) -> Overlap | None:
    (found,) = decontaminator.overlaps([Document("", text=text)])
    return found


@pytest.mark.parametrize(
    "planted",
    [
        ITEM,
        ITEM.upper(),
        "\n".join(ITEM.split()),
        " , ".join(WORDS),
        "—".join(WORDS),
        "".join(f"_{word}_ " for word in WORDS),
        "…".join(WORDS[:13]),
        " ".join(WORDS[5:18]),
        ITEM.replace("c", "ｃ"),
    ],
)
def test_a_planted_item_is_found_however_it_is_set(decontaminator: Decontaminator, planted: str) -> None:
    found = overlap(decontaminator, f"Something before. {planted} Something after.")
    assert found is not None
    assert (found.file, found.item) == (0, 1)
    assert len(found.ngram.split()) == 13
    assert found.ngram in " ".join(WORDS)
    assert found.ngram in found.excerpt


@pytest.mark.parametrize(
    "near",
    [
        " ".join(WORDS[:12]),
        " ".join(WORDS[6:]),
        " ".join([*WORDS[:12], "other", *WORDS[13:]]),
        " ".join(WORDS[:12]) + f" {WORDS[12]}s",
        " ".join(reversed(WORDS)),
        "Too short?",
        " ".join(SHORT_ITEM.split()[:7]),
    ],
)
def test_twelve_shared_words_in_a_row_are_not_an_overlap(decontaminator: Decontaminator, near: str) -> None:
    assert overlap(decontaminator, f"Something before. {near} something after.") is None


def test_an_item_of_eight_words_counts_as_a_whole(decontaminator: Decontaminator) -> None:
    found = overlap(decontaminator, f"He asked: '{SHORT_ITEM.upper()}'")
    assert found is not None
    assert (found.file, found.item) == (1, 0)
    assert found.ngram == "which planet has the most moons known today"


def test_short_items_are_counted(decontaminator: Decontaminator) -> None:
    assert [(file.num_items, file.num_short_items) for file in decontaminator.files] == [
        (2, 1),
        (1, 0),
    ]


def test_an_item_across_two_documents_is_in_neither(decontaminator: Decontaminator) -> None:
    halves = [Document("", text=" ".join(half)) for half in (WORDS[:9], WORDS[9:])]
    assert decontaminator.overlaps(halves) == [None, None]
    assert decontaminator.overlaps([]) == []
    empty = [Document("", text=""), Document("", text=ITEM), Document("", text="...")]
    assert [found is not None for found in decontaminator.overlaps(empty)] == [False, True, False]


def test_an_item_across_the_turns_of_a_conversation_is_found(
    decontaminator: Decontaminator,
) -> None:
    (found,) = decontaminator.overlaps([conversation("", " ".join(WORDS[:9]), " ".join(WORDS[9:]))])
    assert found is not None


def test_every_item_in_a_document_is_named(decontaminator: Decontaminator) -> None:
    found = overlap(decontaminator, f"{SHORT_ITEM} {ITEM}")
    assert found is not None
    assert found.items == ((0, 1), (1, 0))
    assert (found.file, found.item) == (1, 0), "the n-gram is the document's first"


@given(seed=st.integers(0, 2**32 - 1), piece=st.integers(10, 200))
def test_overlaps_equal_those_of_a_plain_word_search(evaluation_files: list[Path], seed: int, piece: int) -> None:
    draw = random.Random(seed)
    texts = []
    for _ in range(5):
        words: list[str] = []
        for _ in range(draw.randrange(6)):
            start = draw.randrange(len(WORDS))
            words += WORDS[start : start + draw.randrange(10, 15)]
            words += draw.choices(WORDS, k=draw.randrange(4))
        texts.append(" ".join(words))
    grams = {" ".join(WORDS[start : start + 13]) for start in range(len(WORDS) - 12)}
    expected = [any(f" {gram} " in f" {text} " for gram in grams) for text in texts]
    decontaminator = Decontaminator(evaluation_files, piece)
    found = decontaminator.overlaps([Document("", text=text) for text in texts])
    assert [one is not None for one in found] == expected


def test_equal_hashes_are_distinguished_by_their_words(
    decontaminator: Decontaminator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decontaminate, "_word_hashes", lambda words: decontaminate.np.zeros(len(words), "u8"))
    colliding = Decontaminator([write_rows(tmp_path / "a.jsonl", [{"q": ITEM}])])
    assert overlap(colliding, "word " * 20) is None
    assert overlap(colliding, "word " * 20 + ITEM) is not None


def test_an_ngram_of_more_than_ten_items_is_not_compared(tmp_path: Path) -> None:
    asked = "This question refers to the following information read it and choose the best answer"
    rows: list[dict[str, object]] = [{"q": f"{asked} {n} {ITEM if n == 3 else ''}"} for n in range(11)]
    many = Decontaminator([write_rows(tmp_path / "many.jsonl", rows)])
    assert many.num_common_ngrams == 2
    assert overlap(many, asked) is None
    assert overlap(many, ITEM) is not None
    few = Decontaminator([write_rows(tmp_path / "few.jsonl", rows[:10])])
    found = overlap(few, asked)
    assert found is not None
    assert len(found.items) == 10


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.txt.gz"],
)
def test_every_format_is_read(tmp_path: Path, name: str) -> None:
    head, tail = " ".join(WORDS[:6]), WORDS[6:]
    row = {"id": 7, "question": head, "choices": tail[:4], "more": {"a": tail[4:8], "b": tail[8:]}}
    path = tmp_path / name
    kind = name.removesuffix(".gz")
    if kind == "a.jsonl":
        text = json.dumps({"question": "another"}) + "\n" + json.dumps(row) + "\n"
    elif kind == "a.json":
        text = json.dumps([{"question": "another"}, row])
    elif kind == "a.csv":
        with (tmp_path / "plain.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["q", "a"], ["another", ""], [head, " ".join(tail)]])
        text = (tmp_path / "plain.csv").read_text()
    else:
        text = f"another<|endoftext|>{ITEM}"
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    found = overlap(Decontaminator([path]), ITEM)
    assert found is not None
    assert found.items == ((0, 1),)


def mixture(*against: str) -> MixtureSection:
    return MixtureSection(name="m", decontaminate_against=list(against))


def test_a_suite_names_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write_rows(tmp_path / name, [{"q": ITEM}])
    suites = tmp_path / "eval"
    suites.mkdir()
    listed = f"name: exams\nevaluation_files: ['{tmp_path}/*.jsonl']\n"
    (suites / "exams.yaml").write_text(listed)
    (tmp_path / "own.yaml").write_text(listed)
    monkeypatch.setattr("sparsify.mixture.cleaning.eval_items.folder", lambda _: suites)
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert evaluation_paths(mixture("exams")) == files
    assert evaluation_paths(mixture(str(tmp_path / "own.yaml"))) == files
    assert evaluation_paths(mixture(str(files[1]), "exams")) == files[::-1], "each file once"
    assert evaluation_paths(mixture()) == []
    assert Decontaminator.of(mixture()) is None


def test_a_changed_evaluation_file_changes_the_fingerprint(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"q": ITEM}])
    before = decontamination_fingerprint(mixture(str(path)))
    assert json.loads(json.dumps(before)) == before
    assert decontamination_fingerprint(mixture(str(path))) == before
    assert decontamination_fingerprint(mixture()) == []
    write_rows(path, [{"q": SHORT_ITEM}])
    assert decontamination_fingerprint(mixture(str(path))) != before
    decontaminator = Decontaminator.of(mixture(str(path)))
    assert decontaminator is not None
    assert overlap(decontaminator, SHORT_ITEM) is not None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nowhere/*.jsonl", "no file matches 'nowhere/*.jsonl'"),
        ("standart", "Did you mean 'standard'?"),
        ("quickstart", "suite 'quickstart' names no evaluation_files"),
        ("nowhere.yaml", "nowhere.yaml cannot be read"),
    ],
)
def test_an_entry_that_matches_nothing_is_named(entry: str, message: str) -> None:
    with pytest.raises(MixtureError) as caught:
        evaluation_paths(mixture(entry))
    assert message in str(caught.value)
    assert "mixture.decontaminate_against" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"q": "x"}\n{', "a.jsonl:2 is not JSON"),
        ("a.jsonl.gz", b"no gzip", "is the last readable"),
        ("a.txt", b"\xff\xfa", "is not UTF-8 text"),
        ("a.docx", b"x", ".jsonl .ndjson .json .csv"),
        ("README", b"x", ".jsonl .ndjson .json .csv"),
    ],
)
def test_an_evaluation_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MixtureError) as caught:
        Decontaminator([tmp_path / name])
    assert message in str(caught.value)
    assert f"The evaluation file {tmp_path / name}" in str(caught.value)
