"""How a text is divided between what a calibration rests on and what it is watched with."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from sparsify.mixture.sequences.held_out import text_or_mixture_calibration
from tests.mixture.conftest import story


@pytest.mark.parametrize(
    ("num_tokens", "validation_tokens", "expected"),
    [
        (320, 640, (10, 20)),  # enough for both: exactly what was asked, however unequal
        (640, 320, (20, 10)),
        (100_000, 640, None),  # too short: a quarter is watched, the rest calibrates
    ],
)
def test_a_text_gives_the_requested_sequences_if_it_is_long_enough(
    num_tokens: int,
    validation_tokens: int,
    expected: tuple[int, int] | None,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(story(number, 60) for number in range(40)))
    sequences, watched = text_or_mixture_calibration(
        str(text),
        tokenizer,
        num_tokens=num_tokens,
        validation_tokens=validation_tokens,
        sequence_length=32,
        seed=0,
        cache_dir=tmp_path / "cache",
    )
    held_out = watched["text.txt"]
    if expected is None:
        expected = len(sequences), min(20, (len(sequences) + len(held_out)) // 4)
    assert (len(sequences), len(held_out)) == expected
