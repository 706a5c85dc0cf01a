"""Distillation: both terms against the formula, in dense blocks and experts, and that nothing is counted twice or by micro-batch."""

from __future__ import annotations

import io
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional

from sparsify.commands.run import train_run
from sparsify.commands.train import baseline_recipe
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import RecipeError
from sparsify.methods.blending import blend
from sparsify.methods.distillation import Distiller, Teacher, divergence
from sparsify.mixture.sequences.reader import NO_LOSS
from sparsify.models import SparseModel
from sparsify.plan import make_plan, plan_table
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.sparsification import DistillationSection
from sparsify.runs.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_rank")

WEIGHTS = DistillationSection(logits_weight=0.7, ffn_weight=0.3, squarehead_weight=0.2)
BOTH = ["distillation.logits_weight=1", "distillation.ffn_weight=1"]


def batch() -> dict[str, torch.Tensor]:
    """Four sequences of two documents each, with more labels in some than in others."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2048, (4, 24), generator=generator)
    labels = ids.roll(-1, 1)
    labels[:, 10] = NO_LOSS
    labels[2, 5:] = NO_LOSS
    positions = torch.cat([torch.arange(11), torch.arange(13)]).repeat(4, 1)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def teacher_of(folder: Path, settings: DistillationSection = WEIGHTS) -> Teacher:
    return Teacher(load_sparse(folder, "swiglu"), settings)


def student_of(folder: Path) -> SparseModel:
    return load_sparse(folder, "drelu").train()


def distilled(
    model: SparseModel,
    teacher: Teacher,
    settings: DistillationSection = WEIGHTS,
    micro_batches: int = 1,
) -> tuple[torch.Tensor, dict[str, float], list[torch.Tensor]]:
    """The summed loss of the micro-batches, the step's record, and the gradients after a backward pass."""
    model.zero_grad()
    whole, total = batch(), torch.zeros(())
    parts = [
        dict(zip(whole, tensors, strict=True))
        for tensors in zip(*(tensor.chunk(micro_batches) for tensor in whole.values()), strict=True)
    ]
    with Distiller(settings, teacher, model, torch.device("cpu")) as distiller:
        for tensors in parts:
            distiller.run_teacher(tensors)
            loss = distiller.loss(answer(model, tensors).logits)
            loss.backward()
            total = total + loss.detach()
        record = distiller.reduce()
    return total, record, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def answer(model: SparseModel, tensors: dict[str, torch.Tensor]) -> Any:
    asked = {key: tensors[key] for key in ("input_ids", "position_ids")}
    return model(**asked, use_cache=False)


def outputs_of(
    model: SparseModel, tensors: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Logits; what every feed-forward block adds to the residual stream; and the stream after every layer."""
    outputs: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    layers = model.model.layers
    handles = [layer.mlp.register_forward_hook(lambda *call: outputs.append(call[-1])) for layer in layers]
    handles += [layer.register_forward_hook(lambda *call: states.append(call[-1])) for layer in layers]
    logits = answer(model, tensors).logits
    for handle in handles:
        handle.remove()
    return logits, outputs, states


@pytest.mark.parametrize("experts", [None, "eager", "grouped_mm"])
@pytest.mark.parametrize("blended", [False, True])
def test_it_is_what_the_formula_says(experts: str | None, blended: bool, stock: dict[str, Path]) -> None:
    folder = stock["mixtral" if experts else "mistral"]
    student, dense, tensors = student_of(folder), load_sparse(folder, "swiglu"), batch()
    if experts:
        student.config._experts_implementation = experts
    if blended:
        blend(student, compose_recipe("recovery/drelu", ["blending.budget_share=0.5"]), 25_600)
    total, record, gradients = distilled(student, teacher_of(folder))

    student.zero_grad()
    logits, outputs, states = outputs_of(student, tensors)
    with torch.no_grad():
        wanted_logits, wanted, wanted_states = outputs_of(dense, tensors)
    nats = errors = distances = torch.zeros(())
    for sequence, token in (tensors["labels"] != NO_LOSS).nonzero().tolist():
        nats = nats + functional.kl_div(
            logits[sequence, token].log_softmax(0),
            wanted_logits[sequence, token].log_softmax(0),
            reduction="sum",
            log_target=True,
        )
        for own, other in zip(outputs, wanted, strict=True):
            missing = (own[sequence, token] - other[sequence, token]).norm() ** 2
            errors = errors + missing / other[sequence, token].norm() ** 2 / len(outputs)
    for sequence, counted in enumerate(tensors["labels"] != NO_LOSS):
        for own, other in zip(states, wanted_states, strict=True):
            one, two = own[sequence, counted], other[sequence, counted]
            distances = distances + len(one) * functional.mse_loss(one, two) / (two.square().mean() + 2**-7)
    expected = 0.7 * nats + 0.3 * errors + 0.2 * distances
    expected.backward()
    nats, errors, distances, expected = nats.detach(), errors.detach(), distances.detach(), expected.detach()
    labels = int((tensors["labels"] != NO_LOSS).sum())
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=0)
    assert record["logits"] == pytest.approx(float(nats) / labels, rel=1e-4)
    assert record["ffn"] == pytest.approx(float(errors) / labels, rel=1e-4)
    assert record["squarehead"] == pytest.approx(float(distances) / labels, rel=1e-4)
    assert record["added"] == pytest.approx(float(expected) / labels, rel=1e-4)
    own = [p.grad for p in student.parameters() if p.grad is not None]
    for gradient, other in zip(gradients, own, strict=True):
        torch.testing.assert_close(gradient, other, rtol=2e-3, atol=1e-5)


def test_the_divergence_s_gradient_is_exact_piece_by_piece() -> None:
    three_rows = 3 * 11
    torch.manual_seed(0)
    logits = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, 11, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda own: divergence(own, teacher, three_rows), logits)
    assert torch.equal(divergence(teacher, teacher, three_rows), torch.zeros(7, dtype=torch.float64))
    wanted = functional.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )
    torch.testing.assert_close(divergence(logits, teacher, three_rows), wanted)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_activation_checkpointing_counts_nothing_twice(kind: str, stock: dict[str, Path]) -> None:
    student, teacher = student_of(stock[kind]), teacher_of(stock[kind])
    total, record, gradients = distilled(student, teacher, micro_batches=2)
    student.activation_checkpointing_enable({"use_reentrant": False})
    again, same_record, same_gradients = distilled(student, teacher, micro_batches=2)
    assert torch.equal(total, again)
    assert record == same_record
    assert all(map(torch.equal, gradients, same_gradients))


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_every_label_weighs_the_same_in_any_micro_batch(kind: str, stock: dict[str, Path]) -> None:
    student, teacher = student_of(stock[kind]), teacher_of(stock[kind])
    total, record, gradients = distilled(student, teacher)
    of_parts, same_record, same_gradients = distilled(student, teacher, micro_batches=4)
    torch.testing.assert_close(total, of_parts)
    assert record == pytest.approx(same_record, rel=1e-5)
    for one, other in zip(gradients, same_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("key", ["logits_weight", "ffn_weight", "squarehead_weight"])
def test_a_term_without_a_weight_is_not_computed(key: str, stock: dict[str, Path]) -> None:
    settings = DistillationSection(**{key: 2.0})
    student, teacher = student_of(stock["mistral"]), teacher_of(stock["mistral"], settings)
    outputs = teacher.outputs(batch()["input_ids"], batch()["position_ids"])
    assert (outputs.logits is not None) == (key == "logits_weight")
    assert len(outputs.ffn_outputs) == (2 if key == "ffn_weight" else 0)
    assert len(outputs.states) == (2 if key == "squarehead_weight" else 0)
    _, record, _ = distilled(student, teacher, settings)
    name = key.removesuffix("_weight")
    assert record == {name: record[name], "added": pytest.approx(2 * record[name])}


def test_the_dense_model_is_no_distance_from_itself_and_never_changes(
    stock: dict[str, Path],
) -> None:
    model, teacher = load_sparse(stock["mistral"], "swiglu").train(), teacher_of(stock["mistral"])
    _, record, gradients = distilled(model, teacher)
    assert record["logits"] == pytest.approx(0, abs=1e-6)
    assert record["ffn"] == record["squarehead"] == 0
    assert max(gradient.abs().max() for gradient in gradients) < 1e-4
    assert not any(p.requires_grad or p.grad is not None for p in teacher._model.parameters())
    assert not teacher._model.training
    assert not any(layer.mlp._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distillation.logits_weight=-1"], "distillation.logits_weight is -1"),
        (["distillation.ffn_weight=inf"], "Allowed: 0 to 1,000,000."),
        (["distillation.ffn_weight=1", "model=quickstart_random"], "no dense model of this shape"),
        (["distillation.logits_weight=1", "+model.upcycle_experts=4"], "model.upcycle_experts=4"),
        (["distillation.ffn_weight=1", "training.compile=true"], "torch.compile bypasses them"),
        (["distillation.squarehead_weight=1", "training.compile=true"], "torch.compile bypasses them"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        compose_recipe("recovery/drelu", overrides)
    assert message in str(error.value)


def test_logits_can_be_distilled_through_compiled_layers() -> None:
    compiled = ["distillation.logits_weight=1", "training.compile=true"]
    assert compose_recipe("recovery/drelu", compiled).distillation.is_on


def test_a_model_is_not_distilled_from_itself(recipe_file: Path, mixture_file: Path, tmp_path: Path) -> None:
    overrides = ["activation=swiglu", f"mixture={mixture_file}", *BOTH]
    recipe = compose_recipe(str(recipe_file), overrides)
    with pytest.raises(RecipeError, match="has nothing to learn from itself"):
        train_run(recipe, RunFolder(tmp_path / "run"))


def test_the_dense_baseline_has_no_teacher(tmp_path: Path) -> None:
    recipe = compose_recipe("quickstart", BOTH)
    baseline = baseline_recipe(recipe, RunFolder(tmp_path))
    assert recipe.distillation.is_on
    assert baseline is not None
    assert not baseline.distillation.is_on


@pytest.mark.parametrize("stage", [1, 3])
def test_the_plan_states_what_the_teacher_takes(stage: int) -> None:
    name, engine = "turbosparse_mistral_7b", f"engine=zero{stage}"
    recipe = compose_recipe(name, [engine, *BOTH])
    plan, alone = make_plan(recipe), make_plan(compose_recipe(name, [engine]))
    tokens = plan.micro_batch_size * plan.sequence_length
    assert plan.device.teacher_weights_bytes == 2 * plan.parameters.total  # whole in each process
    outputs = 2 * tokens * 32 * 4096
    logits = 2 * tokens * 32_000 if plan.device.moment == "loss" else 0
    assert plan.device.teacher_outputs_bytes == outputs + logits
    assert alone.device.teacher_weights_bytes == alone.device.teacher_outputs_bytes == 0
    assert plan.cost.hours > alone.cost.hours
    out = io.StringIO()
    Console(file=out, width=160).print(plan_table(plan))
    assert "teacher weights" in out.getvalue()
    assert "teacher outputs" in out.getvalue()
    without_logits = deepcopy(recipe)
    without_logits.distillation.logits_weight = 0
    assert make_plan(without_logits).device.teacher_outputs_bytes == outputs
    without_logits.distillation.squarehead_weight = 1
    assert make_plan(without_logits).device.teacher_outputs_bytes == 2 * outputs
