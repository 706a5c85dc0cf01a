"""Models whose mask ranks neurons by int4 copies of gate and up: a step reads the copies, then the exact rows of chosen neurons alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.errors import ModelError
from sparsify.models.quantised import BlockFormat
from sparsify.predictors import read_predictors, write_predictors
from sparsify.runtime import accelerate
from tests.predictors.untrained import random_predictors
from tests.runtime.blocks import decoded_logits
from tests.runtime.test_step import made

BITS = {None: 32, "int8": 8.5}
kinds = pytest.mark.parametrize("experts", [0, 3])


@pytest.fixture(autouse=True)
def _compiled(native: str) -> None:
    """Steps are those of the compiled kernels."""


def ranked(experts: int, **fields: Any) -> Any:
    """A model whose mask drops about 70% of the neurons."""
    sites = {"inter": {"rule": "threshold", "per": "layer", "by_proxy": True}}
    shape = {"hidden_size": 64, "intermediate_size": 96, "ffn_activation": "swiglu"}
    model = made(experts=experts, sparsification={"method": "prox", "sites": sites}, **shape | fields)
    for name, buffer in model.named_buffers():
        if name.endswith("threshold"):
            buffer.fill_(0.7)
    return model


def nearly_the_same(given: torch.Tensor, expected: torch.Tensor, format: BlockFormat | None = None) -> None:
    """Up to the first state that lies between two of the copies' steps, or size at the threshold, and goes to the other side by the last
    bits of a sum. States that int8 weights multiply are rounded everywhere, so most tokens have such a state.
    """
    wrong = (given - expected).abs().flatten(0, -2).amax(-1) / expected.abs().max()
    assert wrong.max() < 0.1
    assert format or (wrong < 3e-4).float().mean() >= 0.5


@kinds
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("format", [None, "int8"])
def test_a_step_reads_copies_and_the_rows_that_they_choose(
    experts: int, batch: int, format: BlockFormat | None
) -> None:
    model = ranked(experts)
    ids = torch.arange(3, 3 + 8 * batch).view(batch, 8)
    acceleration = accelerate(model, weights=format or "stored", keep_weights=format is None)
    if format is None:
        expected = decoded_logits(ranked(experts), ids)
    else:  # prompts multiply with what the blocks stand for
        with torch.no_grad():
            expected = model(ids).logits
    given = decoded_logits(model, ids)
    assert model.forward.steps == 8
    nearly_the_same(given, expected, format)
    for reads in acceleration.reads:
        assert 0 < reads.rows.down <= reads.rows.up == reads.rows.gate < (0.5 if batch == 1 else 0.8) * reads.offered
        copied = reads.offered * 2 * 64 * 4.5 / 8
        factors = 0 if format is None else reads.offered / 96 * 64 * 4  # of down_proj's outputs
        assert reads.bytes_read == reads.rows.total * 64 * BITS[format] / 8 + copied + factors
    blocks = 2 * max(1, experts) * 2 * 64 * 96
    assert acceleration.kept_bytes >= blocks * 4.5 / 8
    if format is None:
        assert acceleration.kept_bytes == blocks * 4.5 / 8
        twin = copy.deepcopy(model)
        nearly_the_same(decoded_logits(twin, ids), expected)
        acceleration.remove()
        with torch.no_grad():
            nearly_the_same(model(ids).logits, expected)


@kinds
def test_steps_and_blocks_choose_the_same_and_follow_weights_that_change(experts: int) -> None:
    model = ranked(experts)
    accelerate(model)
    ids = torch.arange(3, 19).view(2, 8)
    decoded_logits(model, ids)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            with torch.no_grad():
                parameter.mul_(torch.linspace(0.5, 1.5, parameter.shape[-1]))
    stepped = decoded_logits(model, ids)
    other = copy.deepcopy(model)
    other.model.norm.register_forward_hook(lambda *_: None)  # a hook makes every call go through torch
    nearly_the_same(decoded_logits(other, ids), stepped)
    assert other.forward.steps == model.forward.steps == 16
    changed = ranked(experts)
    changed.load_state_dict(model.state_dict())
    nearly_the_same(decoded_logits(changed, ids), stepped)


@kinds
def test_dense_steps_read_every_row_under_the_same_mask(experts: int) -> None:
    model = ranked(experts)
    expected = decoded_logits(model)
    acceleration = accelerate(model, dense=True)
    nearly_the_same(decoded_logits(model), expected)
    assert all(reads.rows.total == 3 * reads.offered for reads in acceleration.reads)


def test_what_would_save_nothing_is_refused(tmp_path: Path) -> None:
    model = ranked(0)
    with pytest.raises(ModelError, match="int4 weights are these copies, and nothing is left to save"):
        accelerate(model, weights="int4")
    write_predictors(random_predictors(model, 0.5, "normed", rank=8), tmp_path / "predictors")
    predictors = read_predictors(tmp_path / "predictors").for_decoding(model, "predictors")
    with pytest.raises(ModelError, match="predictors would choose once more"):
        accelerate(model, predictors=predictors)
    by_rank = {"inter": {"rule": "top_k", "by_proxy": True}}
    with pytest.raises(ModelError, match="a mask by top_k by proxy on inter, which the kernels do not apply"):
        accelerate(made(sparsification={"method": "prox", "sites": by_rank}))
