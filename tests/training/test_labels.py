"""A source without labels has no loss: null, never 0, it stays out of the mean, and it is said before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import MixtureError
from sparsify.mixture.sequences.reader import NO_LOSS, PackedSequence
from sparsify.models import SparseModel
from sparsify.training.telemetry import loss_words
from sparsify.training.validation import check_labels, mean_loss, validate

pytestmark = pytest.mark.usefixtures("one_rank")


def sequences(source: str, *, labelled: bool) -> list[PackedSequence]:
    ids = np.arange(3, 19, dtype=np.int64)
    labels = np.roll(ids, -1) if labelled else np.full_like(ids, NO_LOSS)
    return [PackedSequence(source, ids, np.arange(16, dtype=np.int64), labels)] * 2


class OneRank:
    """A model with what validation calls of the engine; DeepSpeed needs minutes to build its own."""

    def __init__(self, model: SparseModel) -> None:
        self.module, self.device = model, model.device
        self.train, self.eval = model.train, model.eval

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


HELD_OUT = {"notes": sequences("notes", labelled=True), "qa": sequences("qa", labelled=False)}


def test_a_source_without_labels_has_no_loss_and_is_not_in_the_mean(stock: dict[str, Path]) -> None:
    model = load_sparse(stock["mistral"], "drelu", torch.float32)
    engine = cast(Any, OneRank(model))
    with torch.no_grad():
        ids = torch.arange(3, 19)[None]
        logits = model(input_ids=ids).logits[0]
    expected = float(torch.nn.functional.cross_entropy(logits, ids[0].roll(-1)))
    found = validate(engine, HELD_OUT, {"notes": 0.5, "qa": 0.5}, 1)
    assert found.losses["qa"] is None
    assert found.losses["notes"] == pytest.approx(expected, rel=1e-5)
    assert found.loss == found.losses["notes"]
    assert set(found.zeros) == {"notes", "qa"}, "zeros need no labels"


def test_the_mean_is_over_the_sources_with_labels() -> None:
    assert mean_loss({"a": 2.0, "b": None, "c": 4.0}, {"a": 0.3, "b": 0.6, "c": 0.1}) == pytest.approx(2.5)
    assert mean_loss({"b": None}, {"b": 1.0}) is None
    assert loss_words(None) == "no labels"


def test_a_source_without_labels_is_named_before_training() -> None:
    (warning,) = check_labels(HELD_OUT, {"notes": 0.5, "qa": 0.5})
    assert warning.startswith(
        "Source 'qa': none of its 2 held-out sequences of 16 tokens has a token that carries loss"
    )
    with pytest.raises(MixtureError, match="train on nothing"):
        check_labels(HELD_OUT, {"notes": 0.0, "qa": 1.0})
