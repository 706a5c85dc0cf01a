"""The quickstart's first 50 steps have the losses that they had when the golden file was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.update_golden import GOLDEN, measure

TOLERANCE = 5e-4
"""In nats, and of shares: processors with other vectors round otherwise (AVX2 against AVX-512: up to 1.5e-4 within 50 steps)."""


@pytest.mark.slow
def test_the_quickstart_has_its_golden_losses(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))

    found = measure(tmp_path / "run")

    if found["text"] != golden["text"]:
        pytest.skip("The quickstart trains on Python's own library, and this Python has another text.")
    assert found["losses"] == pytest.approx(golden["losses"], abs=TOLERANCE)
    assert len(found["validation"]) == len(golden["validation"])
    for now, then in zip(found["validation"], golden["validation"], strict=True):
        assert (now["label"], now["tokens"]) == (then["label"], then["tokens"])
        assert now["loss"] == pytest.approx(then["loss"], abs=TOLERANCE)
        assert now["zeros"] == pytest.approx(then["zeros"], abs=TOLERANCE)
