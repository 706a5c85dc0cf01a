"""Predictors see what the block sees, row for row; folding a norm into them changes no sign."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from sparsify.models import SparseModel
from sparsify.predictors.format import BlockPredictor, folded
from sparsify.predictors.inputs import BlockInputs
from sparsify.sparsity.probe import SparsityProbe
from tests.predictors.conftest import random_batches


class Recompute:
    """Computes every block's activations again, from the rows that a predictor would get."""

    def __init__(self, model: SparseModel, inputs: BlockInputs, residual: bool) -> None:
        self.model, self.inputs, self.residual = model, inputs, residual
        self.calls = 0

    def keep(self, layer: int, expert: int, product: torch.Tensor) -> torch.Tensor:
        rows = self.inputs.rows(expert)
        if self.residual:
            rows = self.model.model.layers[layer].post_attention_layernorm.forward(rows)
        block: Any = self.model.ffn_blocks()[layer]
        if hasattr(block, "gate_up_proj"):
            gate, up = (rows @ block.gate_up_proj[expert].T).chunk(2, -1)
        else:
            gate, up = block.gate_proj(rows), block.up_proj(rows)
        # Not the modules themselves: their hooks are what is running.
        torch.testing.assert_close(block.ffn_activation.forward(gate, up), product)
        self.calls += 1
        return torch.ones_like(product, dtype=torch.bool)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
@pytest.mark.parametrize("residual", [False, True])
@torch.no_grad()
def test_rows_are_the_blocks_own_inputs(kind: str, residual: bool, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    with BlockInputs(model, "residual" if residual else "normed") as inputs:
        recompute = Recompute(model, inputs, residual)
        with SparsityProbe(model, mask=recompute):
            model(random_batches(1, seed=1)[0]["input_ids"])
    assert recompute.calls > (4 if kind == "mixtral" else 1)


@given(st.integers(0, 10_000), st.floats(0.01, 100.0), st.floats(0.1, 10.0))
def test_a_folded_predictor_has_the_same_signs_and_scales_with_the_token(seed: int, size: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm = MistralRMSNorm(16, eps=1e-6)
    norm.weight.data = torch.rand(16, generator=generator) * 3 - 0.5
    A = torch.randn(8, 16, generator=generator)
    B = torch.randn(24, 8, generator=generator)
    residual = size * torch.randn(10, 16, generator=generator)
    normed = BlockPredictor(A, B).scores(norm(residual))
    on_residual = folded(BlockPredictor(A, B), norm.weight.detach(), scale).scores(residual)
    rms = (residual.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(on_residual, normed * rms / scale, rtol=1e-3, atol=1e-4 * size)
