"""Items of a task that occur in the instruction data are found, by source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from sparsify.evaluation.overlap import overlaps, write_texts
from sparsify.recipe.compose import load_mixture

QUESTION = "If a farmer has {} sheep and buys four more sheep on the market how many has he"
ITEMS = [QUESTION.format(number) + f"? Answer {number}" for number in ("two", "nine", "thirty")]


def mixture(root: Path, rows: list[dict[str, str]], **settings: object) -> Path:
    (root / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"files": [str(root / "chat.jsonl")], "group": "instruction", "token_share": 1.0}
    path = root / "own.yaml"
    named = {"name": "own", "sources": {"chat": source}, "validation_fraction": 1e-6} | settings
    path.write_text(yaml.safe_dump(named))
    return path


@pytest.fixture
def rows() -> list[dict[str, str]]:
    other = [{"prompt": f"What is {i} of a kind?", "response": f"It is {i} of it"} for i in range(40)]
    copied = {"prompt": "Please solve this: " + QUESTION.format("nine"), "response": "13"}
    return [*other, copied, {**copied, "response": "thirteen"}]


def test_items_in_the_instructions_are_counted(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    write_texts(tmp_path, "gsm8k", ITEMS)
    write_texts(tmp_path, "piqa", ["How does one keep a cage of a guinea pig warm in the cold winter?"])
    found = overlaps(tmp_path, ["gsm8k", "piqa"], load_mixture(str(mixture(tmp_path, rows))), ["chat"])
    (gsm8k,), (piqa,) = found["gsm8k"], found["piqa"]
    assert (gsm8k.documents_read, gsm8k.documents_overlapping) == (42, 2)
    # "buys four more sheep …" alone is 13 words: all three items share it with both documents.
    assert (gsm8k.items_found, gsm8k.items, gsm8k.problem) == (3, 3, None)
    assert (piqa.documents_overlapping, piqa.items_found) == (0, 0)


def test_documents_that_the_mixture_drops_are_not_counted(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    items = tmp_path / "gsm8k.jsonl"
    items.write_text("".join(json.dumps({"question": item}) + "\n" for item in ITEMS))
    write_texts(tmp_path, "gsm8k", ITEMS)
    path = mixture(tmp_path, rows, decontaminate_against=[str(items)])
    (found,) = overlaps(tmp_path, ["gsm8k"], load_mixture(str(path)), ["chat"])["gsm8k"]
    assert (found.documents_read, found.documents_overlapping) == (40, 0)


def test_missing_instruction_files_are_reported(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    write_texts(tmp_path, "gsm8k", ITEMS)
    own = load_mixture(str(mixture(tmp_path, rows)))
    (tmp_path / "chat.jsonl").unlink()
    (found,) = overlaps(tmp_path, ["gsm8k"], own, ["chat"])["gsm8k"]
    assert found.problem is not None
    assert "chat.jsonl" in found.problem
