"""The activation is what its name says, in dense blocks and in every expert back-end that is allowed."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel

from sparsify.models import (
    ACTIVATIONS,
    FfnActivation,
    SparseMistralConfig,
    SparseMistralForCausalLM,
    SparseMistralModel,
    SparseMixtralConfig,
    SparseMixtralForCausalLM,
    SparseMixtralModel,
)
from sparsify.recipe.engine import Attention
from tests.conftest import SHAPE
from tests.models.formulas import FORMULAS, T

THRESHOLDS = {"method": "test", "sites": {"inter": {"rule": "threshold", "per": "channel"}}}
numbers = st.floats(-8, 8, allow_nan=False)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20))
def test_every_activation_equals_its_formula_in_float64(pairs: list[tuple[float, float]]) -> None:
    gate, up = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    for name in ACTIVATIONS:
        torch.testing.assert_close(FfnActivation(name, T)(gate, up), FORMULAS[name](gate, up))


@given(st.lists(st.tuples(numbers, numbers, st.floats(0, 4)), min_size=1, max_size=20))
def test_thresholds_zero_what_does_not_exceed_them_and_keep_the_rest(
    rows: list[tuple[float, float, float]],
) -> None:
    gate, up, threshold = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    for name in ACTIVATIONS:
        activation = FfnActivation(name, T).double()
        activation.threshold = threshold
        expected = FORMULAS[name](gate, up)
        expected = torch.where(expected.abs() > threshold, expected, 0.0)
        torch.testing.assert_close(activation(gate, up), expected)


def test_published_relu2_is_drelu_with_gate_and_up_the_same() -> None:
    x = torch.randn(50, dtype=torch.float64)
    assert torch.equal(FfnActivation("drelu")(x, x), torch.relu(x) ** 2)


@pytest.mark.parametrize("thresholded", [False, True])
def test_gradients_equal_finite_differences(thresholded: bool) -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(2, 50, dtype=torch.float64).requires_grad_().unbind(0)
    for name in ACTIVATIONS:
        activation = FfnActivation(name, T).double()
        if thresholded:
            activation.threshold = torch.rand(50, dtype=torch.float64)
        assert torch.autograd.gradcheck(activation, (gate, up))


def test_drelu_passes_no_gradient_where_it_is_zero() -> None:
    pre = torch.tensor([[-1.0, 2.0], [2.0, -1.0], [0.0, 3.0]], requires_grad=True)
    FfnActivation("drelu")(pre[:, 0], pre[:, 1]).sum().backward()
    assert torch.equal(pre.grad[:2], torch.zeros(2, 2))
    assert pre.grad[2, 1] == 0


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed: swiglu, geglu, reglu, shifted_relu, relu2, fatrelu, drelu"):
        FfnActivation("relu")


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_mistral_block_computes_the_formula(name: str) -> None:
    torch.manual_seed(0)
    config = SparseMistralConfig(**SHAPE, ffn_activation=name, ffn_gate_threshold=T)
    mlp = SparseMistralForCausalLM(config).model.layers[0].mlp
    x = torch.randn(2, 5, SHAPE["hidden_size"])
    expected = FORMULAS[name](x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_mixtral_experts_compute_the_formula_in_every_allowed_backend(name: str, masked: bool, backend: str) -> None:
    torch.manual_seed(0)
    config = SparseMixtralConfig(
        **SHAPE,
        num_local_experts=4,
        num_experts_per_tok=2,
        ffn_activation=name,
        ffn_gate_threshold=T,
        sparsification=THRESHOLDS if masked else None,
    )
    model = SparseMixtralForCausalLM(config)
    model.set_experts_implementation(backend)
    experts = model.model.layers[0].mlp.experts
    limits = torch.zeros(4, SHAPE["intermediate_size"])
    if masked:
        limits = experts.ffn_activation.threshold.uniform_(0, 0.3)
    x, weights = torch.randn(9, SHAPE["hidden_size"]), torch.rand(9, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    expected = torch.zeros_like(x)
    for token in range(9):
        for slot in range(2):
            gate, up = (experts.gate_up_proj[index[token, slot]] @ x[token]).chunk(2)
            product = FORMULAS[name](gate, up)
            product[product.abs() <= limits[index[token, slot]]] = 0
            answer = experts.down_proj[index[token, slot]] @ product
            expected[token] += weights[token, slot] * answer
    torch.testing.assert_close(experts(x, index, weights), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["deepgemm", "sonicmoe"])
def test_other_expert_backends_are_refused(backend: str) -> None:
    config = SparseMixtralConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1, ffn_activation="drelu")
    model = SparseMixtralForCausalLM(config)
    model.config._experts_implementation = backend
    with pytest.raises(ValueError, match=f"{backend}.*would not apply ffn_activation='drelu'"):
        model(torch.zeros(1, 3, dtype=torch.long))


class SomebodysExperts(torch.nn.Module):
    """What inference engines put in the place of a module called `experts`."""

    def forward(self, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


@pytest.mark.parametrize("name", ["drelu", "swiglu"])
def test_experts_that_an_engine_replaced_are_refused_unless_they_compute_the_same(name: str) -> None:
    config = SparseMixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, ffn_activation=name)
    model = SparseMixtralModel(config)
    ids = torch.arange(3, 13)[None]
    model(ids)
    model.layers[1].mlp.experts = SomebodysExperts()
    if name == "swiglu":
        model(ids)
    else:
        with pytest.raises(
            ValueError, match="replaced by SomebodysExperts, which does not apply ffn_activation='drelu'"
        ):
            model(ids)


@pytest.mark.parametrize(
    ("base_class", "whole_class", "config"),
    [
        (SparseMistralModel, SparseMistralForCausalLM, SparseMistralConfig(**SHAPE, ffn_activation="drelu")),
        (SparseMixtralModel, SparseMixtralForCausalLM, SparseMixtralConfig(**SHAPE, ffn_activation="drelu")),
    ],
)
def test_a_base_model_computes_what_the_whole_model_does_below_its_head(
    base_class: type, whole_class: type, config: SparseMistralConfig
) -> None:
    whole = whole_class(config).eval()
    base = AutoModel.from_config(config).eval()
    assert type(base) is base_class
    base.load_state_dict(whole.model.state_dict())
    ids = torch.arange(3, 43)[None]
    recorded = [model(ids, output_hidden_states=True).hidden_states for model in (base, whole)]
    assert all(torch.equal(one, other) for one, other in zip(*recorded, strict=True))
    assert torch.equal(whole.lm_head(base(ids).last_hidden_state), whole(ids).logits)


@pytest.mark.parametrize(
    "model",
    [
        SparseMistralForCausalLM(SparseMistralConfig(**SHAPE, ffn_activation="drelu")),
        SparseMixtralForCausalLM(
            SparseMixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, ffn_activation="drelu")
        ),
    ],
    ids=["mistral", "mixtral"],
)
@pytest.mark.parametrize("attention", get_args(Attention))
@torch.no_grad()  # flex_attention has no gradient on a CPU
def test_no_logit_depends_on_another_document_of_the_sequence(model: torch.nn.Module, attention: str) -> None:
    torch.manual_seed(0)
    model.eval()
    model.set_attn_implementation(attention)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    first, other = torch.randint(0, 2048, (2, 1, 12))
    mixed = first.clone()
    mixed[:, :5], mixed[:, 8:] = (
        other[:, :5],
        other[:, 8:],
    )  # the neighbours change, the middle document stays
    before = model(first, position_ids=position_ids, use_cache=False).logits[:, 5:8]
    after = model(mixed, position_ids=position_ids, use_cache=False).logits[:, 5:8]
    alone = model(first[:, 5:8], use_cache=False).logits
    # Experts multiply their tokens together, so a neighbour may change the order of a sum, not more.
    torch.testing.assert_close(before, after, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(before, alone, atol=1e-5, rtol=1e-4)


def test_swapping_in_place_changes_every_layer_and_the_config() -> None:
    model = SparseMistralForCausalLM(SparseMistralConfig(**SHAPE)).eval()
    ids = torch.randint(0, 2048, (1, 8))
    dense = model(ids).logits
    model.set_ffn_activation("drelu")
    assert model.config.ffn_activation == "drelu"
    assert not torch.allclose(model(ids).logits, dense)
    model.set_ffn_activation("swiglu")
    assert torch.equal(model(ids).logits, dense)
