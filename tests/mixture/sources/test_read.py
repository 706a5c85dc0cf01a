from __future__ import annotations

import csv
import gzip
import json
import lzma
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.mixture.sources.bad_rows import BadRows, Reason
from sparsify.mixture.sources.documents import Document
from sparsify.mixture.sources.read import read_documents, split_texts, token_documents
from sparsify.mixture.sources.source_files import source_files
from sparsify.mixture.sources.stdlib_text import module_paths, module_questions
from sparsify.mixture.tokens.encoder import Encoder
from sparsify.recipe.source import SourceSection
from tests.mixture.conftest import ids_of

TEXTS = ["first, with a comma", 'second "quoted"\nwith two lines', "third ünïcödé"]


def read(source: SourceSection, tokenizer: PreTrainedTokenizerFast | None = None, skip: int = 0) -> list[Document]:
    bad_rows = BadRows("web", 0.01)
    documents = list(read_documents("web", source, bad_rows, tokenizer=tokenizer, skip_documents=skip))
    assert not bad_rows.num_bad_rows
    return documents


def texts_of(source: SourceSection) -> list[str | None]:
    return [document.text for document in read(source)]


def files_of(*paths: Path) -> SourceSection:
    return SourceSection(token_share=1.0, files=[str(path) for path in paths])


def write_file(path: Path, kind: str) -> None:
    rows = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
    table = pa.Table.from_pylist(rows)
    if kind in ("jsonl", "ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif kind in ("txt", "md"):
        path.write_text("\n<|endoftext|>\n".join(TEXTS))
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        writer = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with writer(str(path), table.schema) as sink:
            sink.write_table(table)


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKED = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zst}
KINDS = ["jsonl", "ndjson", "json", "csv", "tsv", "txt", "md", "parquet", "arrow", "arrow stream"]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_documents(tmp_path: Path, kind: str, packed: str) -> None:
    path = tmp_path / f"a.b.{kind.split()[0]}"
    write_file(path, kind)
    whole = path.with_name(path.name + packed)
    whole.write_bytes(PACKED[packed](path.read_bytes()))
    documents = read(files_of(whole))
    assert [document.text for document in documents] == TEXTS
    assert {document.file for document in documents} == {str(whole)}


def test_archives_of_several_parts_are_read_completely(tmp_path: Path) -> None:
    for suffix in (".gz", ".xz", ".zst"):
        lines = [b'{"text": "%d"}\n' % n for n in range(2)]
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(b"".join(PACKED[suffix](line) for line in lines))
        assert texts_of(files_of(path)) == ["0", "1"]


def test_a_saved_dataset_is_read_as_it_was_saved(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict({"text": TEXTS})
    saved.select([2, 0]).save_to_disk(tmp_path / "web")
    assert texts_of(files_of(tmp_path / "web")) == [TEXTS[2], TEXTS[0]]
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "splits")
    assert f"name one of them: {tmp_path}/splits/train" in message_of(files_of(tmp_path / "splits"))
    assert texts_of(files_of(tmp_path / "splits" / "train")) == TEXTS


def test_a_glob_reads_each_file_once_in_order(write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "c.jsonl"):
        write_jsonl([{"text": name}], name)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl.gz")
    source = files_of(tmp_path / "?.jsonl*", tmp_path / "b.jsonl", tmp_path / "link.jsonl")
    assert texts_of(source) == ["a.jsonl.gz", "b.jsonl", "c.jsonl"]


def test_a_copy_of_a_file_is_skipped_and_noted(write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "two"), ("c", "one")):
        write_jsonl([{"text": text}], f"{name}.jsonl")
    bad_rows = BadRows("web", 0.0)
    documents = read_documents("web", files_of(tmp_path / "*.jsonl"), bad_rows)
    assert [document.text for document in documents] == ["one", "two"]
    (duplicate,) = bad_rows.duplicate_files
    assert (Path(duplicate.file).name, Path(duplicate.same_as).name) == ("c.jsonl", "a.jsonl")
    assert bad_rows.summary() == "web: 2 rows, 1 duplicate file(s) skipped"


def test_a_file_that_changes_while_it_is_read_is_named(write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    path = Path(write_jsonl([{"text": "x"}, {"text": "y"}]))
    documents = read_documents("web", files_of(path), BadRows("web", 0.01))
    next(documents)
    path.write_text(path.read_text() + '{"text": "z"}\n')
    with pytest.raises(MixtureError, match=r"rows.jsonl changed while it was read \(28 bytes"):
        list(documents)
    files = source_files("web", files_of(path))
    os.utime(path, ns=(1, 1))
    documents = read_documents("web", files_of(path), BadRows("web", 0.01), files=files)
    with pytest.raises(MixtureError, match="changed"):
        next(documents)


def test_skipped_documents_are_counted_but_not_yielded(write_jsonl: Callable[..., str]) -> None:
    rows: list[dict[str, object]] = [{"text": str(n) if n % 5 else None} for n in range(50)]
    source = files_of(Path(write_jsonl(rows)))

    def read_from(skip: int) -> tuple[list[Document], str]:
        bad_rows = BadRows("web", 0.5)
        return list(read_documents("web", source, bad_rows, skip_documents=skip)), bad_rows.to_json()

    whole, counts = read_from(0)
    assert read_from(17) == (whole[17:], counts)
    assert read_from(40) == ([], counts)


def test_text_longer_than_a_chunk_is_split_at_separators_only(tmp_path: Path) -> None:
    text = "one two three<|endoftext|>four<|endoftext|>\n<|endoftext|>five six"
    texts = ["one two three", "four", "five six"]
    for size in (1, 5, 13, 14, 1000):
        chunks = [text[start : start + size] for start in range(0, len(text), size)]
        assert list(split_texts(chunks, "<|endoftext|>")) == texts
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert texts_of(files_of(path)) == texts


def test_plain_text_is_split_at_the_separator_of_its_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    source = files_of(tmp_path / "a.txt")
    source.document_separator = "\n\n"
    assert texts_of(source) == ["one\ntwo", "three"]
    (tmp_path / "b.jsonl").write_text('{"text": "x"}')
    source.files = [str(tmp_path / "b.jsonl")]
    assert "none of its files is plain text" in message_of(source)


def test_documents_of_50_megabytes_are_read(tmp_path: Path) -> None:
    text = "large " * 9_000_000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "c.json").write_text(json.dumps([{"text": "small"}, {"text": text}]))
    found = texts_of(files_of(*(tmp_path / name for name in ("a.txt", "b.jsonl", "c.json"))))
    assert [len(text or "") for text in found] == [len(text), len(text), 5, len(text)]


def token_source(path: Path, dtype: str | None = None) -> SourceSection:
    return SourceSection(token_share=1.0, token_files=[str(path)], token_dtype=dtype)


@pytest.mark.parametrize("kind", ["npy", "bin"])
def test_token_files_give_the_same_documents_as_their_texts(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    encoder = Encoder("web", tokenizer, responses_only=False)
    wanted = ids_of(encoder.encode([Document("", text=text) for text in TEXTS]))
    ids = np.concatenate([ids[1:] for ids in wanted])  # as others write it: without a bos
    path = tmp_path / f"a.{kind}"
    np.save(path, ids) if kind == "npy" else ids.tofile(path)
    source = token_source(path, "uint16" if kind == "bin" else None)
    (file,) = source_files("web", source)
    whole, in_chunks = read(source, tokenizer), list(token_documents("web", file, source, tokenizer, chunk_tokens=7))
    for documents in (whole, in_chunks):
        found = ids_of(encoder.encode(documents))
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert len({document.origin for document in documents}) == 3


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.bin"
    np.array([5, 6, 40_000, 7], dtype=np.uint16).tofile(path)
    message = message_of(token_source(path, "uint16"), tokenizer)
    assert f"token 2 of {path} is 40,000" in message
    assert f"ids 0 to {len(tokenizer) - 1}" in message
    assert "has no stated number type" in message_of(token_source(path), tokenizer)
    np.array([5, 6, 8, 7], dtype=np.uint16).tofile(path)
    source = token_source(path, "uint16")
    (file,) = source_files("web", source)
    with pytest.raises(MixtureError, match="4 tokens in a row without the end-of-sequence token"):
        list(token_documents("web", file, source, tokenizer, max_document_tokens=3))


def message_of(source: SourceSection, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    with pytest.raises(MixtureError) as caught:
        list(read_documents("web", source, BadRows("web", 0.01), tokenizer=tokenizer))
    return str(caught.value)


def test_a_pattern_without_a_match_is_named(tmp_path: Path) -> None:
    pattern = tmp_path / "*.jsonl"
    message = message_of(files_of(pattern))
    assert f"Source 'web': no file matches {str(pattern)!r}" in message
    assert "Correct mixture.sources.web.files." in message
    assert f"name its files: {tmp_path}/*.jsonl" in message_of(files_of(tmp_path))


def test_an_unknown_format_lists_the_known_formats(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    message = message_of(files_of(tmp_path / "a.docx"))
    assert ".jsonl .ndjson .json .csv .tsv .parquet .arrow .txt .text .md" in message


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n \n")
    assert "Source 'web' holds no document." in message_of(files_of(tmp_path / "a.txt"))


def test_an_unreachable_hub_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = message_of(SourceSection(token_share=1.0, hub="nobody/no-such-dataset"))
    assert "the dataset 'nobody/no-such-dataset' cannot be read from the Hub" in message
    assert "hub_split" in message


def test_stdlib_code_and_prose_share_origins() -> None:
    def documents(kind: str) -> list[Document]:
        source = SourceSection(token_share=1.0, stdlib=kind)
        return list(islice(read_documents("stdlib", source, BadRows("stdlib", 0.0)), 40))

    code = documents("code")
    assert code == documents("code"), "the order is the same every time"
    assert all(document.text for document in code)
    pages = {document.origin: document.text or "" for document in documents("prose")}
    assert any(origin.startswith("topics.") for origin in pages)
    assert len({document.origin for document in code} & pages.keys()) > 10
    assert all(len(page) >= 200 for page in pages.values())


def test_stdlib_modules_skip_what_distributions_strip() -> None:
    modules = {name for name, _ in module_paths()}
    assert {"json", "json.decoder", "argparse", "asyncio.events"} <= modules
    stripped = {"test", "tests", "idle_test", "encodings", "site-packages", "numpy"}
    assert not [name for name in modules if stripped & set(name.split("."))]


def test_stdlib_questions_are_answered_from_their_module() -> None:
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


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-8"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_text_with_a_byte_order_mark_is_read(tmp_path: Path, name: str, encoding: str) -> None:
    texts = ["rivière 河 one", "stone 🪨 two"]
    written = {
        "txt": "<|endoftext|>".join(texts),
        "jsonl": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
        "json": json.dumps([{"text": text} for text in texts], ensure_ascii=False),
        "csv": "\n".join(["text", *texts]) + "\n",
    }
    data = ("\ufeff" + written[name.split(".")[1]]).encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    bad_rows = BadRows("web", 0.0)
    source = SourceSection(token_share=1.0, files=[str(path)])
    assert [document.text for document in read_documents("web", source, bad_rows)] == texts
    assert not bad_rows.bad_rows


def test_text_that_is_cut_within_a_character_of_utf_16_is_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "one"}\n'.encode("utf-16-le") + b"x")
    bad_rows = BadRows("web", 0.5)
    assert [one.text for one in read_documents("web", SourceSection(token_share=1.0, files=[str(path)]), bad_rows)] == [
        "one"
    ]
    assert bad_rows.bad_rows == {Reason.BROKEN_FILE: 1}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_nul_characters_are_a_reason_of_their_own(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.txt":
        path.write_bytes("river stone".encode("utf-16-le"))
    else:
        path.write_text(json.dumps({"text": "river".encode("utf-16-be").decode("latin-1")}) + "\n")
    order = "LE" if name == "a.txt" else "BE"
    message, bad_rows = refusal(path)
    assert f"UTF-16 without a byte order mark? Convert it to UTF-8: iconv -f UTF-16{order}" in message
    assert bad_rows == {Reason.NUL: 1}


def refusal(path: Path) -> tuple[str, dict[Reason, int]]:
    bad_rows = BadRows("web", 0.0)
    with pytest.raises(MixtureError) as caught:
        list(read_documents("web", SourceSection(token_share=1.0, files=[str(path)]), bad_rows))
    return str(caught.value), bad_rows.bad_rows


def test_a_few_nul_characters_are_not_taken_for_utf_16(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("river\0 stone\0 " + "cloud " * 60)
    message, bad_rows = refusal(path)
    assert "2 NUL character(s) among 374: remove them" in message
    assert "UTF-16" not in message
    assert bad_rows == {Reason.NUL: 1}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_text_in_latin_1_is_named_with_the_way_to_convert_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = "un café noir"
    path.write_bytes((text if name == "a.txt" else json.dumps({"text": text}, ensure_ascii=False)).encode("latin-1"))
    message, bad_rows = refusal(path)
    assert "at character 6: byte 0xE9 after 'un caf'. If it is Latin-1: iconv -f LATIN1 -t UTF-8" in message
    assert bad_rows == {Reason.INVALID_UTF8: 1}


@pytest.mark.parametrize("orders", [("utf-16-be", "utf-16-le"), ("utf-16-le", "utf-16-be")])
def test_a_text_of_another_byte_order_than_its_mark_is_a_broken_file(tmp_path: Path, orders: tuple[str, str]) -> None:
    """Its letters would become signs of other scripts, which train as text."""
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff".encode(orders[0]) + "river stone".encode(orders[1]))
    message, bad_rows = refusal(path)
    assert "byte order mark says another order than its text has" in message
    assert bad_rows == {Reason.BROKEN_FILE: 1}
