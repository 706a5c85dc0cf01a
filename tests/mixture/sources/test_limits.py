"""Files that would fill the disk or the memory are refused or skipped, with the reason."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from sparsify.errors import MixtureError
from sparsify.mixture.sources import readers, rows, source_files
from sparsify.mixture.sources.bad_rows import BadRows
from sparsify.mixture.sources.read import read_documents
from sparsify.recipe.source import SourceSection


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of a size that a test makes in a moment."""
    monkeypatch.setattr(source_files, "MAX_SMALL_BYTES", 1 << 20)
    for module in (readers, rows):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1 << 16)


def pack(path: Path, content: bytes) -> None:
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(content))
        case ".xz":
            path.write_bytes(lzma.compress(content, preset=9))
        case ".zst":
            with pa.CompressedOutputStream(str(path), "zstd") as stream:
                stream.write(content)


@pytest.mark.parametrize("name", ["a.jsonl.xz", "a.txt.zst", "a.parquet.xz", "a.md.zst"])
def test_an_archive_that_unpacks_without_end_is_refused(name: str, tmp_path: Path) -> None:
    pack(tmp_path / name, b'{"text": "a"}\n' * (1 << 20))
    assert (tmp_path / name).stat().st_size < 10_000
    with pytest.raises(MixtureError, match=rf"{name} unpacks to more than "):
        list(read_documents("code", SourceSection(1.0, files=[str(tmp_path / name)]), BadRows("code", 1.0)))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst"])
def test_an_ordinary_archive_is_read_whole(name: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {number}"}) for number in range(50_000)]
    pack(tmp_path / name, "\n".join(lines).encode())  # more than MAX_SMALL_BYTES
    found = read_documents("code", SourceSection(1.0, files=[str(tmp_path / name)]), BadRows("code", 1.0))
    assert sum(1 for _ in found) == 50_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_row_without_end_is_skipped_and_counted(name: str, tmp_path: Path) -> None:
    texts, path = ["before", "x" * (1 << 17), "after"], tmp_path / name
    table = [{"text": text} for text in texts]
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, table)))
        case ".json":
            path.write_text(json.dumps(table))
        case ".csv":
            path.write_text("\n".join(["text", *texts]))
        case ".parquet":
            pyarrow.parquet.write_table(pa.Table.from_pylist(table), path)
    bad_rows = BadRows("code", 1.0)
    found = [one.text for one in read_documents("code", SourceSection(1.0, files=[str(path)]), bad_rows)]
    assert found == ["before", "after"]
    assert any(words in line for line in bad_rows.lines() for words in ("more than 65,536", "field limit (65536)"))
    assert bad_rows.num_bad_rows == 1
