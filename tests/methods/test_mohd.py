"""MoHD: upcycling, the balancing loss, runs of two ranks, the report, and who refuses such a model."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import ModelError, RecipeError, UserError
from sparsify.export.bundle import export
from sparsify.export.llamacpp.rules import check_holdable
from sparsify.methods.base import Upcycling, check_layers, method_of, methods, upcycling_of
from sparsify.methods.layerwise import LayerReader
from sparsify.methods.mohd import (
    ROUTER_DEVIATION,
    HiddenRouterMeter,
    Mohd,
    MohdSettings,
    balancing_loss,
    channel_order,
    routers_of,
)
from sparsify.methods.router import check_router
from sparsify.models.sparse_mohd import SparseMohdConfig, SparseMohdForCausalLM
from sparsify.plan import make_plan
from sparsify.predictors.inputs import BlockInputs
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.sparsification import UPCYCLINGS, ConversionSection
from sparsify.runtime import accelerate
from sparsify.sparsity.active_parameters import parameters_by_part
from sparsify.sparsity.measure import measure
from sparsify.sparsity.report import read_report, write_report
from tests.conftest import SHAPE, Setup
from tests.methods.conftest import Calibrate
from tests.ranks import prepare_run, records, run_ranks

IDS = torch.randint(3, 2000, (4, 24), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS, "position_ids": torch.arange(24).expand(4, -1)}]
PROGRAM = Path(__file__).with_name("objective_program.py")


def upcycled(source: Path, **settings: Any) -> SparseMohdForCausalLM:
    return Mohd(MohdSettings(**settings)).upcycle(load_sparse(source), BATCHES)


@pytest.mark.parametrize("kind", ["mistral", "llama"])
def test_at_full_activation_an_upcycled_model_is_the_dense_one(kind: str, family_stock: dict[str, Path]) -> None:
    dense = load_sparse(family_stock[kind])
    model = upcycled(family_stock[kind], active_sub_dimensions=16)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, atol=2e-5, rtol=1e-4)
    assert not torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight), "channels are sorted"


def test_channels_with_most_energy_are_shared_and_the_others_are_dealt_out() -> None:
    energy = torch.tensor([1.0, 8, 3, 7, 2, 6, 4, 5])
    config = SparseMohdConfig(
        **SHAPE | {"hidden_size": 8}, sub_dimensions=4, shared_sub_dimensions=1, active_sub_dimensions=2
    )
    assert channel_order(energy, config).tolist() == [1, 3, 5, 2, 7, 4, 6, 0]


def test_shared_channels_are_those_that_carry_the_energy(stock: dict[str, Path]) -> None:
    dense = load_sparse(stock["mistral"])
    loud = [5, 17, 29]
    with torch.no_grad():
        for layer in dense.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[loud] = 20.0
    model = Mohd(MohdSettings(sub_dimensions=8, shared_sub_dimensions=1, active_sub_dimensions=2)).upcycle(
        dense, BATCHES
    )
    assert int((model.model.layers[0].input_layernorm.weight[:4] == 20).sum()) == 3


def test_centroids_spread_tokens_and_gates_begin_near_one(stock: dict[str, Path]) -> None:
    model = upcycled(stock["mistral"])
    seen: list[torch.Tensor] = []
    for router in routers_of(model):
        router.register_forward_hook(lambda router, args, output: seen.append(output[2][..., router.shared :]))
    with torch.no_grad(), HiddenRouterMeter(model, model.device) as meter:
        model(IDS)
    assert [router.gate_scale for router in routers_of(model)] == ["mean"] * 4
    assert seen[0].square().mean((0, 1)).sqrt().tolist() == pytest.approx([ROUTER_DEVIATION] * 10, rel=0.01)
    assert float(seen[0].mean((0, 1)).abs().max()) < ROUTER_DEVIATION / 10, "no sub-dimension is ahead for all tokens"
    assert max(meter.record().load[0][0]) < 0.3


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(2, 7))
def test_the_balancing_loss_by_loops(seed: int, tokens: int, parts: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(tokens, parts, dtype=torch.float64)
    k = max(1, parts // 2)
    on = torch.zeros(tokens, parts, dtype=torch.bool).scatter(1, logits.topk(k).indices, True)
    shares = logits.softmax(-1)
    expected = parts * sum(
        sum(bool(on[t, i]) for t in range(tokens))
        / (tokens * k)
        * sum(float(shares[t, i]) for t in range(tokens))
        / tokens
        for i in range(parts)
    )
    assert float(balancing_loss(on, shares)) == pytest.approx(expected)
    even = torch.full_like(shares, 1 / parts)
    assert float(balancing_loss(on, even)) == pytest.approx(1.0)


def test_the_balancing_loss_evens_loads() -> None:
    torch.manual_seed(0)
    model = SparseMohdForCausalLM(SparseMohdConfig(**SHAPE))
    with torch.no_grad():  # what all tokens share makes some sub-dimensions the first choice of most
        model.model.embed_tokens.weight += 0.3 * torch.randn(32)
    optimizer = torch.optim.Adam([router.centroids.weight for router in routers_of(model)], lr=0.05)
    found = []
    for _ in range(80):
        with HiddenRouterMeter(model, model.device) as meter:
            model(IDS, use_cache=False)
            loss = meter.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        record = meter.record()
        found.append((max(max(load) for layer in record.load for load in layer), record.aux_loss))
    assert found[-1][0] < 0.8 * found[0][0]
    assert 0.9 < found[-1][1] < found[0][1]


@pytest.fixture(scope="module")
def folder(stock: dict[str, Path], mixture_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An upcycled checkpoint, as `sparsify convert --method mohd` writes it."""
    root = tmp_path_factory.mktemp("mohd")
    made = Calibrate(mixture_file, stock, root / "cache")("mistral", "swiglu", root / "made", method="mohd")
    stages = [stage.name for stage in made.calibration.stages]
    assert stages == ["dense", "mohd"]
    assert made.calibration.stages[1].loss == pytest.approx(made.calibration.stages[0].loss, rel=0.2)
    return made.folder


def test_full_activation_has_the_loss_of_the_dense_model(
    stock: dict[str, Path], mixture_file: Path, tmp_path: Path
) -> None:
    calibrate = Calibrate(mixture_file, stock, tmp_path / "cache")
    settings = {"method": "mohd", "method_settings": {"active_sub_dimensions": 16}}
    dense, made = calibrate("mistral", "swiglu", tmp_path / "made", **settings).calibration.stages
    assert made.loss == pytest.approx(dense.loss, rel=1e-6)


def test_an_upcycled_checkpoint_loads_with_transformers_alone_and_generates(folder: Path) -> None:
    program = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
ids = AutoTokenizer.from_pretrained({str(folder)!r})("import os", return_tensors="pt").input_ids
assert not any(name.split(".")[0] == "sparsify" for name in sys.modules)
print(model.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist())
"""
    result = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False, cwd=folder.parent
    )
    assert result.returncode == 0, result.stderr
    model = load_sparse(folder)
    ids = torch.tensor([json.loads(result.stdout.splitlines()[-1])])
    prompt = ids[:, :-5]
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), ids)


def test_the_report_says_where_tokens_go(folder: Path, tmp_path: Path) -> None:
    model = load_sparse(folder)
    batch = BATCHES[0] | {"labels": IDS}
    report, statistics = measure(model, [batch], name="it", text="a text")
    routing = report.hidden_routing
    assert routing is not None
    assert (routing.sub_dimensions, routing.shared, routing.active) == (16, 6, 8)
    assert [(row.layer, row.block) for row in routing.rows] == [
        (0, "attention"),
        (0, "ffn"),
        (1, "attention"),
        (1, "ffn"),
    ]
    for row in routing.rows:
        assert len(row.load) == 10
        assert sum(row.load) == pytest.approx(1, abs=1e-3)
        assert 1 <= row.unevenness <= 5
        assert 0 < row.entropy <= math.log(10)
    assert report.weight_density == pytest.approx(0.5)
    parts = {part.part: part for part in report.active_parameters.parts}
    assert parts["attention"].perfect_predictor == parts["attention"].total // 2
    assert parts["router"].total == 4 * 16 * 32
    assert parts["fusion"].total == 4 * 32 * (2 + 16)
    write_report(report, statistics, tmp_path / "report")
    assert (tmp_path / "report" / "hidden_routing.png").is_file()
    assert "load by sub-dimension and layer" in (tmp_path / "report" / "index.html").read_text()
    assert read_report(tmp_path / "report").hidden_routing == routing


def test_a_plan_counts_what_the_report_counts(folder: Path, recipe_file: Path) -> None:
    recipe = compose_recipe(str(recipe_file), [f"model.source={folder}", "activation=swiglu"])
    plan, model = make_plan(recipe), load_sparse(folder)
    parts = parameters_by_part(model)
    assert {part: getattr(plan.parameters, part) for part in ("router", "fusion", "attention")} == {
        part: parts[part] for part in ("router", "fusion", "attention")
    }
    assert plan.parameters.total == sum(parts.values()) == model.num_parameters()
    used = sum(parts[part] for part in ("attention", "gate", "up", "down", "fusion"))
    assert plan.active_parameters == plan.parameters.total - used // 2
    assert plan.flops_per_token - plan.active_flops_per_token == 6 * (used // 2)
    upcycling = compose_recipe(
        str(recipe_file), ["activation=swiglu", "conversion.method=mohd", "conversion.calibration_tokens=4096"]
    )
    assert make_plan(upcycling).parameters == plan.parameters


def _change(recipe: Recipe, case: str) -> None:
    recipe.activation.ffn_activation = "swiglu"
    recipe.engine.zero_stage = int(case[5])
    recipe.training.budget_tokens = 6 * recipe.step_tokens
    recipe.training.gradient_checkpointing = case == "mohd-1"
    recipe.training.router_aux_loss_coefficient = 0.5
    recipe.stability.underused_expert_steps = 2
    recipe.stability.underused_expert_load = 0.9
    recipe.checkpoint.every_tokens = recipe.eval.every_tokens = 1_000_000


@pytest.fixture(scope="module")
def runs(
    finished: Callable[[Setup], tuple[Path, dict]], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[str]], dict[str, Path]]:
    """Trains cases one after another in the same two processes."""
    whole, _ = finished(Setup("mistral", 1, 1, "fp32"))

    def train(cases: list[str]) -> dict[str, Path]:
        root = tmp_path_factory.mktemp("runs")
        for case in cases:
            run = prepare_run(whole, root / case, partial(_change, case=case))
            shutil.rmtree(run.initial)
            shutil.copytree(folder, run.initial)
        run_ranks(PROGRAM, [str(root / case) for case in cases])
        return {case: root / case for case in cases}

    return train


@pytest.fixture(scope="module")
def trained(runs: Any) -> dict[str, Path]:
    return runs(["mohd-3", "mohd-3-cut", "mohd-1"])


def steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in records(run) if line["kind"] == "train"]


def check_equal(one: Path, other: Path) -> None:
    for a, b in zip(steps(one), steps(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["hidden_router"]["aux_loss"] == pytest.approx(b["hidden_router"]["aux_loss"], rel=1e-3)
        for mine, theirs in zip(a["hidden_router"]["load"], b["hidden_router"]["load"], strict=True):
            for x, y in zip(mine, theirs, strict=True):
                assert x == pytest.approx(y, abs=0.01)


def test_a_step_says_where_its_tokens_went(trained: dict[str, Path]) -> None:
    lines = steps(trained["mohd-3"])
    assert len(lines) == 6
    for line in lines:
        found = line["hidden_router"]
        assert [len(load) for layer in found["load"] for load in layer] == [10] * 4
        assert all(sum(load) == pytest.approx(1, abs=1e-3) for layer in found["load"] for load in layer)
        assert found["aux_loss"] >= 0.99
        assert "router" not in line
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_sub_dimension_with_too_few_tokens_is_named(trained: dict[str, Path]) -> None:
    alarms = [line for line in records(trained["mohd-3"]) if line["kind"] == "underused_sub_dimension"]
    assert alarms
    assert alarms[0]["step"] == 2
    assert all(6 <= alarm["sub_dimension"] < 16 and alarm["load"] < 0.09 for alarm in alarms)


def test_a_run_that_was_cut_ends_with_the_same_bits(trained: dict[str, Path]) -> None:
    whole, cut = trained["mohd-3"], trained["mohd-3-cut"]
    assert len([line for line in records(cut) if line["kind"] == "checkpoint"]) == 2
    assert [(s["loss"], s["hidden_router"]) for s in steps(whole)] == [
        (s["loss"], s["hidden_router"]) for s in steps(cut)
    ]
    one, other = (load_file(run / "checkpoints" / "step-00000006" / "reference.safetensors") for run in (whole, cut))
    assert torch.equal(one["logits"], other["logits"])


def test_stages_and_checkpointing_change_nothing(trained: dict[str, Path]) -> None:
    check_equal(trained["mohd-1"], trained["mohd-3"])


@pytest.mark.slow
def test_other_stages_do_the_same(trained: dict[str, Path], runs: Any) -> None:
    others = runs(["mohd-0", "mohd-2"])
    for other in others.values():
        check_equal(trained["mohd-3"], other)


def test_an_export_gives_the_trained_logits_in_a_fresh_process(trained: dict[str, Path], tmp_path: Path) -> None:
    bundle = export(trained["mohd-3"], tmp_path / "bundle", ["import os"], 4)
    assert bundle.acceptance is not None
    assert bundle.acceptance.logits_difference == pytest.approx(0, abs=1e-5)
    assert (tmp_path / "bundle" / "sparse_mohd.py").is_file()
    assert json.loads((tmp_path / "bundle" / "config.json").read_text())["active_sub_dimensions"] == 8


def test_what_cannot_hold_it_refuses_it_by_name(folder: Path, recipe_file: Path) -> None:
    model = load_sparse(folder)
    with pytest.raises(ModelError, match=r"sparse_mohd, which has hidden-dimension routing.*goes through layers"):
        LayerReader(folder, None, torch.device("cpu"))
    with pytest.raises(ModelError, match="sparse_mohd, which has hidden-dimension routing"):
        BlockInputs(model, "normed")
    with pytest.raises(UserError, match="it is a sparse_mohd, which this export does not write"):
        check_holdable(model.config, "bf16", None)
    with pytest.raises(ModelError, match="makes no zeros"):
        accelerate(model)
    recipe = compose_recipe(
        str(recipe_file),
        [
            "activation=swiglu",
            "conversion.method=mohd",
            "conversion.calibration_tokens=512",
            "distillation.ffn_weight=1",
        ],
    )
    with pytest.raises(RecipeError, match=r"distillation\.ffn_weight is set, and a sparse_mohd"):
        check_layers(recipe, "sparse_mohd")
    check_layers(recipe, "sparse_mistral")
    recipe = compose_recipe(str(recipe_file), ["training.router_aux_loss_coefficient=1"])
    static = SparseMohdConfig(**SHAPE, active_sub_dimensions=6)
    with pytest.raises(RecipeError, match=r"router_aux_loss_coefficient is 1(\.0)?, but a sparse_mohd has no router"):
        check_router(recipe, static)
    check_router(recipe, model.config)


def test_zeros_of_its_neurons_are_skipped_in_decoding(folder: Path, compiled: None) -> None:
    model = load_sparse(folder, "drelu")
    with torch.no_grad():
        expected = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)
        handle = accelerate(model)
        assert torch.equal(model.generate(IDS[:1], max_new_tokens=6, do_sample=False), expected)
        assert 0 < sum(one.rows.up for one in handle.reads) < sum(one.offered for one in handle.reads)
        handle.remove()


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("mixtral", {}, "the model is sparse_mixtral"),
        ("mistral", {"sub_dimensions": 7}, "which does not divide hidden_size 32"),
        ("mistral", {"active_sub_dimensions": 3}, "no more can be shared than are active"),
    ],
)
def test_upcycling_that_cannot_be_is_refused_before_anything_is_written(
    kind: str, settings: dict[str, Any], reason: str, stock: dict[str, Path], mixture_file: Path, tmp_path: Path
) -> None:
    calibrate = Calibrate(mixture_file, stock, tmp_path / "cache")
    with pytest.raises(ModelError, match=reason):
        calibrate(kind, "swiglu", tmp_path / "made", method="mohd", method_settings=settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"refit": True}, "refit=true would be ignored: mohd reconstructs nothing"),
        ({"target_zeros": 0.5}, "mohd has no such setting"),
        ({"target_density": 0.5}, "mohd has no target_zeros"),
        ({"remainder": "constant"}, "mohd is not a mask"),
        ({"method_settings": {"sub_dimensions": 0}}, "sub_dimensions is 0"),
        ({"method_settings": {"gate_scale": "max"}}, "gate_scale is max"),
        ({"method_settings": {"parts": 16}}, "parts=16 would be ignored"),
    ],
)
def test_settings_of_the_method_are_checked(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError) as caught:
        method_of(ConversionSection(method="mohd", calibration_tokens=64, **section))
    assert reason in str(caught.value)


def test_recipes_know_which_methods_make_no_mask() -> None:
    assert {name for name, method in methods().items() if hasattr(method, "upcycle")} == set(UPCYCLINGS)
    section = ConversionSection(method="mohd", calibration_tokens=64)
    assert isinstance(upcycling_of(section), Upcycling)
    assert not section.makes_mask
