"""How a text is divided into calibration and validation sequences."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from sparsify.mixture.sequences.held_out import text_or_mixture_calibration
from tests.mixture.conftest import story


@pytest.mark.parametrize(
    ("num_tokens", "validation_tokens", "expected"),
    [
        (320, 640, (10, 20)),  # enough for both: exactly the requested numbers
        (640, 320, (20, 10)),
        (100_000, 640, None),  # too short: a quarter validates, the rest calibrates
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
    sequences, validation = text_or_mixture_calibration(
        str(text),
        tokenizer,
        num_tokens=num_tokens,
        validation_tokens=validation_tokens,
        sequence_length=32,
        seed=0,
        cache_dir=tmp_path / "cache",
    )
    held_out = validation["text.txt"]
    if expected is None:
        expected = len(sequences), min(20, (len(sequences) + len(held_out)) // 4)
    assert (len(sequences), len(held_out)) == expected
