"""CETT, CETT-PPL, top-k and thresholds, compared with stored activations and with closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparsify.methods.histogram import Histogram
from sparsify.methods.token_masks import TopKMask
from sparsify.models import SparseModel
from sparsify.sparsity import SparsityProbe
from sparsify.sparsity.curves import (
    CETT_TARGETS,
    MAGNITUDE_BINS,
    CettObserver,
    magnitude_mask,
    measure_curves,
)
from sparsify.sparsity.measure import summed_loss
from sparsify.sparsity.schema import Curves
from tests.sparsity.test_probe import FACTORS, store_pre_activations

BuildModel = Callable[..., SparseModel]


def curves_of(model: SparseModel, tokens: torch.Tensor, batch_size: int) -> Curves:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        # The labels are the model's own predictions, so that every change increases the loss.
        labels = model(tokens, use_cache=False).logits.argmax(-1)
    whole = {"input_ids": tokens, "position_ids": positions, "labels": labels}
    rows = [value.split(batch_size) for value in whole.values()]
    batches = [dict(zip(whole, parts, strict=True)) for parts in zip(*rows, strict=True)]
    return measure_curves(model, batches, summed_loss)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
@pytest.mark.parametrize("activation", ["swiglu", "reglu", "drelu"])
def test_cett_equals_brute_force(build_model: BuildModel, input_ids: torch.Tensor, kind: str, activation: str) -> None:
    model = build_model(kind, activation)
    curves = curves_of(model, input_ids, batch_size=3)
    stored = store_pre_activations(model)
    with torch.no_grad():
        model(input_ids, use_cache=False)
    gate_of, up_of = FACTORS[activation]
    for point in curves.cett:
        for layer, found in enumerate(point.layers):
            errors, dropped = [], []
            for (at, expert), calls in stored.items():
                if at != layer:
                    continue
                product = torch.cat([gate_of(gate) * up_of(up) for gate, up in calls])
                down = model.ffn_blocks()[layer].down_proj
                weight = down.weight if kind == "mistral" else down[expert]
                outputs = product.unsqueeze(-1) * weight.T  # [tokens, neurons, hidden]
                out = outputs.norm(dim=-1) <= found.threshold
                errors.append((outputs * out.unsqueeze(-1)).sum(1).norm(dim=-1))
                # A token on which no neuron fires has no error.
                errors[-1] = (errors[-1] / outputs.sum(1).norm(dim=-1)).detach().nan_to_num(0)
                dropped.append(out.double().mean(-1))
            assert found.cett == pytest.approx(float(torch.cat(errors).mean()), abs=1e-5)
            assert found.sparsity == pytest.approx(float(torch.cat(dropped).mean()), abs=1e-6)
            assert found.cett == pytest.approx(point.target, abs=0.02)
    sparsities = [point.sparsity for point in curves.cett]
    assert sparsities == sorted(sparsities)
    exact = SparsityProbe(model)
    with torch.no_grad(), exact:
        model(input_ids, use_cache=False)
    assert sparsities[0] == pytest.approx(exact.statistics().zero_share(), abs=1e-6)


def test_curves_do_not_depend_on_batches(build_model: BuildModel, input_ids: torch.Tensor) -> None:
    first, second = (curves_of(build_model(), input_ids, size) for size in (1, 4))
    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    for left, right in zip(first.cett, second.cett, strict=True):
        assert left.sparsity == pytest.approx(right.sparsity, abs=2e-3)
    for left, right in zip(first.magnitude, second.magnitude, strict=True):
        assert left.sparsity == pytest.approx(right.sparsity, abs=2e-3)


@pytest.mark.parametrize("activation", ["swiglu", "drelu"])
def test_ppl_points_are_within_their_perplexity(
    build_model: BuildModel, input_ids: torch.Tensor, activation: str
) -> None:
    curves = curves_of(build_model("mistral", activation), input_ids, batch_size=4)
    for point in curves.ppl:
        allowed = curves.loss + math.log1p(point.percent / 100)
        assert point.loss <= allowed
        if not point.is_limit:
            assert point.loss > curves.loss + 0.5 * (allowed - curves.loss) or point.cett < 0.95
    assert [point.cett for point in curves.ppl] == sorted(point.cett for point in curves.ppl)
    assert curves.cett[0].loss == curves.top_k[0].loss == curves.loss
    losses = [point.loss for point in curves.top_k]
    assert losses[0] < losses[-1]
    for point in curves.top_k:
        assert point.sparsity == pytest.approx(max(point.share, curves.top_k[0].sparsity), abs=0.05)


def test_known_gaussians_have_known_thresholds_and_errors() -> None:
    torch.manual_seed(0)
    values = torch.randn(2000, 400)
    histogram = Histogram(MAGNITUDE_BINS)
    histogram.add(values.abs())
    assert histogram.quantile(0.5) == pytest.approx(0.6745, rel=0.02)
    assert histogram.quantile(0.9) == pytest.approx(1.6449, rel=0.02)
    kept = magnitude_mask(histogram, 0.8).keep(0, 0, values)
    assert float((~kept).double().mean()) == pytest.approx(0.8, abs=0.01)

    # With orthonormal columns the squared error is the energy of the dropped neurons.
    block = nn.Module()
    block.down_proj = nn.Linear(400, 400, bias=False)
    nn.init.eye_(block.down_proj.weight)
    observer = CettObserver([torch.ones(1, 400)], [[0.5, 1.0, 2.0]])
    with torch.no_grad():
        observer.add(0, 0, torch.arange(2000), block, values)
    for truncation in observer.truncations(400)[0]:
        t = truncation.threshold
        inside = math.erf(t / math.sqrt(2))
        energy = inside - 2 * t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        assert truncation.sparsity == pytest.approx(inside, abs=0.003)
        assert truncation.cett == pytest.approx(math.sqrt(energy), rel=0.01)


def test_top_k_keeps_the_largest_of_every_token() -> None:
    values = torch.tensor([[3.0, -4.0, 1.0, 0.0], [0.0, 0.5, 0.2, -0.1]])
    expected = torch.tensor([[True, True, False, False], [False, True, True, False]])
    assert torch.equal(TopKMask(0.5).keep(0, 0, values), expected)


def test_targets_are_those_of_the_papers() -> None:
    assert CETT_TARGETS[0] == 0
    assert CETT_TARGETS[-1] == 0.5
    assert 0.2 in CETT_TARGETS  # the elbow of ReLU² Wins
