"""DIP: the published split, and a block's output against the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import RecipeError
from sparsify.methods.base import method_of
from sparsify.methods.density import method_density
from sparsify.methods.dip import Dip, DipSettings, fitted_split
from sparsify.methods.layer_expert import ffn_output
from sparsify.models import SparseModel
from sparsify.recipe.sparsification import ConversionSection
from tests.methods.blocks import HIDDEN, NEURONS, random_block
from tests.methods.conftest import Calibrate
from tests.runtime.blocks import IDS


@pytest.mark.parametrize(
    ("density", "inputs", "neurons"), [(0.4, 0.475, 0.250), (0.5, 0.574, 0.351), (0.7, 0.757, 0.587)]
)
def test_the_split_is_the_published_one(density: float, inputs: float, neurons: float) -> None:
    assert fitted_split(density) == pytest.approx((inputs, neurons), abs=1e-3)


@given(st.floats(0.001, 1.0))
def test_a_block_reads_the_wanted_share_whatever_it_is(density: float) -> None:
    inputs, neurons = fitted_split(density)
    assert 0 <= neurons <= inputs <= 1
    assert (2 * inputs + neurons) / 3 == pytest.approx(density)


def largest(x: torch.Tensor, share: float) -> torch.Tensor:
    """x with only the so large a share of the largest elements of each row, by a loop."""
    kept = torch.zeros_like(x)
    for row, values in enumerate(x.tolist()):
        order = sorted(range(len(values)), key=lambda c: -abs(values[c]))
        for c in order[: max(1, round(share * len(values)))]:
            kept[row, c] = values[c]
    return kept


@pytest.mark.parametrize("tokens", [[40], [30, 25]])
def test_a_block_computes_the_formula(tokens: list[int]) -> None:
    block, mask = random_block(tokens), Dip(DipSettings(target_zeros=0.5))
    # One mask on the input for all experts: the model applies it before it routes.
    parts = {"inter": block.fit(mask, "inter").parts}
    kept = mask.kept_shares
    assert block.fit(mask, "ffn_in").parts["kept_share"].item() == pytest.approx(kept["ffn_in"])
    masked = block.masked(mask, parts)
    expected = torch.zeros(len(block.x), HIDDEN, dtype=torch.float64)
    x = largest(block.x.double(), kept["ffn_in"])
    for number, expert in enumerate(block.experts):
        token, weight = block.routes.of(number)
        a = x[token] @ expert.gate.double().T
        h = a / (1 + (-a).exp()) * (x[token] @ expert.up.double().T)
        expected[token] = largest(h, kept["inter"]) @ expert.down.double().T * weight[:, None].double()
    torch.testing.assert_close(ffn_output(x.float(), block.routes, masked).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_a_model_keeps_so_many_inputs_and_neurons_of_each_token(
    kind: str, calibrate: Calibrate, stock: dict[str, Path], tmp_path: Path
) -> None:
    found = calibrate(kind, "swiglu", tmp_path / "half", tokens=640, method="dip", target_zeros=0.5)
    model = load_sparse(found.folder)
    config = ConversionSection(calibration_tokens=1, method="dip", target_zeros=0.5)
    assert ffn_density(model, method_density(model.config, config)) == pytest.approx(0.5, abs=1e-6)
    inputs, neurons = [], []
    for block in model.ffn_blocks():
        block.input_mask.register_forward_hook(lambda _, __, x: inputs.append(x))
        home: Any = block.ffn_activation.inter_mask
        home.register_forward_hook(lambda _, __, h: neurons.append(h))
    dense = load_sparse(stock[kind])(IDS).logits
    assert not torch.equal(model(IDS).logits, dense)
    assert {int(row.count_nonzero()) for x in inputs for row in x.flatten(0, -2)} == {round(0.574 * 32)}
    assert {int(row.count_nonzero()) for h in neurons for row in h.flatten(0, -2)} == {round(0.351 * 64)}
    nothing = calibrate(kind, "swiglu", tmp_path / "all", tokens=640, method="dip", target_zeros=0.0)
    assert torch.equal(load_sparse(nothing.folder)(IDS).logits, dense)


def ffn_density(model: SparseModel, density: float) -> float:
    """Density of the feed-forward weights, from that of all projections: the attention reads all of its own."""
    layer: Any = model.model.layers[0]
    attention = sum(p.numel() for name, p in layer.self_attn.named_parameters() if name.endswith("proj.weight"))
    config = model.config
    ffn = 3 * config.hidden_size * config.intermediate_size * (getattr(config, "num_experts_per_tok", None) or 1)
    return 1 - (1 - density) * (attention + ffn) / ffn


def test_thresholds_are_at_the_shares_of_the_split() -> None:
    block, mask = random_block([400]), Dip(DipSettings(target_zeros=0.5, rule="threshold"))
    (threshold,) = block.fit(mask, "ffn_in").parts["threshold"].tolist()
    assert (block.x.abs() > threshold).float().mean().item() == pytest.approx(0.574, abs=0.01)
    assert mask.reads_values


def test_a_uniform_split_is_for_comparison() -> None:
    mask = Dip(DipSettings(target_zeros=0.5, split="uniform"))
    assert mask.kept_shares == {"ffn_in": 0.5, "inter": 0.5}
    parts = random_block([10]).fit(mask, "inter").parts
    assert parts["kept_share"].item() * NEURONS == 10


def test_a_share_beyond_the_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"0 to 0\.999"):
        method_of(ConversionSection(calibration_tokens=1, method="dip", target_zeros=0.9999))
