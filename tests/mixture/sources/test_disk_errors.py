"""What a disk fails to give is not a bad row: reading stops, and the next attempt finds every row."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.source import SourceSection
from tests.mixture.conftest import SMALL, ingest_of

HERE = Path(__file__).parent
NUM_ROWS = 2_000


@pytest.fixture(scope="module")
def failing_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None or sys.platform != "linux":
        pytest.skip("needs gcc and LD_PRELOAD")
    library = tmp_path_factory.mktemp("disk") / "failing_disk.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "failing_disk.c", "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same rows in every format, each file of more than a megabyte, so that it is not read at once."""
    folder = tmp_path_factory.mktemp("files")
    chance = random.Random(3)
    rows = [{"text": f"{n} {chance.getrandbits(4800):x}"} for n in range(NUM_ROWS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(lines, preset=0))
    with pa.OSFile(str(folder / "a.jsonl.zst"), "wb") as sink, pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(lines)
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "a.txt").write_text("<|endoftext|>".join(row["text"] for row in rows))
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text"])
        writer.writeheader()
        writer.writerows(rows)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "a.parquet", row_group_size=500)
    (folder / "b.parquet.gz").write_bytes(gzip.compress((folder / "a.parquet").read_bytes(), 1))
    with pa.ipc.new_file(str(folder / "a.arrow"), table.schema) as sink:
        sink.write_table(table, max_chunksize=100)
    with pa.ipc.new_stream(str(folder / "b.arrow"), table.schema) as sink:
        sink.write_table(table, max_chunksize=100)
    return sorted(folder.iterdir())


def read(files: list[Path], largest_file: int, after: str, **environment: str) -> list[tuple[Path, int, int, str]]:
    command = [sys.executable, str(HERE / "disk_program.py"), str(largest_file), after, *map(str, files)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert ran.returncode == 0, ran.stderr
    records = map(json.loads, ran.stdout.splitlines())
    return [(Path(path), documents, bad_rows, said) for path, documents, bad_rows, said in records]


def test_an_error_of_the_disk_stops_reading_and_makes_no_bad_row(failing_disk: Path, files: list[Path]) -> None:
    found = read(files, 1 << 30, "400000,0", LD_PRELOAD=str(failing_disk))
    assert [file for file, *_ in found] == files * 2
    for file, documents, bad_rows, said in found:
        assert (documents, bad_rows) == (0, 0), (file.name, documents, bad_rows, said)
        assert said.startswith(f"MixtureError: {file} cannot be read: Input/output error"), said
    whole = read(files, 1 << 30, "0")
    assert [(documents, said) for _, documents, _, said in whole] == [(NUM_ROWS, "")] * len(files)


def test_a_full_temporary_folder_stops_reading(files: list[Path], tmp_path: Path) -> None:
    packed = [file for file in files if file.name == "b.parquet.gz"]
    ((_, _, bad_rows, said),) = read(packed, 100_000, "0", TMPDIR=str(tmp_path))
    assert bad_rows == 0
    assert said.startswith(f"StorageError: {tmp_path} cannot be written: it would be larger"), said


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
def test_a_source_that_could_not_be_read_is_not_kept_as_whole(
    stories: SourceSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "z.jsonl").symlink_to("/proc/self/mem")  # its first page gives EIO
    stories.files = [*(stories.files or []), str(tmp_path / "z.jsonl")]
    mixture = MixtureSection(name="m", sources={"web": stories}, validation_fraction=0.2, max_bad_fraction=1.0)
    task = ingest_of(mixture, "web", tokenizer, tmp_path / "c", sizes=SMALL)
    with pytest.raises(MixtureError, match=r"z\.jsonl cannot be read: Input/output error"):
        task.run()
    assert not task.open().cache.complete
    assert not task.open().ready
