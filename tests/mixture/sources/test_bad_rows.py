from __future__ import annotations

import gzip
import json
import lzma
import random
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.mixture.sources.bad_rows import EXAMPLES_PER_REASON, BadRows, Reason
from sparsify.mixture.sources.documents import Document
from sparsify.mixture.sources.read import read_documents
from sparsify.mixture.sources.readers import read_rows
from sparsify.mixture.sources.source_files import file_state
from sparsify.mixture.tokens.encoder import Encoder
from sparsify.recipe.source import SourceSection

GOOD = [{"text": f"good {n}"} for n in range(300)]


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def read(source: SourceSection, max_bad_fraction: float = 0.5) -> tuple[list[Document], BadRows]:
    bad_rows = BadRows("web", max_bad_fraction)
    return list(read_documents("web", source, bad_rows)), bad_rows


def files_of(*paths: Path, **fields: str) -> SourceSection:
    return SourceSection(token_share=1.0, files=[str(path) for path in paths], **fields)


def lines_of(rows: list[object]) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


@settings(deadline=None)
@given(
    line=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ).map(lambda value: json.dumps(value).encode()),
    place=st.integers(0, 60),
    damage=st.binary(max_size=2),
)
def test_a_line_is_read_as_the_json_module_reads_it(
    tmp_path_factory: pytest.TempPathFactory, line: bytes, place: int, damage: bytes
) -> None:
    damaged = (line[:place] + damage + line[place:]).replace(b"\n", b"")
    path = tmp_path_factory.getbasetemp() / "line.jsonl"
    path.write_bytes(damaged + b"\n")
    text = damaged.decode("utf-8", "surrogateescape")
    bad: list[Reason] = []
    rows = [repr(row) for _, row in read_rows(file_state(path), None, lambda reason, *_, **__: bad.append(reason))]
    try:
        wanted = [] if not text or text.isspace() else [repr(json.loads(text))]
    except ValueError:
        assert (rows, bad) == ([], [Reason.NOT_JSON])
    else:
        assert (rows, bad) == (wanted, [])


def test_each_bad_line_is_dropped_and_listed_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows: list[object] = [
        *GOOD,
        {"url": "no text"},
        {"text": None},
        {"text": ["a", "list"]},
        {"text": 7},
        {"text": " \n"},
        b'{"text": "cut off\n',
        b'{"text": "caf\xe9"}\n',
        b'{"text": "half a pair \\ud83d"}\n',
        b"\n",
        [1, 2],
        b'{"text": "fine", "other": "caf\xe9"}\n',
        {"text": "last"},
    ]
    path.write_bytes(lines_of(rows))
    documents, bad_rows = read(files_of(path))
    assert [d.text for d in documents] == [row["text"] for row in GOOD] + ["fine", "last"]
    assert documents[-1].row == 312
    places = {reason: [bad.row for bad in bad_rows.examples[reason]] for reason in bad_rows.bad_rows}
    assert places == {
        Reason.NO_COLUMN: [301],
        Reason.NULL: [302],
        Reason.NOT_TEXT: [303, 304],
        Reason.EMPTY: [305],
        Reason.NOT_JSON: [306],
        Reason.INVALID_UTF8: [307, 308],
        Reason.NOT_AN_OBJECT: [310],
    }
    assert "its columns: url" in str(bad_rows.examples[Reason.NO_COLUMN][0])
    assert f"{path}:303 column 'text' holds list, not text" == str(bad_rows.examples[Reason.NOT_TEXT][0])
    assert bad_rows.summary().startswith("web: 311 rows, 9 dropped (2 invalid UTF-8, 2 not text, ")


def test_bad_csv_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,one\n2,"two" x\n3,three,four\n5\n\n6,six\n')
    documents, bad_rows = read(files_of(path), max_bad_fraction=1.0)
    assert [document.text for document in documents] == ["one", "six"]
    assert [bad.row for bad in bad_rows.examples[Reason.NOT_CSV]] == [3, 4, 5]


ARCHIVES: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_truncated_archive_yields_its_readable_part(suffix: str, kind: str, tmp_path: Path) -> None:
    numbers = random.Random(1)
    texts = [f"{n} {numbers.getrandbits(4000):x}" for n in range(1000)]
    plain = lines_of([{"text": t} for t in texts])
    if kind == "txt":
        plain = "<|endoftext|>".join(texts).encode()
    packed = ARCHIVES[suffix](plain)
    path = tmp_path / f"a.{kind}{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    documents, bad_rows = read(files_of(path))
    assert 350 < len(documents) < 520
    assert [document.text for document in documents] == texts[: len(documents)]
    (broken,) = bad_rows.examples[Reason.BROKEN_FILE]
    assert broken.row == len(documents)
    assert "is the last readable" in broken.detail


def test_a_truncated_json_list_yields_its_readable_part(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD)[:-20] + ', {"text": nonsense}]')
    documents, bad_rows = read(files_of(path))
    assert len(documents) == 299
    assert "not JSON" in bad_rows.examples[Reason.BROKEN_FILE][0].detail


def test_a_row_group_that_cannot_be_read_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{n} {n * 7919} text" for n in range(3000)]})
    pq.write_table(table, path, row_group_size=1000, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start, length = column.data_page_offset, column.total_compressed_size
    data[start : start + length] = b"\xff" * length
    path.write_bytes(bytes(data))
    documents, bad_rows = read(files_of(path))
    assert [d.row for d in documents] == [*range(1, 1001), *range(2001, 3001)]
    assert bad_rows.bad_rows == {Reason.UNREADABLE: 1000}


def test_a_parquet_text_that_is_not_utf8_drops_only_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.array([b"one", b"caf\xe9", b"three"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), path)
    documents, bad_rows = read(files_of(path))
    assert [document.text for document in documents] == ["one", "three"]
    assert bad_rows.examples[Reason.INVALID_UTF8][0].row == 2


@pytest.mark.parametrize("num_rows", [1, 500])
def test_a_column_missing_in_all_first_rows_is_an_error(num_rows: int, tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(lines_of([{"content": "x", "url": "y"}] * num_rows))
    (tmp_path / "a.jsonl").write_bytes(lines_of(list(GOOD)))
    with pytest.raises(MixtureError) as caught:
        read(files_of(tmp_path / "a.jsonl", path), max_bad_fraction=1.0)
    assert "b.jsonl of source 'web': row 1 has no column 'text'" in str(caught.value)
    assert "Its columns: content, url." in str(caught.value)
    assert "Set text_column" in str(caught.value)


def test_a_column_missing_in_some_first_rows_makes_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([{"url": "x"}] * 50 + GOOD))
    documents, bad_rows = read(files_of(path))
    assert len(documents) == 300
    assert bad_rows.bad_rows == {Reason.NO_COLUMN: 50}


def corrupt(path: Path) -> None:
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(b'{"text": "x"}\n')[:12])
    elif path.suffix == ".txt":
        path.write_bytes(b"\xff\xfe\x00broken")
    else:
        path.write_bytes(b'{"text": \n')


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv.gz", "a.parquet", "a.arrow", "a.txt"])
def test_a_source_without_readable_rows_shows_the_damage(tmp_path: Path, name: str) -> None:
    corrupt(tmp_path / name)
    with pytest.raises(MixtureError, match="Source 'web' holds no document") as caught:
        read(files_of(tmp_path / name))
    assert f"{tmp_path / name}:" in str(caught.value)
    assert "complete" in str(caught.value)


def test_too_many_bad_rows_stop_the_source_early_with_examples(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([*GOOD[:100], b"{\n"] * 200))
    bad_rows = BadRows("web", 0.005)
    documents = read_documents("web", files_of(path), bad_rows)
    with pytest.raises(MixtureError) as caught:
        list(documents)
    message = str(caught.value)
    assert bad_rows.good_rows + bad_rows.num_bad_rows == 1010, "not a row more than needed"
    assert "10 of its first 1,010 rows are bad" in message
    assert f"{path}:101 is not JSON" in message
    assert "mixture.max_bad_fraction=0.005" in message


@pytest.mark.parametrize(("bad", "fraction", "fatal"), [(1, 0.01, 0), (2, 0.01, 1), (1, 0.0, 1)])
def test_a_small_source_is_checked_at_its_end(bad: int, fraction: float, fatal: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([*GOOD[:20], *[b"{\n"] * bad]))
    if fatal:
        with pytest.raises(MixtureError, match="rows are bad"):
            read(files_of(path), fraction)
    else:
        assert len(read(files_of(path), fraction)[0]) == 20


def test_empty_rows_are_counted_but_do_not_count_towards_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([{"text": "x"}, *[{"text": ""}] * 2000]))
    documents, bad_rows = read(files_of(path), 0.0)
    assert len(documents) == 1
    assert bad_rows.summary() == "web: 2,001 rows, 2,000 dropped (2,000 empty)"


def test_chats_that_the_template_refuses_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}{% endfor %}"
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    system = {"role": "system", "content": "s"}
    documents = [
        Document("1", messages=turns, file="a.jsonl", row=1),
        Document("2", messages=(system, *turns), file="a.jsonl", row=2),
        Document("3", messages=turns, file="a.jsonl", row=3),
    ]
    bad_rows = BadRows("chat", 0.5, good_rows=3)
    encoder = Encoder("chat", tokenizer, responses_only=True, chat_template=template, bad_rows=bad_rows)
    assert (encoder.encode(documents).lengths > 0).tolist() == [True, False, True]
    assert bad_rows.good_rows == 2
    (bad,) = bad_rows.examples[Reason.CHAT_TEMPLATE]
    assert "a.jsonl:2" in str(bad)
    assert "no system" in str(bad)
    again = BadRows("chat", 0.5)
    again.carry_refusals(bad_rows)
    again.good_rows += 3
    assert again == bad_rows, "a resumed ingest ends with the same counts"


REASONS = st.sampled_from([Reason.NULL, Reason.NOT_JSON, Reason.EMPTY])
COUNTS = st.lists(st.tuples(REASONS, st.integers(1, 10), st.text(max_size=5)), max_size=60)


def counted(rows: list[tuple[Reason, int, str]], good: int) -> BadRows:
    bad_rows = BadRows("web", 1.0, good_rows=good)
    for reason, row, detail in rows:
        bad_rows.add("a.jsonl", reason, row, detail)
    return bad_rows


@given(COUNTS, st.integers(0, 5))
def test_counts_survive_json(rows: list[tuple[Reason, int, str]], good: int) -> None:
    whole = counted(rows, good)
    assert BadRows.from_json(whole.to_json()) == whole
    assert all(len(rows) <= EXAMPLES_PER_REASON for rows in whole.examples.values())


def test_counting_is_cheap() -> None:
    bad_rows = BadRows("web", 1.0)
    started = time.process_time()
    for row in range(100_000):
        bad_rows.add("a.jsonl", Reason.NULL, row, "column 'text' is null")
    assert (time.process_time() - started) / 100_000 < 10e-6
