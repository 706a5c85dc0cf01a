"""Magnitude, Wanda and SparseGPT on one matrix: against naive references, and what they owe each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.errors import RecipeError
from sparsify.methods.base import method_of
from sparsify.methods.weights.magnitude import Magnitude
from sparsify.methods.weights.pruning import WeightPruning
from sparsify.methods.weights.sparsegpt import SparseGpt, SparseGptSettings, inverse_factor, prune_columns
from sparsify.methods.weights.statistics import InputStatistics
from sparsify.methods.weights.wanda import Wanda
from sparsify.methods.weights.zeros import ZeroPattern, parse_pattern
from sparsify.recipe.sparsification import ConversionSection

OUTPUTS, INPUTS, ROWS = 24, 40, 400


def matrix_and_inputs(seed: int, inputs: int = INPUTS) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [outputs, inputs], and correlated rows of very different channels that it reads."""
    torch.manual_seed(seed)
    mix = torch.randn(inputs, inputs) * torch.rand(inputs).mul(3).exp()
    return torch.randn(OUTPUTS, inputs), torch.randn(ROWS, inputs) @ mix


def seen(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], x.device, products=True)
    for part in x.split(130):
        statistics.add(part)
    return statistics


def sparsegpt(**settings: object) -> SparseGpt:
    return SparseGpt(SparseGptSettings.model_validate({"weight_sparsity": 0.5, **settings}))


def naive(
    weight: torch.Tensor, x: torch.Tensor, share: float, block: int, old: torch.Tensor, kept: int = 0, group: int = 0
) -> torch.Tensor:
    """SparseGPT as the paper's equations 3 and 4 have it, in float64: after each column the inverse of what remains of the Hessian is
    computed anew, and every column behind is changed at once.
    """
    weight, hessian = weight.double().clone(), x.double().T @ x.double()
    inputs = weight.shape[1]
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(inputs)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        zero = old[:, start:stop].clone()
        for i in range(start, stop):
            span = (start, stop) if not group else (i, i + group)
            if i == start or (group and (i - start) % group == 0):
                # (H^-1)_jj of the Hessian without the columns before j
                scores = torch.stack(
                    [weight[:, j] ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(*span)], dim=1
                )
                scores[old[:, span[0] : span[1]]] = -1.0
                if group:
                    lowest = scores.argsort(dim=1)[:, : group - kept]
                    zero[:, span[0] - start : span[1] - start].scatter_(1, lowest, True)
                else:
                    flat = scores.flatten().argsort()[: int(scores.numel() * share)]
                    zero.view(-1)[flat] = True
            inverse = torch.linalg.inv(hessian[i:, i:])
            error = torch.where(zero[:, i - start], weight[:, i], 0.0) / inverse[0, 0]
            weight[:, i:] -= error[:, None] * inverse[0]
            weight[:, i][zero[:, i - start]] = 0.0
    return weight


@pytest.mark.parametrize(
    ("share", "pattern", "block"),
    [(0.5, "unstructured", 16), (0.7, "unstructured", 128), (0.5, "2:4", 16), (0.5, "4:8", 12)],
)
def test_sparsegpt_is_the_naive_one_column_by_column(share: float, pattern: str, block: int) -> None:
    weight, x = matrix_and_inputs(1)
    method = sparsegpt(weight_sparsity=share, pattern=pattern, block_columns=block)
    zeros = method.zeros
    wanted = naive(
        weight,
        x,
        share,
        block - block % zeros.group,
        weight == 0,
        zeros.kept or 0,
        zeros.group if zeros.kept else 0,
    )
    found = method.prune(weight, seen(x), zeros)
    assert (found.by, found.because) == ("sparsegpt", None)
    assert torch.equal(found.weight == 0, wanted == 0)
    torch.testing.assert_close(found.weight.double(), wanted, rtol=2e-3, atol=2e-3)


def test_a_mask_is_extended_and_keeps_its_zeros() -> None:
    weight, x = matrix_and_inputs(2)
    first = sparsegpt(weight_sparsity=0.5).prune(weight, seen(x), ZeroPattern(0.5)).weight
    method = sparsegpt(weight_sparsity=0.7, block_columns=16)
    second = method.prune(first, seen(x), method.zeros).weight
    assert bool((second[first == 0] == 0).all())
    assert 0.68 < float((second == 0).float().mean()) <= 0.7
    wanted = naive(first, x, 0.7, 16, first == 0)
    torch.testing.assert_close(second.double(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", [Magnitude, Wanda, SparseGpt])
def test_two_of_four_are_exactly_two_of_four(kind: type[WeightPruning]) -> None:
    weight, x = matrix_and_inputs(3)
    method = kind(SparseGptSettings(weight_sparsity=0.5, pattern="2:4"))
    pruned = method.prune(weight, seen(x), method.zeros).weight
    assert torch.equal((pruned.view(OUTPUTS, -1, 4) == 0).sum(-1), torch.full((OUTPUTS, INPUTS // 4), 2))


def test_sparsegpt_leaves_a_smaller_error_than_wanda_and_wanda_than_magnitude() -> None:
    weight, x = matrix_and_inputs(4)
    errors = []
    for kind in (SparseGpt, Wanda, Magnitude):
        method = kind(SparseGptSettings(weight_sparsity=0.6))
        pruned = method.prune(weight, seen(x), method.zeros).weight
        errors.append(float(((pruned - weight) @ x.T).square().mean()))
    assert errors[0] < 0.8 * errors[1] < 0.8 * errors[2]


def test_with_a_diagonal_hessian_weights_do_not_change_and_scores_are_those_of_wanda() -> None:
    torch.manual_seed(5)
    weight = torch.randn(OUTPUTS, 16)
    x = torch.eye(16).repeat(8, 1) * torch.rand(16).mul(4).exp()
    statistics = seen(x)
    assert statistics.products is not None
    upper = inverse_factor(statistics.products, damping=1e-9)
    assert upper is not None
    zeros = ZeroPattern(0.5)
    dead = torch.zeros(16, dtype=torch.bool)
    pruned = prune_columns(weight, upper, dead, zeros, block_columns=16)
    scores = weight.abs() * statistics.norms
    wanted = weight.masked_fill(zeros.anywhere(scores), 0.0)
    assert torch.equal(pruned == 0, wanted == 0)
    torch.testing.assert_close(pruned, wanted)


def test_weights_of_a_dead_input_are_the_first_zeros_and_disturb_no_other() -> None:
    weight, x = matrix_and_inputs(6)
    x[:, 7] = 0.0
    method = sparsegpt(weight_sparsity=0.5)
    pruned = method.prune(weight, seen(x), method.zeros)
    assert pruned.because is None
    assert not pruned.weight[:, 7].any()
    assert float((pruned.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    # Without that input there is no other result, but for the share.
    others = torch.arange(INPUTS) != 7
    share = (0.5 * INPUTS - 1) / (INPUTS - 1)
    alone = sparsegpt(weight_sparsity=share).prune(weight[:, others], seen(x[:, others]), ZeroPattern(share)).weight
    # A few differ, since the damping is a share of another mean.
    assert float(((alone == 0) == (pruned.weight[:, others] == 0)).float().mean()) > 0.97


def test_a_singular_hessian_and_too_few_tokens_are_left_to_wanda_and_said() -> None:
    weight, x = matrix_and_inputs(7)
    method = sparsegpt(weight_sparsity=0.5)
    few = method.prune(weight, seen(x[: 2 * INPUTS - 1]), method.zeros)
    assert (few.by, few.because) == ("wanda", "79 of at least 80 calibration tokens reached it")
    assert torch.equal((few.weight == 0).sum(1), torch.full((OUTPUTS,), INPUTS // 2))
    infinite = seen(x)
    assert infinite.products is not None
    infinite.products[3, 4] = infinite.products[4, 3] = 1e30
    singular = method.prune(weight, infinite, method.zeros)
    assert (singular.by, singular.because) == ("wanda", "its Hessian is singular")
    nothing = method.prune(weight, seen(x[:0]), method.zeros)
    assert (nothing.by, nothing.because) == ("magnitude", "0 calibration tokens reached it")
    # Rows that span less than the inputs do not make it singular: it is damped.
    flat = method.prune(weight, seen(x[:, :3] @ torch.randn(3, INPUTS)), method.zeros)
    assert flat.by == "sparsegpt"
    assert bool(flat.weight.isfinite().all())


@given(st.integers(0, 1000), st.floats(0.05, 0.95), st.integers(1, 60))
@settings(max_examples=25)
def test_shares_hold_in_every_row_of_wanda_and_every_block_of_sparsegpt(seed: int, share: float, block: int) -> None:
    weight, x = matrix_and_inputs(seed)
    settings = SparseGptSettings(weight_sparsity=share, block_columns=block)
    by_wanda = Wanda(settings).prune(weight, seen(x), ZeroPattern(share)).weight
    assert torch.equal((by_wanda == 0).sum(1), torch.full((OUTPUTS,), int(INPUTS * share)))
    by_gpt = SparseGpt(settings).prune(weight, seen(x), ZeroPattern(share)).weight
    for part in by_gpt.split(block, dim=1):
        assert int((part == 0).sum()) == int(part.numel() * share)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "sparsegpt needs conversion.weight_sparsity"),
        ({"weight_sparsity": 0.5, "method_settings": {"pattern": "3:4"}}, "3:4 makes 0.25 of the weights zero"),
        (
            {"weight_sparsity": 0.5, "method_settings": {"pattern": "half"}},
            "conversion.method_settings.pattern is half",
        ),
        ({"weight_sparsity": 0.5, "method_settings": {"layer_shares": [0.4, 0.5]}}, "their mean is 0.4500"),
        ({"weight_sparsity": 0.5, "method_settings": {"damping": 0}}, "damping is 0"),
        ({"weight_sparsity": 0.5, "target_zeros": 0.9}, "conversion.target_zeros=0.9 would be ignored"),
        ({"weight_sparsity": 0.5, "refit": True}, "conversion.refit=true would be ignored"),
        ({"weight_sparsity": 0.5, "method": "cats", "target_zeros": 0.5}, "weight_sparsity=0.5 would be ignored"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said.replace("(", "\\(")):
        method_of(ConversionSection(**{"calibration_tokens": 4096, "method": "sparsegpt", **settings}))  # type: ignore[arg-type]


def test_a_pattern_that_yaml_reads_as_a_time_is_the_pattern() -> None:
    assert SparseGptSettings.model_validate({"weight_sparsity": 0.5, "pattern": 2 * 60 + 4}).pattern == "2:4"
    assert parse_pattern("4:8", 0.5) == ZeroPattern(0.5, 4, 8)
