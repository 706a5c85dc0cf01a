"""Every family of models does what any of them does: see FAMILY_STOCK for the checkpoints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.dataclasses import strict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteModel,
)

from sparsify.conversion.convert import UPCYCLED, convert
from sparsify.conversion.gguf_layout import LAYOUTS
from sparsify.conversion.layout import tensor_shapes
from sparsify.conversion.source_checkpoint import read_checkpoint
from sparsify.conversion.sparse_folder import load_sparse, write_config
from sparsify.conversion.tokenizer import copy_tokenizer
from sparsify.errors import ModelError
from sparsify.export.llamacpp.rules import architecture
from sparsify.export.powerinfer.rules import BAMBOO
from sparsify.models import FAMILIES, Family, SparseConfig, SparseModel
from sparsify.models.family import SparseDecoder, register
from sparsify.models.masking import has_experts
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection
from sparsify.runtime import accelerate
from sparsify.runtime.ffn import native_can
from sparsify.sparsity.probe import SparsityProbe
from sparsify.training.kernels.liger import fused_class
from tests.conftest import FAMILY_STOCK, SHAPE, TOKENIZER

IDS = torch.randint(3, 2000, (2, 40), generator=torch.Generator().manual_seed(0))
MASK = {
    "method": "thresholds",
    "sites": {"attn_in": {"rule": "threshold", "per": "layer"}, "inter": {"rule": "threshold", "per": "channel"}},
}
WINDOWED = tuple(kind for kind, fields in FAMILY_STOCK.items() if "sliding_window" in fields)
KINDS = pytest.mark.parametrize("kind", FAMILY_STOCK)


def family_of(kind: str) -> Family:
    return next(family for family in FAMILIES.values() if kind in family.stock)


def converted(source: Path, to: Path, activation: str) -> Path:
    section = ModelSection(source=str(source))
    return convert(section, ActivationSection(activation), to, seed=0, dtype=torch.float32).folder


def with_mask(folder: Path, to: Path) -> Path:
    """A copy of a sparse folder whose model stores thresholds on the attention's inputs and on products."""
    to.mkdir()
    model = load_sparse(folder)
    config = deepcopy(model.config)
    config.sparsification = MASK
    tensors = load_file(folder / "model.safetensors")
    fresh = {name: shape for name, shape in tensor_shapes(config).items() if name not in tensors}
    save_file(tensors | {name: torch.full(shape, 0.05) for name, shape in fresh.items()}, to / "model.safetensors")
    write_config(config, to, torch.float32)
    return to


@pytest.fixture(scope="session")
def drelu(family_stock: dict[str, Path], shared: Any) -> dict[str, Path]:
    """Every family's checkpoint as dReLU, and one with thresholds: by kind, and by kind with ` masked`."""

    def fill(root: Path) -> None:
        for kind, source in family_stock.items():
            with_mask(converted(source, root / kind, "drelu"), root / f"{kind} masked")

    root = shared("families_drelu", fill)
    return {folder.name: folder for folder in root.iterdir()}


@KINDS
def test_with_its_own_activation_a_checkpoint_computes_what_stock_transformers_does(
    kind: str, family_stock: dict[str, Path], tmp_path: Path
) -> None:
    source, family = family_stock[kind], family_of(kind)
    model = load_sparse(converted(source, tmp_path / "own", family.base_activation))
    expected = AutoModelForCausalLM.from_pretrained(source)(IDS).logits
    assert type(model) is family.model
    assert model.config.model_type == f"sparse_{kind}"
    assert read_checkpoint(tmp_path / "own").shapes == tensor_shapes(model.config)
    if family.fused:  # apart, products may be rounded otherwise
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(load_sparse(source)(IDS).logits, model(IDS).logits), "a stock folder itself"


@KINDS
def test_drelu_thresholds_and_masks_make_zeros(kind: str, drelu: dict[str, Path]) -> None:
    zeros = {}
    for name in (kind, f"{kind} masked"):
        model = load_sparse(drelu[name])
        assert model.config.ffn_activation == "drelu"
        with SparsityProbe(model) as probe, torch.no_grad():
            model(IDS)
        zeros[name] = float(probe.statistics().zero_share())
    assert 0.6 < zeros[kind] < zeros[f"{kind} masked"] < 1


@pytest.mark.parametrize("kind", [*FAMILY_STOCK, "softcapped"])
def test_packed_documents_do_not_see_each_other(kind: str, drelu: dict[str, Path], tmp_path: Path) -> None:
    """Documents are longer than sliding windows, which therefore take part."""
    folder = softcapped(drelu["gemma3_text"], tmp_path / "model") if kind == "softcapped" else drelu[kind]
    model = load_sparse(folder)
    if kind == "softcapped":
        model.set_attn_implementation("eager")  # of torch's, the one that caps scores
    first, second = IDS[:1, :30], IDS[1:, :28]
    both = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(30), torch.arange(28)])[None]
    with torch.no_grad():
        packed = model(both, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(first).logits, model(second).logits], 1)
        mixed = model(both, use_cache=False).logits
        if kind in (*WINDOWED, "softcapped"):
            model.config.sliding_window = 1000
            wide = model(first, use_cache=False).logits
            assert (wide - alone[:, :30]).abs().max() > 1e-3, "the window takes part"
    torch.testing.assert_close(packed, alone, atol=2e-4, rtol=1e-3)
    assert (mixed[:, 30:] - alone[:, 30:]).abs().max() > 1e-2


def softcapped(folder: Path, to: Path) -> Path:
    """A copy of a Gemma 3 whose scores and logits are capped where they are."""
    shutil.copytree(folder, to)
    fields = json.loads((to / "config.json").read_text())
    caps = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.0}
    (to / "config.json").write_text(json.dumps(fields | caps))
    return to


@KINDS
def test_two_training_steps_lower_the_loss_and_leave_the_mask(kind: str, drelu: dict[str, Path]) -> None:
    model = load_sparse(drelu[f"{kind} masked"]).train()
    model.activation_checkpointing_enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        losses.append(float(loss))
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@KINDS
def test_accelerated_greedy_text_is_that_of_the_dense_path(kind: str, drelu: dict[str, Path]) -> None:
    model, prompt = load_sparse(drelu[f"{kind} masked"]), IDS[:1, :20]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    expected = model.generate(prompt, **settings)
    handle = accelerate(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert model.generate(prompt, **settings).tolist() == expected.tolist()
    assert all(reads.tokens >= 11 for reads in handle.reads)
    assert handle.reads[0].touched_share < 1
    refused = [str(one.message) for one in said if "C++ does not compute" in str(one.message)]
    if native_can(model.model.embed_tokens.weight):
        assert not refused
        forward: Any = model.forward
        assert forward.steps == 11


OFFLINE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
found = []
for folder, ids in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    found.append(model(torch.tensor(ids), use_cache=False).logits[0, -1].tolist())
assert not [name for name in sys.modules if name.split(".")[0] == "sparsify"]
print(json.dumps(found))
"""


def offline_logits(given: list[tuple[Path, torch.Tensor]], cache: Path) -> list[torch.Tensor]:
    """Logits of the last of ids [1, tokens] by the model in each folder, which transformers alone loads in a fresh process."""
    asked = json.dumps([(str(folder), ids.tolist()) for folder, ids in given])
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"}
    command = [sys.executable, "-I", "-c", OFFLINE, asked]
    result = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [torch.tensor(one) for one in json.loads(result.stdout.splitlines()[-1])]


def test_bundles_of_all_families_load_offline_in_a_fresh_process(drelu: dict[str, Path], tmp_path: Path) -> None:
    folders = [drelu[f"{kind} masked"] for kind in FAMILY_STOCK]
    for folder, found in zip(folders, offline_logits([(one, IDS[:1]) for one in folders], tmp_path), strict=True):
        torch.testing.assert_close(found, load_sparse(folder)(IDS[:1]).logits[0, -1], msg=str(folder))


def test_the_language_model_of_a_checkpoint_with_images_is_read_alone(tmp_path: Path) -> None:
    text = SHAPE | FAMILY_STOCK["gemma3_text"] | {"vocab_size": 2064}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    both = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)).eval()  # type: ignore[arg-type]
    both.save_pretrained(tmp_path / "stock")
    copy_tokenizer(TOKENIZER, tmp_path / "stock")
    model = load_sparse(converted(tmp_path / "stock", tmp_path / "own", "geglu"))
    assert torch.equal(model(IDS).logits, both(IDS).logits)
    assert torch.equal(load_sparse(tmp_path / "stock")(IDS).logits, both(IDS).logits)


def test_a_family_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite is not one of ours: multipliers of embeddings, residuals, scores and logits, which stay transformers' own."""
    # Set before it is registered, so that it is taken out again after the test.
    monkeypatch.setitem(FAMILIES, SparseGraniteConfig.model_type, FAMILIES["sparse_llama"])
    register(Family(SparseGraniteForCausalLM, {"granite": GraniteConfig}))
    torch.manual_seed(0)
    stock = GraniteForCausalLM(GraniteConfig(**SHAPE, residual_multiplier=0.5, logits_scaling=2.0)).eval()  # type: ignore[arg-type]
    stock.save_pretrained(tmp_path / "stock")
    copy_tokenizer(TOKENIZER, tmp_path / "stock")
    model = load_sparse(converted(tmp_path / "stock", tmp_path / "own", "swiglu"))
    assert torch.equal(model(IDS).logits, stock(IDS).logits)
    sparse = load_sparse(converted(tmp_path / "stock", tmp_path / "sparse", "drelu"))
    with SparsityProbe(sparse) as probe, torch.no_grad():
        sparse(IDS)
    assert float(probe.statistics().zero_share()) > 0.6
    assert (tmp_path / "sparse" / Path(__file__).name).is_file(), "the export ships its file"


@strict
class SparseGraniteConfig(SparseConfig, GraniteConfig):
    model_type = "sparse_granite"


class SparseGraniteModel(SparseDecoder, GraniteModel):
    config_class = SparseGraniteConfig


class SparseGraniteForCausalLM(SparseModel, GraniteForCausalLM):
    config_class = SparseGraniteConfig
    decoder_class = SparseGraniteModel


@pytest.mark.parametrize(
    ("fields", "near"),
    [
        ({"model_type": "qwen3_next"}, "qwen3_moe"),
        ({"model_type": "mistral3"}, "mistral"),
        ({"model_type": "cohere2", "hidden_act": "silu"}, "llama"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "qwen3_moe"),
        ({"model_type": "glm-x", "hidden_act": "gelu"}, "gemma3_text"),
    ],
)
def test_an_unknown_architecture_is_told_the_nearest_one_and_the_file_to_add(
    fields: dict[str, Any], near: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    added = f"sparse_{fields['model_type'].replace('-', '_')}.py"
    with pytest.raises(ModelError) as refusal:
        load_sparse(tmp_path)
    assert f"The nearest that can is '{near}'." in str(refusal.value)
    assert f"add sparsify/models/{added}: a family is one file, like sparse_{near}.py." in str(refusal.value)


def test_layers_without_experts_are_refused_by_name(family_stock: dict[str, Path], tmp_path: Path) -> None:
    fields = json.loads((family_stock["qwen3_moe"] / "config.json").read_text()) | {"mlp_only_layers": [0]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").write_bytes((family_stock["qwen3_moe"] / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="mlp_only_layers"):
        load_sparse(tmp_path)


def test_the_documentation_says_what_holds_for_which_family(drelu: dict[str, Path]) -> None:
    """Columns that differ between families; what this file's other tests run holds for all of them."""
    lines = [
        "| `model_type` | GGUF source | C++ decoding step | Liger's kernels | upcycling | to llama.cpp | to PowerInfer |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in FAMILY_STOCK:
        model = load_sparse(drelu[kind])
        config = model.config
        dense = deepcopy(config)
        dense.ffn_activation = family_of(kind).base_activation
        accelerate(model)
        forward: Any = model.forward
        parts = [type(one) for one in model.modules() if type(one).__name__.endswith(("RMSNorm", "Attention"))]
        holds = [
            kind in {layout.model_type for layout in LAYOUTS},
            forward._model_refusal() is None,
            all(fused_class(one) for one in parts),
            config.model_type in UPCYCLED,
            architecture(dense) is not None,
            config.model_type in BAMBOO and not has_experts(config),
        ]
        lines.append(f"| `{kind}` | {' | '.join('yes' if one else '–' for one in holds)} |")
    table = "\n".join(lines)
    document = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text()
    assert table in document, f"\n{table}"
