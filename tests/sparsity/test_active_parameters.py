from __future__ import annotations

from collections.abc import Callable

import pytest

from sparsify.models import SparseModel
from sparsify.sparsity.active_parameters import active_parameters, parameters_by_part, published

BuildModel = Callable[..., SparseModel]


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_parts_are_the_model(build_model: BuildModel, kind: str) -> None:
    model = build_model(kind)
    parts = parameters_by_part(model)
    assert sum(parts.values()) == sum(parameter.numel() for parameter in model.parameters())
    experts = 4 if kind == "mixtral" else 1
    assert parts["gate"] == parts["up"] == parts["down"] == 3 * experts * 16 * 20
    assert parts["router"] == (3 * 4 * 16 if kind == "mixtral" else 0)
    assert parts["norms"] == 7 * 16
    dense = active_parameters(parts, expert_share=1.0, gate_zeros=0.0, product_zeros=0.0)
    assert dense.total == dense.perfect_predictor == dense.gate_first == sum(parts.values())


def test_gate_first_reads_the_gate_whole(build_model: BuildModel) -> None:
    parts = parameters_by_part(build_model("mixtral"))
    account = active_parameters(parts, expert_share=0.5, gate_zeros=0.5, product_zeros=0.75)
    lines = {part.part: part for part in account.parts}
    matrix = parts["gate"]
    assert [lines[part].gate_first for part in ("gate", "up", "down")] == [
        matrix / 2,
        matrix / 4,
        matrix / 8,
    ]
    assert {lines[part].perfect_predictor for part in ("gate", "up", "down")} == {matrix / 8}
    assert lines["attention"].gate_first == parts["attention"]
    assert lines["predictor"].total == 0


def test_published_active_parameters() -> None:
    mistral, mixtral = published()
    assert mistral.perfect_predictor == pytest.approx(2.17e9, rel=0.005)
    assert mixtral.perfect_predictor == pytest.approx(3.30e9, rel=0.005)
    assert mistral.zeros_of_claim == pytest.approx(0.84, abs=0.005)
    assert mixtral.zeros_of_claim == pytest.approx(0.76, abs=0.005)
