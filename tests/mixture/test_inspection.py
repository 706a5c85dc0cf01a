"""Sizes and previews of a mixture match what training draws."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from sparsify.commands.mixture import sequence_preview
from sparsify.mixture.inspection import PreviewSpan, SequencePreview, measure_mixture, preview_sequences
from sparsify.mixture.tokens.tokenized_source import TokenizedSource
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.source import SourceSection
from tests.mixture.conftest import documents_of


def test_stats_count_what_a_budget_reads(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    stats = measure_mixture(mixture, tokenizer, budget_tokens=10_000, sequence_length=32, cache_dir=tmp_path)
    for name, share in (("stories", 0.7), ("chats", 0.3)):
        source = stats.sources[name]
        assert source.planned_tokens == round(share * 10_000)
        assert source.complete
        assert 0.9 < source.packing_efficiency <= 1
        assert source.tokens == pytest.approx(source.packing_efficiency * source.sequences * 32)
        assert source.epochs == pytest.approx(share * 10_000 / (source.sequences * 32))
    assert stats.sources["stories"].loss_share == 1
    assert 0.3 < stats.sources["chats"].loss_share < 0.9


def test_a_source_that_the_budget_reads_in_part_is_not_complete(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Also where the cache holds all of it, from an earlier command with a larger budget."""
    for budget_tokens, complete in ((200, False), (10**5, True), (200, False)):
        stats = measure_mixture(mixture, tokenizer, budget_tokens=budget_tokens, sequence_length=32, cache_dir=tmp_path)
        assert [source.complete for source in stats.sources.values()] == [complete] * 2


def test_a_preview_says_what_carries_no_loss_where_nothing_can_be_dim() -> None:
    spans = [PreviewSpan("the question", False), PreviewSpan("the answer", True)]
    sequence = SequencePreview("chats", [spans], 5, 0)
    for styled, shown in ((False, "⟦the question⟧the answer"), (True, "the questionthe answer")):
        out = io.StringIO()
        Console(file=out, width=80).print(sequence_preview(sequence, styled=styled))
        assert shown in out.getvalue()
        assert ("⟦ ⟧: no loss" in out.getvalue()) is not styled


def test_stats_of_a_source_agree_with_its_documents(
    mixture: MixtureSection,
    tokenizer: PreTrainedTokenizerFast,
    tokenized: dict[str, TokenizedSource],
    tmp_path: Path,
) -> None:
    stats = measure_mixture(mixture, tokenizer, budget_tokens=10**5, sequence_length=32, cache_dir=tmp_path).sources[
        "chats"
    ]
    training = [(ids, mask) for ids, mask, side in documents_of(tokenized["chats"]) if not side]
    lengths = [len(ids) for ids, _ in training]
    assert (stats.documents, stats.tokens) == (len(lengths), sum(lengths))
    assert stats.loss_share == sum(sum(mask) for _, mask in training) / sum(lengths)
    assert stats.tokens_per_document_p50 == sorted(lengths)[(len(lengths) + 1) // 2 - 1]
    assert stats.tokens_per_document_p95 == np.percentile(lengths, 95, method="inverted_cdf")


def test_a_preview_separates_documents_and_marks_what_carries_loss(
    tokenizer: PreTrainedTokenizerFast, tokenized: dict[str, TokenizedSource]
) -> None:
    sequences = list(preview_sequences(tokenized["chats"], tokenizer, sequence_length=300, num_sequences=99, seed=1))
    chats = documents_of(tokenized["chats"])
    texts = [str(tokenizer.decode(ids)) for ids, _, held_out in chats if not held_out]
    shown = ["".join(span.text for span in doc) for sequence in sequences for doc in sequence.documents]
    assert sorted(shown) == sorted(texts)
    for sequence in sequences:
        assert sequence.num_tokens + sequence.num_empty == 300
        for prompt, answer in sequence.documents:
            assert not prompt.carries_loss
            assert prompt.text.startswith("<s><|im_start|>user\nquestion")
            assert answer.carries_loss
            assert answer.text.startswith("answer")
            assert answer.text.endswith("</s>")


def test_stats_count_what_is_dropped(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    stories = [f"Story {number} of the old town, told by its baker." for number in range(60)]
    asked = "the quick brown fox of the question jumps over one lazy dog by the river bank"
    rows = [json.dumps({"text": text}) for text in [*stories, *stories[:7], f"It says: {asked}."]]
    (tmp_path / "source.jsonl").write_text("\n".join([*rows, '{"text": null}']) + "\n")
    (tmp_path / "items.jsonl").write_text(json.dumps({"question": asked}) + "\n")
    mixture = MixtureSection(
        name="x",
        sources={"town": SourceSection(token_share=1, files=[str(tmp_path / "source.jsonl")])},
        decontaminate_against=[str(tmp_path / "items.jsonl")],
    )
    dropped = (
        measure_mixture(mixture, tokenizer, budget_tokens=100, sequence_length=32, cache_dir=tmp_path / "cache")
        .sources["town"]
        .dropped
    )
    counts = (dropped.bad_rows, dropped.duplicates, dropped.contaminated)
    assert counts == (1, 7, 1)
    assert "7 of 68 documents are duplicates" in "\n".join(dropped.notes)
