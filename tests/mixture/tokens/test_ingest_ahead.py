"""Ingest reads and tokenises ahead of what it writes; this must not affect the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.mixture.sources.bad_rows import Reason
from sparsify.mixture.sources.documents import Document
from sparsify.mixture.tokens.encoder import Encoded, Encoder
from sparsify.mixture.tokens.ingest import IngestSession, bad_rows_of
from sparsify.mixture.tokens.tokenized_source import TokenizedSource
from sparsify.recipe.mixture import MixtureSection
from tests.mixture.conftest import SMALL, documents_of, ingest_of, story

BOS, EOS = 0, 1  # the fixture's tokenizer numbers its special tokens first


@pytest.mark.parametrize("part_documents", [1, 3])
def test_sources_read_alternately_in_parts_of_any_size_give_the_same_tokens(
    mixture: MixtureSection,
    tokenizer: PreTrainedTokenizerFast,
    tokenized: dict[str, TokenizedSource],
    tmp_path: Path,
    part_documents: int,
) -> None:
    """Texts and chats need different tokenizer settings, and each has pending parts when the other starts."""
    texts = [{"text": f"{story(n, 9)} </s> <s>"} for n in range(60)]
    path = Path((mixture.sources["stories"].files or [])[0])
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    sizes = replace(SMALL, part_documents=part_documents)
    tasks = [ingest_of(mixture, name, tokenizer, tmp_path / "c", sizes=sizes) for name in mixture.sources]
    with IngestSession(tasks[0]) as stories, IngestSession(tasks[1]) as chats:
        while any([stories.step(), chats.step()]):
            pass
    assert documents_of(tasks[1].open()) == documents_of(tokenized["chats"])
    for ids, _, _ in documents_of(tasks[0].open()):
        assert {BOS, EOS}.isdisjoint(ids[1:-1])


def test_refused_chats_are_counted_once_however_often_an_ingest_pauses(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    mixture.max_bad_fraction = 0.5
    mixture.chat_template = (
        "{% for m in messages %}{% if '1 about' in m.content %}{{ raise_exception('a one') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    straight = ingest_of(mixture, "chats", tokenizer, tmp_path / "straight", sizes=SMALL).run()
    for need in (100, 300, 500):
        ingest_of(mixture, "chats", tokenizer, tmp_path / "paused", need, 1, SMALL).run()
    paused = ingest_of(mixture, "chats", tokenizer, tmp_path / "paused", sizes=SMALL).run()
    assert documents_of(paused) == documents_of(straight)
    counted = bad_rows_of(straight)
    assert counted == bad_rows_of(paused)
    assert counted is not None
    assert counted.bad_rows == {Reason.CHAT_TEMPLATE: 4}


def test_ingest_tokenises_no_more_than_it_needs(
    mixture: MixtureSection,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the distance by which reading is ahead."""
    begun: list[str] = []
    begin = Encoder.start

    def noted(self: Encoder, documents: list[Document]) -> Callable[[], Encoded]:
        begun.extend(document.origin for document in documents)
        return begin(self, documents)

    monkeypatch.setattr(Encoder, "start", noted)
    stories = ingest_of(mixture, "stories", tokenizer, tmp_path / "c", 300, 1, SMALL).run()
    assert len(begun) == len(documents_of(stories)) < 60


def test_documents_before_a_damaged_place_are_kept(
    mixture: MixtureSection,
    tokenizer: PreTrainedTokenizerFast,
    tokenized: dict[str, TokenizedSource],
    tmp_path: Path,
) -> None:
    mixture.max_bad_fraction = 0
    path = Path((mixture.sources["stories"].files or [])[0])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:40], *["{"] * 1000]))
    task = ingest_of(mixture, "stories", tokenizer, tmp_path / "c", sizes=SMALL)
    with pytest.raises(MixtureError, match="are bad"):
        task.run()
    kept = documents_of(task.open())
    assert len(kept) >= 36
    assert kept == documents_of(tokenized["stories"])[: len(kept)]
