"""Models to which a mask of any kind was fitted decode natively, and write what their own forward writes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.runtime import accelerate
from tests.methods.conftest import Calibrate

PROMPT = torch.arange(3, 15)[None].repeat(2, 1)


def written(model: Any) -> torch.Tensor:
    return model.generate(PROMPT, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=2)


@pytest.mark.parametrize(
    ("kind", "method", "settings"),
    [
        ("mistral", "la_rosa", {}),
        ("mixtral", "la_rosa", {}),
        ("mistral", "r_sparse", {"alpha": 0.5}),
        ("mixtral", "r_sparse", {"alpha": 0.5}),
        ("mistral", "countdown", {}),
        ("mistral", "prox", {}),
        ("mixtral", "prox", {}),
        ("mistral", "topk", {"score": "output_norm"}),
        ("mixtral", "top_p", {"site": "up"}),
        ("mistral", "top_p", {"site": "gate"}),
    ],
)
def test_greedy_text_is_that_of_the_model_itself(
    kind: str, method: str, settings: dict[str, Any], calibrate: Calibrate, tmp_path: Path
) -> None:
    found = calibrate(
        kind, "swiglu", tmp_path / "out", tokens=640, method=method, target_zeros=0.5, method_settings=settings
    )
    model: Any = load_sparse(found.folder)
    expected = written(model)
    accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(written(model), expected)
    assert model.forward.steps == 23
