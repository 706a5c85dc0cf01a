"""Prox: int4 copies of gate and up rank the neurons; formula, storage, training under the mask, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.methods.pooled import ZerosSettings
from sparsify.methods.prox import Prox
from sparsify.models import SparseModel, site_rules
from sparsify.sparsity.definitions import formula
from tests.methods.blocks import HIDDEN, NEURONS, naive_quantile, random_block
from tests.methods.conftest import Calibrate, Calibrated, measured
from tests.runtime.blocks import IDS


def naive_copy(row: list[float]) -> list[float]:
    """What a row of at most 32 weights is in int4: values from -8 to 7, its largest weight -8."""
    scale = float(torch.tensor(max(row, key=abs) / -8).bfloat16())
    return [scale * min(7, max(-8, round(weight / scale))) for weight in row]


@pytest.mark.parametrize("tokens", [[200], [120, 3, 0, 90]])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_the_copies_products_decide_by_a_loop(tokens: list[int], share: float) -> None:
    block, mask = random_block(tokens), Prox(ZerosSettings(target_zeros=share))
    fitted = block.fit(mask, "inter")
    masked = block.masked(mask, {"inter": fitted.parts})
    sizes = []
    for number, expert in enumerate(block.experts):
        gate, up = ([naive_copy(row) for row in weight.tolist()] for weight in (expert.gate, expert.up))
        rows = []
        for x in block.x[block.routes.of(number)[0]].tolist():
            step = max(map(abs, x)) / 127  # states are rounded as products with int4 weights round them
            x = [step * round(one / step) for one in x]
            g, u = ([sum(a * b for a, b in zip(row, x, strict=True)) for row in copy] for copy in (gate, up))
            rows.append([abs(a / (1 + float(torch.tensor(-a).double().exp())) * b) for a, b in zip(g, u, strict=True)])
        sizes.append(rows)
    (threshold,) = fitted.parts["threshold"].tolist()
    exact = naive_quantile([size for rows in sizes for row in rows for size in row], share)
    assert exact * 0.999 <= threshold <= exact * 1.0051
    for number, expert in enumerate(masked):
        g, u, _ = block.factors(number)
        kept = torch.tensor(sizes[number]).view(-1, NEURONS) > threshold
        wanted = torch.where(kept, g * u, 0.0)
        given = expert.neurons(block.x[block.routes.of(number)[0]]).double()
        near = (torch.tensor(sizes[number]).view(-1, NEURONS) / threshold - 1).abs() < 1e-5
        torch.testing.assert_close(torch.where(near, wanted, given), wanted, rtol=1e-4, atol=1e-5)
    assert HIDDEN <= 32  # one block of a row


@pytest.fixture(scope="module")
def half(calibrate: Calibrate, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Calibrated]:
    """Both kinds of model at 50% zeros, reconstructed, with a constant in place of what is dropped."""
    return {
        kind: calibrate(
            kind,
            "swiglu",
            tmp_path_factory.mktemp("prox") / kind,
            method="prox",
            target_zeros=0.5,
            refit=True,
            remainder="constant",
        )
        for kind in ("mistral", "mixtral")
    }


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_the_loaded_model_is_the_calibrated_one_and_stores_no_copies(
    kind: str, half: dict[str, Calibrated], stock: dict[str, Path]
) -> None:
    found = half[kind]
    model = load_sparse(found.folder)
    assert model.config.sparsification == {
        "method": "prox",
        "sites": {"inter": {"rule": "threshold", "per": "layer", "by_proxy": True, "remainder": "constant"}},
    }
    stages = found.calibration.stages
    assert [stage.name for stage in stages] == ["dense", "prox", "refit"]
    loss, zeros = measured(model, found)
    assert (stages[-1].loss, stages[-1].zeros) == (pytest.approx(loss, abs=2e-4), pytest.approx(zeros, abs=2e-3))
    kept = "exceeds the layer's threshold in size, as int4 copies of gate and up say"
    assert kept in formula("swiglu", {site: rule.words for site, rule in site_rules(model.config).items()})
    added = set(model.state_dict()) - set(load_sparse(stock[kind]).state_dict())
    assert {name.rpartition(".")[2] for name in added} == {"threshold", "remainder_constant"}


def gate_of(model: SparseModel) -> torch.Tensor:
    block = model.ffn_blocks()[0]
    return block.gate_up_proj if hasattr(block, "gate_up_proj") else block.gate_proj.weight


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_training_passes_gradients_of_kept_neurons_and_copies_follow_the_weights(
    kind: str, half: dict[str, Calibrated]
) -> None:
    model = load_sparse(half[kind].folder)
    block = model.ffn_blocks()[0]
    fired: list[torch.Tensor] = []
    block.ffn_activation.register_forward_hook(lambda _, __, product: fired.append(product.detach() != 0))
    with torch.no_grad():
        model(IDS)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    down = block.down_proj if hasattr(block, "gate_up_proj") else block.down_proj.weight
    assert down.grad is not None
    calls = len(fired) // 2
    if kind == "mistral":  # a neuron that no token keeps gets no gradient
        assert torch.equal(down.grad.abs().sum(0) != 0, fired[1][0, :-1].any(0))
    # An optimiser may write to weights unseen: negated rows have other int4 copies, as their scales have a sign.
    gate_of(model).data.mul_(torch.linspace(-2, 2, gate_of(model).shape[-1]))
    model(IDS)
    model.eval()
    fired.clear()
    with torch.no_grad():
        model(IDS)
        again = load_sparse(half[kind].folder)
        gate_of(again).mul_(torch.linspace(-2, 2, gate_of(again).shape[-1]))
        again.ffn_blocks()[0].ffn_activation.register_forward_hook(
            lambda _, __, product: fired.append(product.detach() != 0)
        )
        again(IDS)
    assert len(fired) == 2 * calls
    assert all(torch.equal(one, other) for one, other in zip(fired[:calls], fired[calls:], strict=True))
