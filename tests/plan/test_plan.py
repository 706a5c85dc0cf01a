"""The plan's arithmetic, held against the models themselves and against published numbers."""

from __future__ import annotations

import io
import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

from sparsify.commands.plan import Assumptions, plan
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import ModelError, RecipeError, StorageError
from sparsify.mixture.inspection import open_mixture
from sparsify.models import ACTIVATIONS, FAMILIES, SparseMistralConfig, SparseMixtralConfig
from sparsify.plan import make_plan, plan_table
from sparsify.plan.activation_memory import layer_activation_bytes
from sparsify.plan.chart import draw_shares, write_chart
from sparsify.plan.estimate import architecture_of
from sparsify.plan.parameters import Architecture
from sparsify.recipe.catalogue import recipe_names
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.recipe import Recipe
from sparsify.reporting.plotting import LIGHT

GPU_BYTES = 80 * 10**9
FP32_ZERO0 = ["training.precision=fp32", "engine=zero0"]


@cache
def composed(name: str, *overrides: str) -> Recipe:
    """One composing for all tests that only read the recipe."""
    return compose_recipe(name, overrides)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_plan_that_prints(name: str) -> None:
    plan = make_plan(composed(name))
    out = io.StringIO()
    Console(file=out, width=100).print(plan_table(plan))
    assert f"{plan.parameters.total:,}" in out.getvalue()
    assert all(source in out.getvalue() for source in plan.sources)
    dumped = plan.model_dump()
    assert dumped["device"]["total"] == plan.device.total
    assert dumped["disk_bytes"] == plan.disk_bytes


def test_checkpoints_kept_for_good_are_on_the_disk(recipe_file: Path) -> None:
    saving = ["training.budget_tokens=20480", "checkpoint.every_tokens=1024"]
    few = make_plan(compose_recipe(str(recipe_file), saving))
    many = make_plan(compose_recipe(str(recipe_file), [*saving, "checkpoint.keep_every_tokens=2048"]))
    assert few.disk_bytes == 3 * few.checkpoint_bytes
    # 20 are saved; the last two and one being written are counted already, of the 18 before them every other stays.
    assert many.disk_bytes == (3 + 9) * many.checkpoint_bytes
    with pytest.raises(RecipeError, match=r"Set checkpoint.keep_every_tokens=3072\."):
        compose_recipe(str(recipe_file), [*saving, "checkpoint.keep_every_tokens=2100"])


@pytest.mark.parametrize("experts", [None, 4])
@pytest.mark.parametrize("name", [name for name in recipe_names() if composed(name).model.architecture])
def test_parameters_are_those_of_transformers_own_model(name: str, experts: int | None) -> None:
    recipe = deepcopy(composed(name))
    fields = dict(recipe.model.architecture)
    if experts and fields["model_type"] == "mistral":
        recipe.model.upcycle_experts = experts
        fields |= {"model_type": "mixtral", "num_local_experts": experts}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    parameters = make_plan(recipe).parameters
    assert parameters.total - parameters.group_routers == model.num_parameters()


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("turbosparse_mistral_7b", 7.24e9, 7.24e9),  # arXiv 2310.06825
        ("turbosparse_mixtral_8x7b", 46.7e9, 12.9e9),  # arXiv 2401.04088: "47B", "13B active"
        # Numbers of parameters as the Hub counts the tensors of these models, and as their cards say.
        ("qwen3_4b", 4.02e9, 4.02e9),  # card: 4.0B, 3.6B without embeddings
        ("llama3_8b", 8.03e9, 8.03e9),  # card: 8B
        ("gemma3_4b", 3.88e9, 3.88e9),  # arXiv 2503.19786, Table 1: 675M of embeddings and 3,209M others
        ("olmo2_7b", 7.30e9, 7.30e9),  # card: 7B
        ("qwen3_30b_a3b", 30.53e9, 3.35e9),  # card: 30.5B, 3.3B active
    ],
)
def test_published_parameter_counts(name: str, total: float, active: float) -> None:
    plan = make_plan(composed(name))
    assert plan.parameters.total == pytest.approx(total, rel=2e-3)
    assert plan.active_parameters == pytest.approx(active, rel=2e-3)


def test_a_checkpoint_on_this_machine_counts_instead_of_the_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "carrier" / "model"
    folder.mkdir(parents=True)
    (tmp_path / "carrier" / "__init__.py").touch()
    fields = {**composed("quickstart_base").model.architecture, "vocab_size": 7, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(fields))
    monkeypatch.syspath_prepend(tmp_path)
    recipe = deepcopy(composed("turbosparse_mistral_7b"))
    for source in (str(folder), "package:carrier/model"):
        recipe.model.source = source
        assert make_plan(recipe).parameters.embeddings == 7 * fields["hidden_size"]
    recipe.model.source = "package:missing/model"
    assert make_plan(recipe).parameters.embeddings == 32_000 * 4096


def test_without_any_architecture_the_user_is_told_what_to_do() -> None:
    recipe = deepcopy(composed("turbosparse_mistral_7b"))
    recipe.model.architecture = {}
    with pytest.raises(RecipeError, match=r"how large mistralai/Mistral-7B-v0\.1 is") as caught:
        make_plan(recipe)
    assert "model.architecture" in str(caught.value)
    recipe.model.architecture = {"model_type": "mistral", "hidden_size": "wide"}
    with pytest.raises(ModelError, match="hidden_size is 'wide'"):
        make_plan(recipe)


def states(overrides: list[str]) -> float:
    """Bytes a parameter and process of weights, gradients and optimiser."""
    plan = make_plan(composed("turbosparse_mistral_7b", *overrides))
    device = plan.device
    kept = device.weights_bytes + device.gradients_bytes
    kept += device.master_weights_bytes + device.adam_moments_bytes
    return kept / plan.parameters.total


@pytest.mark.parametrize(
    ("overrides", "bytes_each"),
    [
        # ZeRO, arXiv 1910.02054, section 5, with fp32 gradients: 2 + 4 + 12 bytes over 8 processes
        # (and DeepSpeed's BF16_Optimizer, of stage 1, keeps a micro-batch's bf16 gradients as well)
        (["engine=zero1"], 2 + 6 + 12 / 8),
        (["engine=zero2"], 2 + (4 + 12) / 8),
        (["engine=zero3"], (2 + 4 + 12) / 8),
        (["engine=zero1", "launch.processes=1"], 2 + 6 + 12),
        (FP32_ZERO0, 4 + 4 + 8),
        (["engine=zero3_offload"], 0),
        (["engine=zero3_offload", "engine.offload_parameters_to_cpu=false"], 2 / 8),
    ],
)
def test_model_states_are_split_as_zero_says(overrides: list[str], bytes_each: float) -> None:
    assert states(overrides) == pytest.approx(bytes_each)


def test_what_is_offloaded_is_in_host_memory_instead() -> None:
    plan = make_plan(composed("turbosparse_mixtral_8x7b", "engine=zero3_offload"))
    assert plan.host.total == pytest.approx(16 * plan.parameters.total)
    assert make_plan(composed("turbosparse_mixtral_8x7b", "engine=zero3")).host.total == 0


def test_a_suite_under_zero_3_takes_the_weights_once_more() -> None:
    suite = "eval.suite=quick"
    plan = make_plan(composed("turbosparse_mixtral_8x7b", "engine=zero3", suite))
    assert plan.host.total == plan.host.suite_weights_bytes == 2 * plan.parameters.total
    assert make_plan(composed("turbosparse_mixtral_8x7b", "engine=zero2", suite)).host.total == 0


def test_the_turbosparse_recipes_fit_eight_gpus_and_only_as_they_are() -> None:
    assert make_plan(composed("turbosparse_mistral_7b")).device.total < 0.8 * GPU_BYTES
    assert make_plan(composed("turbosparse_mixtral_8x7b")).device.total < 0.8 * GPU_BYTES
    on_gpus = make_plan(composed("turbosparse_mixtral_8x7b", "engine=zero3"))
    assert on_gpus.device.total > GPU_BYTES


TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "sliding_window": None,
}


def kept_for_backward(model: torch.nn.Module, num_tokens: int, documents: int) -> int:
    """Bytes of all tensors that autograd keeps, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    positions = torch.arange(num_tokens)[None] % (num_tokens // documents)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        input_ids = torch.zeros(1, num_tokens, dtype=torch.long)
        output = model(input_ids=input_ids, position_ids=positions, use_cache=False)
    assert output.logits is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize(("documents", "thresholds"), [(1, True), (2, False)])
def test_activation_bytes_are_what_autograd_keeps(
    activation: str, dtype: torch.dtype, experts: bool, documents: int, thresholds: bool
) -> None:
    num_tokens = 128
    measured = {}
    for layers in (1, 3):
        fields = {**TINY, "num_hidden_layers": layers, "ffn_activation": activation}
        if thresholds:
            sites = {"inter": {"rule": "threshold", "per": "channel"}}
            fields["sparsification"] = {"method": "thresholds", "sites": sites}
        config = SparseMixtralConfig(num_local_experts=4, **fields) if experts else SparseMistralConfig(**fields)
        model = FAMILIES[config.model_type].model(config)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        measured[layers] = kept_for_backward(model, num_tokens, documents)
    per_token = (measured[3] - measured[1]) / 2 / num_tokens
    architecture = Architecture.of(config.to_dict(), None, 2)
    sequence = num_tokens if documents > 1 else None
    estimate = layer_activation_bytes(architecture, activation, dtype.itemsize, sequence, thresholds=thresholds)
    assert estimate == pytest.approx(per_token, rel=0.03)


def test_the_calibrated_swap_needs_memory_for_a_layer_and_disk_for_its_tokens() -> None:
    name, key = "turbosparse_mixtral_8x7b", "conversion.calibration_tokens"
    assert make_plan(composed(name, "conversion=bare")).calibration is None
    small, large = (make_plan(composed(name, f"{key}={size}")) for size in (100_000, 1_000_000))
    assert small.calibration
    assert large.calibration
    assert small.calibration.memory_bytes == large.calibration.memory_bytes
    assert large.calibration.memory_bytes < large.parameters.total  # 47 GB: one byte a parameter
    # One residual stream of a million tokens is 16 GB.
    more_disk = large.calibration.disk_bytes - small.calibration.disk_bytes
    assert more_disk == pytest.approx(6 * 0.9 * 16.4e9, rel=0.01)
    out = io.StringIO()
    Console(file=out, width=160).print(plan_table(large))
    assert "calibrated replacement" in out.getvalue()


def test_refits_need_a_gram_matrix_and_each_process_its_part_of_the_tokens() -> None:
    milestones = ["conversion=bare", "blending.budget_share=0.1", "blending.refit_milestones=8"]
    name = "turbosparse_mixtral_8x7b"
    assert make_plan(composed(name)).refits is None
    small, large = (
        make_plan(composed(name, *milestones, f"blending.refit_tokens={tokens}")) for tokens in (2**20, 2**24)
    )
    assert small.refits
    assert large.refits
    assert small.refits.memory_bytes > 8 * 2 * 14336**2  # its factor beside it, in fp64
    more = (2**24 - 2**20) // small.processes * 4096 * 2 * 3
    assert large.refits.memory_bytes - small.refits.memory_bytes == more
    out = io.StringIO()
    Console(file=out, width=200).print(plan_table(small))
    assert "8 of 1,048,576 tokens" in out.getvalue()


def test_gradient_checkpointing_keeps_less() -> None:
    overrides = ["training.gradient_checkpointing=false"]
    without = make_plan(composed("turbosparse_mistral_7b", *overrides)).device
    with_it = make_plan(composed("turbosparse_mistral_7b")).device
    assert with_it.activations_bytes < without.activations_bytes / 5


def test_steps_and_tokens_of_turbosparse() -> None:
    plan = make_plan(composed("turbosparse_mistral_7b"))
    assert plan.num_steps == 17_881
    assert plan.warmup_steps == 1000
    assert plan.accumulation_steps * plan.processes * 4 == 2048
    assert plan.num_sequences * 4096 == plan.num_tokens
    assert plan.sources["wanjuan_cc"].tokens == pytest.approx(0.7355 * 150e9, rel=1e-3)


RAMPED = """
name: ramped
sources:
  web: {files: [web.txt], token_share: 0.6}
  code: {files: [code.txt], token_share: 0.3, max_epochs: 4, when_exhausted: redistribute}
  chat: {files: [chat.jsonl], group: instruction, token_share: 0.1, max_epochs: 2}
phases:
  - {until_budget_share: 0.8, instruction_token_share: 0.02}
  - {until_budget_share: 1.0, instruction_token_share: 0.3, ramp: true}
"""


@pytest.fixture
def ramped(tmp_path: Path) -> Recipe:
    path = tmp_path / "ramped.yaml"
    path.write_text(RAMPED)
    return compose_recipe("smollm2_135m", [f"mixture={path}", "training.budget_tokens=20_480_000"])


def test_phases_and_limits_are_in_the_plan(ramped: Recipe) -> None:
    plan = make_plan(ramped)
    assert plan.sources["chat"].tokens == pytest.approx(
        (0.8 * 0.02 + 0.2 * (0.02 + 0.3) / 2) * plan.num_tokens, abs=plan.sequence_length
    )
    assert [phase.until_tokens for phase in plan.phases] == [16_384_000, 20_480_000]
    out = io.StringIO()
    Console(file=out, width=160).print(plan_table(plan))
    for words in (
        "4.80%: 2.00%, 2.00% → 30.00%; at most 2 epochs, more is refused",
        "at most 4 epochs, then the others take over",
        "until 80%", "16,384,000",
    ):  # fmt: skip
        assert words in out.getvalue()


def test_the_chart_shows_every_source_at_its_share(ramped: Recipe, tmp_path: Path) -> None:
    plan = make_plan(ramped)
    figure = draw_shares(plan, LIGHT)
    axes = figure.axes[0]
    labels = {text.get_text() for text in axes.texts}
    assert labels == {"web  65.3% → 46.7%", "code  32.7% → 23.3%", "chat  2.0% → 30.0%"}
    # In the middle of the ramp, chat reaches from 1 - 0.16 to the top.
    chat = axes.collections[-1].get_paths()[0]
    middle = (16_384_000 + 20_480_000) / 2
    assert chat.contains_point((middle, 0.85))
    assert not chat.contains_point((middle, 0.83))
    write_chart(plan, tmp_path / "mixture.png")
    assert (tmp_path / "mixture.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(StorageError, match=r"--chart mixture\.png"):
        write_chart(plan, tmp_path / "mixture.pdf")


@given(budget_tokens=st.integers(100_000, 10**12), share=st.floats(0, 1), sequence=st.integers(1, 512))
@settings(max_examples=25, deadline=None)
def test_every_token_has_a_source(budget_tokens: int, share: float, sequence: int) -> None:
    recipe = deepcopy(composed("smollm2_135m"))
    recipe.training.budget_tokens, recipe.training.sequence_length = budget_tokens, sequence
    recipe.mixture.instruction_token_share = share
    plan = make_plan(recipe)
    tokens = [source.tokens for source in plan.sources.values()]
    assert sum(tokens) == plan.num_tokens <= budget_tokens
    assert budget_tokens - plan.num_tokens < recipe.step_tokens
    assert min(tokens) >= 0


def test_what_cannot_be_converted_has_no_plan(tmp_path: Path) -> None:
    config = MistralConfig(hidden_act="gelu").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = composed("quickstart", f"model.source={tmp_path}", "model.init=pretrained")
    with pytest.raises(ModelError, match="hidden_act is 'gelu', not silu"):
        make_plan(recipe)


def test_thresholds_of_a_masked_source_are_in_the_plan(tmp_path: Path) -> None:
    """As many as the model has in its buffers; none if the recipe drops the mask."""
    sites = {"attn_in": {"rule": "threshold", "per": "layer"}, "inter": {"rule": "threshold", "per": "channel"}}
    mask = {"method": "thresholds", "sites": sites}
    config = SparseMistralConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=96, sparsification=mask)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        buffers = dict(FAMILIES["sparse_mistral"].model(config).named_buffers())
    expected = sum(value.numel() for name, value in buffers.items() if name.endswith("threshold"))
    assert expected > 2 * 96
    source = [f"model.source={tmp_path}", "model.init=pretrained", "training.precision=fp32"]
    assert make_plan(composed("quickstart", *source)).device.mask_bytes == 4 * expected
    assert not make_plan(composed("quickstart", *source, "conversion.drop_source_mask=true")).device.mask_bytes


def test_a_plan_warns_of_turns_that_the_chat_template_drops(
    recipe_file: Path, stock: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the source is in the cache: a plan itself reads no text."""
    turns = [{"role": role, "content": f"{role} words"} for role in ("system", "user", "assistant")]
    rows = [{"messages": [*turns[:2], {"role": "assistant", "content": f"answer {n}"}]} for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{% for m in messages if m['role'] != 'system' %}[{{ m['role'] }}] {{ m['content'] }}\\n{% endfor %}"
    source = {"files": [str(tmp_path / "chats.jsonl")], "token_share": 1.0, "group": "instruction"}
    source["messages_column"] = "messages"
    mixture = {"name": "chats", "chat_template": template, "sources": {"chats": source}}
    (tmp_path / "chats.yaml").write_text(json.dumps(mixture))
    overrides = [f"mixture={tmp_path / 'chats.yaml'}", f"cache_dir={tmp_path / 'cache'}"]
    recipe = compose_recipe(str(recipe_file), overrides)
    open_mixture(
        recipe.mixture,
        load_tokenizer(stock["mistral"]),
        train_tokens={"chats": 10**6},
        sequence_length=recipe.training.sequence_length,
        cache_dir=tmp_path / "cache",
    )
    plan(str(recipe_file), overrides, Assumptions(hardware="1xh100-80gb"))
    assert "chats: 40 rows, turns that the chat template drops: 40 system" in caplog.text


def test_a_plan_fills_in_what_a_llama_config_does_not_say(tmp_path: Path) -> None:
    # Of a Mistral, these would be 8 key-value heads and a context of 131,072.
    fields = {"model_type": "llama", "vocab_size": 2048, "hidden_size": 32, "num_attention_heads": 4}
    fields |= {"intermediate_size": 64, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    source = f"model.source={tmp_path}"
    assert architecture_of(compose_recipe("quickstart", [source])).num_key_value_heads == 4
    with pytest.raises(RecipeError, match=r"sequence_length is 4096.*\n.*2048"):
        architecture_of(compose_recipe("quickstart", [source, "training.sequence_length=4096"]))


def test_a_quantised_source_is_refused_by_the_plan_as_by_the_run(tmp_path: Path) -> None:
    fields = {**composed("quickstart_base").model.architecture, "quantisation": {"method": "rrs", "weight_bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=r"holds integers instead of weights.*by rrs"):
        make_plan(compose_recipe("quickstart", [f"model.source={tmp_path}"]))


def test_routers_of_groups_are_trained_parameters_of_the_plan(tmp_path: Path) -> None:
    """Of a conversion that makes them and of a source that has them, in dense blocks and in each expert; not buffers."""
    converted = make_plan(composed("quickstart_lte"))
    without = make_plan(composed("quickstart_topk"))
    routers = 4 * 40 * (256 + 1)  # layers, groups of 16 among 640 neurons, weights and a bias
    assert converted.parameters.group_routers == routers
    assert converted.parameters.total == without.parameters.total + routers
    assert converted.active_parameters == without.active_parameters + routers
    sites = {"group": {"rule": "router", "group_size": 8}}
    fields = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    config = SparseMixtralConfig(**fields, sparsification={"method": "lte", "sites": sites})
    config.save_pretrained(tmp_path)
    source = [f"model.source={tmp_path}", "model.init=pretrained", "training.precision=fp32"]
    plan = make_plan(composed("quickstart", *source))
    assert plan.parameters.group_routers == 2 * 4 * 12 * 65
    assert plan.device.mask_bytes == 4 * 2  # the thresholds
    with torch.device("meta"):
        model = FAMILIES["sparse_mixtral"].model(config)
    assert plan.parameters.total == sum(p.numel() for p in model.parameters())
