"""The activations' penalty: the published stages, what it is in dense blocks and experts, and that nothing is counted twice."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import RecipeError
from sparsify.methods.blending import blend
from sparsify.methods.penalty import PenaltyMeter, PenaltyRecord, stage_weight
from sparsify.models import SiteMask, SiteRule, SparseModel
from sparsify.plan.activation_memory import extra_neuron_values
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.sparsification import PenaltyStageSection
from sparsify.sparsity.probe import SparsityProbe

pytestmark = pytest.mark.usefixtures("one_rank")

IDS = torch.arange(60).view(2, 30)
LLAMA_7B = [(5000, 0.0), (6000, 5e-3), (10_000, 5e-2), (12_000, 5e-2), (16_000, 0.2), (16_500, 0.2)]
"""Last step and weight of ProSparse's stages for Llama-2-7B (arXiv 2402.13516)."""


def passed(
    model: SparseModel, gate_share: float, micro_batches: int = 1
) -> tuple[torch.Tensor, PenaltyRecord, list[torch.Tensor]]:
    """The summed penalty of the micro-batches, the step's record, and the gradients after a backward pass."""
    model.zero_grad()
    total = torch.zeros(())
    with PenaltyMeter(model, gate_share, IDS.device) as meter:
        for ids in IDS.chunk(micro_batches):
            model(ids, use_cache=False)
            penalty = meter.penalty()
            penalty.backward()
            total = total + penalty.detach()
        record = meter.reduce()
    return total, record, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_the_published_stages_step_by_step() -> None:
    stages = [PenaltyStageSection(step / 16_500, weight) for step, weight in LLAMA_7B]
    for start, (end, weight) in zip([0, *(step for step, _ in LLAMA_7B)], LLAMA_7B, strict=False):
        before = stage_weight(stages, start / 16_500)
        for step in (start, (start + end) // 2, (3 * start + end) // 4):
            x = (step - start) / (end - start)
            sine = 0.5 * (math.sin(-math.pi / 2 + math.pi * x) + 1)
            wanted = weight if start == 0 else before + sine * (weight - before)
            assert stage_weight(stages, step / 16_500) == pytest.approx(wanted, abs=1e-12)
    assert stage_weight(stages, 1.0) == 0.2


@pytest.mark.parametrize("experts", [None, "eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("gate_share", [0.0, 0.25])
def test_it_is_the_mean_of_what_fires(experts: str | None, gate_share: float, stock: dict[str, Path]) -> None:
    model = load_sparse(stock["mixtral" if experts else "mistral"], "drelu").train()
    if experts:
        model.config._experts_implementation = experts
    seen: dict[int, list[list[torch.Tensor]]] = {}
    for layer, block in enumerate(model.ffn_blocks()):
        block.ffn_activation.register_forward_hook(
            lambda a, inputs, product, layer=layer: seen.setdefault(layer, []).append(
                [product.detach(), a.gate_factor(inputs[0]).detach()]
            )
        )
    penalty, record, gradients = passed(model, gate_share)
    wanted = 0.0
    for calls in seen.values():
        products, gates = (torch.cat([c[i].flatten() for c in calls]) for i in (0, 1))
        wanted += (1 - gate_share) * products.abs().mean() + gate_share * gates.abs().mean()
    assert float(penalty) == pytest.approx(float(wanted), rel=1e-5)
    assert record.penalty == pytest.approx(float(wanted), rel=1e-5)
    assert any(gradient.any() for gradient in gradients)
    if experts:
        model.config._experts_implementation = "eager"
    with SparsityProbe(model) as probe, torch.no_grad():
        model(IDS, use_cache=False)
    assert record.zeros == pytest.approx(probe.statistics().zero_share("product"), abs=1e-4)
    assert record.gate_zeros == pytest.approx(probe.statistics().zero_share("gate"), abs=1e-4)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
@pytest.mark.parametrize("gate_share", [0.0, 0.5])
def test_activation_checkpointing_counts_nothing_twice(kind: str, gate_share: float, stock: dict[str, Path]) -> None:
    model = load_sparse(stock[kind], "drelu").train()
    penalty, record, gradients = passed(model, gate_share)
    model.activation_checkpointing_enable({"use_reentrant": False})
    again, same_record, same_gradients = passed(model, gate_share)
    assert torch.equal(penalty, again)
    assert record == same_record
    assert all(map(torch.equal, gradients, same_gradients))


def test_micro_batches_make_the_penalty_of_the_batch(stock: dict[str, Path]) -> None:
    model = load_sparse(stock["mistral"], "reglu").train()
    whole, record, gradients = passed(model, 0.5)
    parts, same_record, of_parts = passed(model, 0.5, micro_batches=2)
    assert float(parts) / 2 == pytest.approx(float(whole), rel=1e-5)
    assert same_record.penalty == pytest.approx(record.penalty, rel=1e-5)
    assert same_record.zeros == record.zeros
    for one, other in zip(gradients, of_parts, strict=True):
        torch.testing.assert_close(other / 2, one)


def test_a_model_outside_of_a_step_is_not_watched(stock: dict[str, Path]) -> None:
    model = load_sparse(stock["mistral"], "drelu")
    before = [len(block.ffn_activation._forward_hooks) for block in model.ffn_blocks()]
    passed(model, 0.5)
    assert [len(block.ffn_activation._forward_hooks) for block in model.ffn_blocks()] == before
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks


STAGES = "penalty.stages=[{until_budget_share:0.5,weight:0},{until_budget_share:1,weight:0.1}]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["blending.budget_share=1"], "blending.budget_share is 1"),
        (["blending.budget_share=-0.1"], "0 (replace at once) or above"),
        (["blending.budget_share=0.2", "model=quickstart_random"], "no activation is replaced"),
        (
            ["blending.budget_share=0.2", "conversion.calibration_tokens=16384"],
            "fitted the weights to drelu",
        ),
        (["penalty.target_zeros=0.9", "activation=swiglu"], "which is never exactly zero"),
        ([STAGES, "activation=swiglu"], "which is never exactly zero"),
        ([STAGES, "penalty.target_zeros=0.9"], "both set the penalty's weight"),
        (["penalty.target_zeros=1.2"], "Above 0 and below 1"),
        (["penalty.gate_share=0.5"], "would be ignored: there is no penalty"),
        (["penalty.gate_share=2", STAGES], "Allowed: 0 to 1"),
        (["penalty.stages=[{until_budget_share:0.5,weight:1}]"], "this one at 1"),
        (["penalty.stages=[{until_budget_share:1,weight:0}]"], "weight 0 throughout"),
        (["penalty.stages=[{until_budget_share:1,weight:-1}]"], "0 to 1,000,000."),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        compose_recipe("recovery/drelu", overrides)
    assert message in str(error.value)


def test_thresholds_let_a_dense_activation_be_pressed() -> None:
    conversion = ["conversion.calibration_tokens=16384", "conversion.target_zeros=0.5"]
    pressed = ["penalty.target_zeros=0.9", "activation=swiglu", "baseline.ffn_activation=null"]
    assert compose_recipe("recovery/drelu", conversion + pressed).penalty.target_zeros == 0.9


@pytest.mark.parametrize("name", ["drelu", "reglu"])
@pytest.mark.parametrize("setting", ["blending.budget_share", "penalty.gate_share"])
def test_the_plan_knows_what_it_keeps_for_the_backward_pass(name: str, setting: str, stock: dict[str, Path]) -> None:
    blends = setting.startswith("blending")
    overrides = [f"activation={name}", f"{setting}=0.5", *([] if blends else [STAGES])]
    recipe = compose_recipe("recovery/drelu", overrides)
    model = load_sparse(stock["mistral"], name).train()
    with PenaltyMeter(model, 0.0, IDS.device):
        before = kept_bytes(model)
    if blends:
        blend(model, recipe, 10_240)
    with PenaltyMeter(model, 0.0 if blends else 0.5, IDS.device):
        after = kept_bytes(model)
    config = model.config
    values = IDS.numel() * config.num_hidden_layers * config.intermediate_size
    extra = (after - before) / (4 * values)
    assert extra_neuron_values(recipe) - 1 <= extra <= extra_neuron_values(recipe) + 1e-6
    assert extra > 0


def kept_bytes(model: SparseModel) -> int:
    """Bytes of all storages that a forward pass keeps for its backward pass."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(IDS, use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_a_stored_mask_on_the_gate_counts_as_zeros_of_the_gate(kind: str, stock: dict[str, Path]) -> None:
    model = load_sparse(stock[kind], "swiglu").train()
    _, plain, _ = passed(model, 0.5)
    for block in model.ffn_blocks():
        experts = (len(block.gate_up_proj),) if kind == "mixtral" else ()
        mask = SiteMask(SiteRule(per="channel"), {"threshold": (*experts, model.config.intermediate_size)})
        mask.threshold.fill_(0.05)
        block.ffn_activation.gate_mask = mask
    _, masked, _ = passed(model, 0.5)
    assert plain.gate_zeros < 0.01
    assert 0.05 < masked.gate_zeros < 0.95
    assert masked.zeros == pytest.approx(masked.gate_zeros, abs=1e-6)
