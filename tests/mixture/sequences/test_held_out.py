from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.mixture.sequences.held_out import sequences_from
from sparsify.mixture.sequences.reader import NO_LOSS
from sparsify.recipe.compose import to_yaml
from sparsify.recipe.mixture import MixtureSection

TEXTS = [f"story {n} about a river and a stone" for n in range(9)]


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl"])
def test_a_text_gives_all_its_documents_in_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    path = tmp_path / f"text.{kind}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    content = (lines if kind == "jsonl" else "<|endoftext|>".join(TEXTS)).encode()
    path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)

    sequences, description = sequences_from(
        str(path), tokenizer, num_tokens=10**6, sequence_length=20, cache_dir=tmp_path
    )

    assert description == path.name
    assert {len(sequence.input_ids) for sequence in sequences[:-1]} == {20}
    assert 0 < len(sequences[-1].input_ids) <= 20
    ids = np.concatenate([sequence.input_ids for sequence in sequences])
    labels = np.concatenate([sequence.labels for sequence in sequences])
    assert tokenizer.decode(ids) == "".join(f"<s>{text}</s>" for text in TEXTS)
    ends = ids == tokenizer.eos_token_id
    assert (labels[ends] == NO_LOSS).all()
    assert np.array_equal(labels[~ends], ids[1:][~ends[:-1]])


def test_a_text_is_cut_at_the_tokens_wanted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[0] * 20)
    sequences, _ = sequences_from(str(path), tokenizer, num_tokens=50, sequence_length=20, cache_dir=tmp_path)
    assert [len(sequence.input_ids) for sequence in sequences] == [20, 20, 10]
    assert sequences[-1].labels[-1] != NO_LOSS, "the document continues after the cut"


def test_a_mixture_gives_held_out_sequences_in_proportion(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, mixture: MixtureSection
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(mixture))
    sequences, description = sequences_from(
        str(path), tokenizer, num_tokens=160, sequence_length=16, cache_dir=tmp_path / "cache"
    )
    assert description == "held-out sequences of mixture tiny"
    names = [sequence.source for sequence in sequences]
    assert (names.count("stories"), names.count("chats")) == (7, 3)


def test_a_name_that_is_neither_a_file_nor_a_mixture_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(MixtureError, match="neither a file nor a mixture") as caught:
        sequences_from("nowhere.txt", tokenizer, num_tokens=1, sequence_length=1, cache_dir=tmp_path)
    assert "'nowhere.txt'" in str(caught.value)
    assert "Mixtures: " in str(caught.value)


def test_an_empty_file_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "empty.txt"
    path.touch()
    with pytest.raises(MixtureError, match="holds no text"):
        sequences_from(str(path), tokenizer, num_tokens=1, sequence_length=1, cache_dir=tmp_path)
