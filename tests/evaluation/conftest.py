"""Small evaluation data, laid out as a user's local copies are."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = [
    "sun",
    "rain",
    "stone",
    "river",
    "light",
    "metal",
    "plant",
    "animal",
    "heat",
    "water",
    "glass",
    "paper",
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def choices(count: int, options: int = 4, **extra: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Questions with answers that differ from item to item."""
    return [
        {
            "question": f"Which of these is number {item} of {WORDS[item % 12]}?",
            "choices": [f"{WORDS[(item + option) % 12]} {item}" for option in range(options)],
            "gold": item % options,
        }
        | {name: value(item) for name, value in extra.items()}
        for item in range(count)
    ]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local copies of every task of the shipped suites, a few items each."""
    root = tmp_path_factory.mktemp("evaluation_data")
    for name in ("arc_easy", "arc_challenge", "openbookqa"):
        write_rows(root / f"{name}_train.jsonl.gz", choices(40))
        write_rows(root / f"{name}_test.jsonl.gz", choices(12))
    write_rows(root / "piqa_test.jsonl.gz", choices(12, options=2))
    write_rows(
        root / "hellaswag_val_subset.jsonl.gz",
        [row | {"question": f"[header] How to {i} [title] Begin"} for i, row in enumerate(choices(20))],
    )
    sentences = [
        {
            "question": f"The {WORDS[i]} met the {WORDS[i + 1]} because _ was late {i}.",
            "gold": i % 2,
        }
        | {"choices": [WORDS[i], WORDS[i + 1]]}
        for i in range(11)
    ]
    write_rows(root / "winogrande_test.jsonl.gz", sentences)
    subject = {"subject": lambda item: ("college_law", "anatomy")[item % 2]}
    write_rows(root / "mmlu_dev.jsonl.gz", choices(10, **subject))
    write_rows(root / "mmlu_test.jsonl.gz", choices(10, **subject))
    sums = [{"question": f"What is {i} plus 2?", "answer": f"{i}+2 = {i + 2}.\n#### {i + 2}"} for i in range(12)]
    write_rows(root / "gsm8k_test.jsonl.gz", sums)
    write_rows(
        root / "sciq_test.jsonl.gz",
        [
            {"support": " A text.", "question": f"What is {i}?", "correct_answer": f"yes {i}"}
            | {f"distractor{n}": f"no {n}" for n in (1, 2, 3)}
            for i in range(6)
        ],
    )
    passages = [{"text": f"The {word} was there, and then came the {word}"} for word in WORDS]
    write_rows(root / "lambada_test.jsonl.gz", passages)
    articles = [f" \n = {word.title()} = \n \n The {word} was , as said , 1 @.@ 5 m . \n" for word in WORDS[:4]]
    with gzip.open(root / "wikitext2_test.txt.gz", "wt") as file:
        file.write("".join(articles))
    _write_truthfulqa(root / "truthfulqa.csv.gz")
    return root


def _write_truthfulqa(path: Path) -> None:
    text = io.StringIO()
    table = csv.writer(text)
    header = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"]
    table.writerow([*header, "Source"])
    for i in range(5):
        table.writerow(["A", "B", f"Is {i} so?", "Yes", f"Yes {i}; It is", "No; Never; Not so", "x"])
    with gzip.open(path, "wt", encoding="utf-8-sig") as file:
        file.write(text.getvalue())
