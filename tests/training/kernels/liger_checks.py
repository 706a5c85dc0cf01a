"""What a model must do with Liger's kernels. tests/training/kernels/test_liger.py runs it, on the GPU or in Triton's interpreter.

It stands apart since Triton must be told to interpret before it is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
    apply_liger_kernel_to_mistral,
    apply_liger_kernel_to_mixtral,
)
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.models.mistral import modeling_mistral
from transformers.models.mixtral import modeling_mixtral

from scripts.validate_memory_plan import allocations
from sparsify.conversion.sparse_folder import check_activation, load_sparse
from sparsify.errors import RecipeError, RunError
from sparsify.mixture.sequences.reader import NO_LOSS
from sparsify.models import FAMILIES, SparseMistralConfig, SparseMixtralConfig, family_of
from sparsify.plan.activation_memory import layer_activation_bytes, liger_loss_bytes
from sparsify.plan.parameters import Architecture
from sparsify.recipe.compose import compose_recipe
from sparsify.training.kernels import liger_ops
from sparsify.training.kernels.liger import use_liger
from sparsify.training.validation import sequence_losses
from tests.conftest import FAMILY_STOCK, SHAPE
from tests.plan.test_plan import TINY, kept_for_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECIPE = compose_recipe("recovery/drelu", ["training.liger_kernels=true"])
PATCHES = {
    "mistral": (apply_liger_kernel_to_mistral, modeling_mistral, "MistralMLP"),
    "mixtral": (apply_liger_kernel_to_mixtral, modeling_mixtral, "MixtralExperts"),
}
on_cpu_only = pytest.mark.skipif(DEVICE == "cuda", reason="counts what a CPU allocates")


def batch() -> dict[str, torch.Tensor]:
    """Two sequences of two documents each; some positions have no label."""
    ids = torch.randint(0, 2048, (2, 4), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[0, 1:3] = labels[1, -1] = NO_LOSS
    tensors = {"ids": ids, "positions": (torch.arange(4) % 3).expand(2, 4), "labels": labels}
    return {key: value.to(DEVICE) for key, value in tensors.items()}


@pytest.mark.parametrize("kind", FAMILY_STOCK)
def test_losses_and_gradients_are_those_of_the_models_own_code(kind: str, family_stock: dict[str, Path]) -> None:
    has_experts = kind in ("mixtral", "qwen3_moe")
    given, options = batch(), {"output_router_logits": True} if has_experts else {}
    results = []
    for fused in (False, True):
        model = load_sparse(family_stock[kind], "drelu", torch.float32).to(DEVICE).train()
        if has_experts:
            model.activation_checkpointing_enable({"use_reentrant": False})

        def answer(model: nn.Module = model) -> torch.Tensor:
            return model(given["ids"], position_ids=given["positions"], **options)

        if fused:
            use_liger(model, RECIPE)
            with model.lm_head.loss_of(given["labels"]):
                output = answer()
            total, by_sequence = output.logits
        else:
            output = answer()
            by_sequence = sequence_losses(output.logits, given["labels"])
            total = by_sequence.sum()
        (total * 0.3 + sum(output[key] for key in ("aux_loss",) if key in output)).backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        with torch.no_grad():
            logits = answer(model.eval()).logits
        results.append((grads, by_sequence.detach(), logits))
    (plain, losses, logits), (liger, liger_losses, liger_logits) = results
    torch.testing.assert_close(liger_losses, losses, rtol=1e-6, atol=0)
    for name, grad in plain.items():
        error = (liger[name] - grad).abs().max() / grad.abs().max()
        assert error < 1e-5, name
    assert torch.equal(liger_logits, logits)  # evaluation runs the model's own code


@pytest.mark.parametrize("kind", PATCHES)
def test_guard_finds_ligers_own_patch_which_unsparsifies(
    kind: str, stock: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_family, module, name = PATCHES[kind]
    monkeypatch.setattr(module, name, getattr(module, name))  # the class is replaced as well
    model = load_sparse(stock[kind], "drelu", torch.float32).to(DEVICE)
    use_liger(model, RECIPE)
    check_activation(model, "drelu")
    others = ("rope", "cross_entropy", "fused_linear_cross_entropy", "rms_norm")
    patch_family(model=model, swiglu=True, **dict.fromkeys(others, False))
    with pytest.raises(RuntimeError, match="does not apply drelu"):
        check_activation(model, "drelu")


def test_no_other_model_changes_and_an_unknown_module_is_refused(stock: dict[str, Path]) -> None:
    model, other = (load_sparse(stock["mistral"], "drelu").to(DEVICE) for _ in range(2))
    before = [type(module) for module in other.modules()]
    rotary = modeling_mistral.apply_rotary_pos_emb
    use_liger(model, RECIPE)
    assert [type(module) for module in other.modules()] == before
    assert modeling_mistral.apply_rotary_pos_emb is rotary
    assert set(model.state_dict()) == set(other.state_dict())
    other.model.norm = nn.RMSNorm(32)
    with pytest.raises(RecipeError, match="kernels do not compute RMSNorm of a sparse_mistral"):
        use_liger(other, RECIPE)


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "its loss of a sparse_gemma3_text"),
        ("phi3", {"partial_rotary_factor": 0.5}, "rotary embeddings of a part of each head of a sparse_phi3"),
    ],
)
def test_what_a_family_may_do_and_no_kernel_computes_is_refused_by_name(kind: str, fields: Any, said: str) -> None:
    family = FAMILIES[f"sparse_{kind}"]
    model = family.model(family.config(**SHAPE | FAMILY_STOCK[kind] | fields)).to(DEVICE)
    before = [type(module) for module in model.modules()]
    with pytest.raises(RecipeError, match=said):
        use_liger(model, RECIPE)
    assert [type(module) for module in model.modules()] == before


def test_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger_ops, "rms_norm", lambda hidden, weight, *_: hidden * weight)
    with pytest.raises(RunError, match="kernel of the norm gives other values"):
        liger_ops.check_kernels.__wrapped__(DEVICE, torch.float32)


@on_cpu_only
@pytest.mark.parametrize("experts", [False, True])
def test_plan_knows_what_a_layer_keeps(experts: bool) -> None:
    num_tokens, measured = 8, {}
    for layers in (1, 2):
        fields = {**TINY, "num_hidden_layers": layers, "ffn_activation": "drelu"}
        config = SparseMixtralConfig(num_local_experts=4, **fields) if experts else SparseMistralConfig(**fields)
        model = family_of(config).model(config).train()
        use_liger(model, RECIPE)
        model.to(torch.bfloat16)  # of what comes out here, the interpreter has the sizes right, not the values
        measured[layers] = kept_for_backward(model, num_tokens, 2)
    architecture = Architecture.of(config.to_dict(), None, 2)
    estimate = layer_activation_bytes(architecture, "drelu", 2, num_tokens, liger=True)
    assert estimate == pytest.approx((measured[2] - measured[1]) / num_tokens, rel=0.03)


@on_cpu_only
@pytest.mark.parametrize(("vocabulary", "hidden"), [(512, 32), (150, 128)])
def test_plan_knows_what_the_loss_takes(vocabulary: int, hidden: int) -> None:
    states = torch.randn(2, 24, hidden, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, requires_grad=True)
    labels = torch.randint(0, vocabulary, (2, 24))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        liger_ops.linear_cross_entropy(states, weight, labels)
    assert profiler.profiler is not None
    events: Any = profiler.profiler.kineto_results
    live, peak = {}, 0
    for _, address, change in sorted(allocations(events.experimental_event_tree())):
        live.pop(address, 0)
        if change > 0:
            live[address] = change
        peak = max(peak, sum(live.values()))
    fields = {**TINY, "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": 1}
    architecture = Architecture.of(SparseMistralConfig(**fields).to_dict(), None, 2)
    assert liger_loss_bytes(architecture, 4, 48) == pytest.approx(peak, rel=0.03)
