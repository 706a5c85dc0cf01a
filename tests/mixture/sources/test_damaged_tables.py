"""Arrow and Parquet files with flipped bytes: what can be read is, the rest has a message, and the process survives."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsify.errors import MixtureError, UserError
from sparsify.mixture.sources.bad_rows import BadRows, Reason
from sparsify.mixture.sources.documents import Document
from sparsify.mixture.sources.read import read_documents
from sparsify.recipe.source import SourceSection

TEXTS = [f"row {number:02}" for number in range(60)]
CHATS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in TEXTS]
FLIPS = 100


def write(kind: str, root: Path, table: pa.Table) -> tuple[Path, Path]:
    """The source's path, and the file in it that holds the rows."""
    if kind == "saved":
        datasets.Dataset(table).save_to_disk(str(root / "saved"))  # pyright: ignore[reportArgumentType]
        return root / "saved", next((root / "saved").glob("*.arrow"))
    path = root / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=20)
        return path, path
    new: Any = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    return path, path


def read(path: Path, **columns: str) -> tuple[list[Document], BadRows]:
    bad_rows = BadRows("web", 1.0)
    source = SourceSection(files=[str(path)], token_share=1.0, **columns)  # pyright: ignore[reportArgumentType]
    return list(read_documents("web", source, bad_rows)), bad_rows


@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrow stream", "saved"])
def test_flipped_bytes_end_in_documents_or_in_a_message(kind: str, tmp_path: Path) -> None:
    path, file = write(kind, tmp_path, pa.table({"messages": CHATS}))
    whole, chosen = file.read_bytes(), random.Random(1)
    for _ in range(FLIPS):
        changed = bytearray(whole)
        for _ in range(chosen.choice([1, 3])):
            changed[chosen.randrange(len(changed))] ^= 1 << chosen.randrange(8)
        file.unlink()
        file.write_bytes(changed)
        try:
            documents, _ = read(path, messages_column="messages", group="instruction")
        except UserError:
            continue
        assert 0 < len(documents) <= len(CHATS)


@pytest.mark.parametrize("kind", ["arrow", "arrow stream", "saved"])
@pytest.mark.parametrize("wrong", [-5, 1 << 30])
def test_a_row_that_leads_out_of_the_file_costs_only_itself(kind: str, wrong: int, tmp_path: Path) -> None:
    path, file = write(kind, tmp_path, pa.table({"text": TEXTS}))
    old, new = (struct.pack("<5i", 12, 18, middle, 30, 36) for middle in (24, wrong))
    content = file.read_bytes()
    assert old in content
    file.unlink()
    file.write_bytes(content.replace(old, new, 1))
    documents, bad_rows = read(path)
    assert [document.text for document in documents] == TEXTS[:3] + TEXTS[5:]
    assert bad_rows.bad_rows == {Reason.UNREADABLE: 2}
    assert [row.row for row in bad_rows.examples[Reason.UNREADABLE]] == [4, 5]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrow stream"])
def test_a_column_whose_name_is_no_text_is_a_message(kind: str, tmp_path: Path) -> None:
    path, file = write(kind, tmp_path, pa.table({"text": TEXTS}))
    file.write_bytes(file.read_bytes().replace(b"text", b"\xffext"))
    with pytest.raises(MixtureError, match="'utf-8' codec can't decode byte 0xff"):
        read(path)


def test_a_size_beyond_all_memory_is_a_message(tmp_path: Path) -> None:
    path, _ = write("arrow stream", tmp_path, pa.table({"text": TEXTS}))
    with pa.OSFile(str(path)) as stream:
        _, batch = (pa.ipc.MessageReader.open_stream(stream).read_next_message() for _ in range(2))
        size = struct.pack("<q", batch.body.size)
    assert size in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(size, size[:7] + b"\x20", 1))
    with pytest.raises(MixtureError, match=r"a.arrow cannot be read: it needs more memory(.|\n)*write it again"):
        read(path)
