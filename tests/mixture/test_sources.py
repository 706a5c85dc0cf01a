from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsify.errors import MixtureError
from sparsify.mixture.documents import Document
from sparsify.mixture.sources import read_documents
from sparsify.mixture.stdlib_text import module_paths, module_questions
from sparsify.recipe import SourceSection

TEXTS = ["first, with a comma", 'second "quoted"\nwith two lines', "third ünïcödé"]


def texts_of(source: SourceSection) -> list[str | None]:
    return [document.text for document in read_documents("web", source)]


def write_file(path: Path, kind: str) -> None:
    rows = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
    table = pa.Table.from_pylist(rows)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "txt":
        path.write_text("\n<|endoftext|>\n".join(TEXTS))
    elif kind == "parquet":
        pq.write_table(table, path)
    else:
        writer = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with writer(str(path), table.schema) as sink:
            sink.write_table(table)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    "kind", ["jsonl", "json", "csv", "txt", "parquet", "arrow", "arrow stream"]
)
def test_every_format_gives_the_same_documents(tmp_path: Path, kind: str, zipped: bool) -> None:
    path = tmp_path / f"a.b.{kind.split()[0]}"
    write_file(path, kind)
    if zipped:
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    assert texts_of(SourceSection(token_share=1.0, files=[str(path)])) == TEXTS


def test_a_glob_reads_each_file_once_in_order(
    write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "c.jsonl"):
        write_jsonl([{"text": name}, {"text": ""}, {"text": None}], name)
    patterns = [str(tmp_path / "*.jsonl*"), str(tmp_path / "b.jsonl")]
    source = SourceSection(token_share=1.0, files=patterns)
    assert texts_of(source) == ["a.jsonl.gz", "b.jsonl", "c.jsonl"]


def test_instruction_rows_become_messages(write_jsonl: Callable[..., str]) -> None:
    rows = [{"q": "How?", "a": "So."}, {"q": "Unanswered", "a": ""}]
    source = SourceSection(
        token_share=1.0,
        group="instruction",
        files=[write_jsonl(rows)],
        prompt_column="q",
        response_column="a",
    )
    (document,) = read_documents("chat", source)
    assert document.messages == (
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "So."},
    )


def test_text_longer_than_a_chunk_is_split_at_separators_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsify.mixture.sources.CHUNK_CHARACTERS", 5)
    path = tmp_path / "a.txt"
    path.write_text("one two three<|endoftext|>four<|endoftext|>\n<|endoftext|>five six")
    source = SourceSection(token_share=1.0, files=[str(path)])
    assert texts_of(source) == ["one two three", "four", "five six"]


def message_of(source: SourceSection) -> str:
    with pytest.raises(MixtureError) as caught:
        list(read_documents("web", source))
    return str(caught.value)


def test_a_pattern_without_a_match_is_named(tmp_path: Path) -> None:
    pattern = str(tmp_path / "*.jsonl")
    message = message_of(SourceSection(token_share=1.0, files=[pattern]))
    assert f"Source 'web': no file matches {pattern!r}" in message
    assert "Correct mixture.sources.web.files." in message


def test_a_missing_column_says_which_columns_there_are(write_jsonl: Callable[..., str]) -> None:
    files = [write_jsonl([{"content": "x", "url": "y"}])]
    message = message_of(SourceSection(token_share=1.0, files=files))
    assert "row 1 has no column 'text'" in message
    assert "Its columns: content, url." in message


def test_a_column_of_another_type_is_refused(write_jsonl: Callable[..., str]) -> None:
    files = [write_jsonl([{"text": ["a", "b"]}])]
    assert "column 'text' of row 1 holds list, not text" in message_of(
        SourceSection(token_share=1.0, files=files)
    )


def corrupt(path: Path) -> None:
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    elif path.suffix == ".txt":
        path.write_bytes(b"\xff\xfe\x00broken")
    else:
        path.write_bytes(b'{"text": "x"}\n{"text": \n')


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "a.arrow", "a.txt"]
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    corrupt(path)
    message = message_of(SourceSection(token_share=1.0, files=[str(path)]))
    assert f"{path} of source 'web' cannot be read" in message
    if name == "a.jsonl":
        assert "line 2 is not JSON" in message


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    message = message_of(SourceSection(token_share=1.0, files=[str(tmp_path / "a.docx")]))
    assert ".jsonl, .json, .csv, .parquet, .arrow, .txt" in message


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n \n")
    message = message_of(SourceSection(token_share=1.0, files=[str(tmp_path / "a.txt")]))
    assert "Source 'web' holds no document." in message


def test_the_hub_out_of_reach_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = message_of(SourceSection(token_share=1.0, hub="nobody/no-such-dataset"))
    assert "the dataset 'nobody/no-such-dataset' cannot be read from the Hub" in message
    assert "hub_split" in message


@pytest.mark.parametrize(("kind", "group"), [("code", "instruction"), ("questions", "pretraining")])
def test_stdlib_text_in_the_wrong_group_is_refused(kind: str, group: str) -> None:
    message = message_of(SourceSection(token_share=1.0, stdlib=kind, group=group))
    assert f"stdlib: {kind} in group {group}" in message


def test_stdlib_code_and_prose_share_origins() -> None:
    def documents(kind: str) -> list[Document]:
        return list(islice(read_documents("stdlib", SourceSection(1.0, stdlib=kind)), 40))

    code = documents("code")
    assert code == documents("code"), "the order is the same every time"
    assert all(document.text for document in code)
    pages = {document.origin: document.text or "" for document in documents("prose")}
    assert any(origin.startswith("topics.") for origin in pages)
    assert len({document.origin for document in code} & pages.keys()) > 10
    assert all(len(page) >= 200 for page in pages.values())


def test_stdlib_modules_leave_out_what_distributions_strip() -> None:
    modules = {name for name, _ in module_paths()}
    assert {"json", "json.decoder", "argparse", "asyncio.events"} <= modules
    stripped = {"test", "tests", "idle_test", "encodings", "site-packages", "numpy"}
    assert not [name for name in modules if stripped & set(name.split("."))]


def test_stdlib_questions_are_answered_from_the_module() -> None:
    documents = list(module_questions("json", dict(module_paths())["json"]))
    answers = {
        document.messages[0]["content"]: document.messages[1]["content"]
        for document in documents
        if document.messages and "json.dumps" in document.messages[0]["content"]
    }
    assert len(answers) == 4
    text = " ".join(answers.values())
    assert "Serialize ``obj`` to a JSON formatted ``str``" in text
    assert "json.dumps(obj, *, skipkeys=False" in text
    assert {document.origin for document in documents} == {"json"}
