"""Dense checkpoint → sparse-activated checkpoint: nothing but the activation changes, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from sparsify.conversion.convert import convert
from sparsify.conversion.layout import tensor_shapes
from sparsify.conversion.source_checkpoint import read_checkpoint
from sparsify.conversion.sparse_folder import check_activation, load_sparse
from sparsify.models import SparseMixtralForCausalLM
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection
from tests.conftest import STOCK, TOKENIZER, stock_model

IDS = torch.tensor([[1, 5, 9, 200, 77, 1031, 3, 2]])


def converted(source: Path, to: Path, activation: str = "drelu", **model: object) -> Path:
    section = ModelSection(source=str(source), **model)  # type: ignore[arg-type]
    return convert(section, ActivationSection(activation), to, seed=1, dtype=torch.float32).folder


@pytest.mark.parametrize("kind", list(STOCK))
def test_as_swiglu_the_logits_are_those_of_the_stock_model(kind: str, stock: dict[str, Path], tmp_path: Path) -> None:
    model = load_sparse(converted(stock[kind], tmp_path / "out", "swiglu"))
    torch.testing.assert_close(model(IDS).logits, stock_model(kind)(IDS).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", list(STOCK))
def test_as_drelu_every_block_applies_drelu_to_the_same_weights(
    kind: str, stock: dict[str, Path], tmp_path: Path
) -> None:
    folder = converted(stock[kind], tmp_path / "out")
    sparse, dense = load_sparse(folder), load_sparse(stock[kind])
    for (name, ours), (_, theirs) in zip(sparse.named_parameters(), dense.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not torch.allclose(sparse(IDS).logits, dense(IDS).logits)
    dense.set_ffn_activation("drelu")
    assert torch.equal(sparse(IDS).logits, dense(IDS).logits)
    assert json.loads((folder / "config.json").read_text())["model_type"].startswith("sparse_")


@pytest.mark.parametrize("kind", list(STOCK))
def test_tensor_shapes_are_those_that_transformers_writes(kind: str, stock: dict[str, Path]) -> None:
    from sparsify.conversion.architecture import sparse_config

    checkpoint = read_checkpoint(stock[kind])
    assert tensor_shapes(sparse_config(checkpoint.config, "drelu", kind)) == checkpoint.shapes


def test_sharded_checkpoints_convert_like_single_ones(tmp_path: Path) -> None:
    model = stock_model("mixtral")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")  # type: ignore[operator]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, tmp_path / "sharded")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    sparse = load_sparse(converted(tmp_path / "sharded", tmp_path / "out", "swiglu"))
    torch.testing.assert_close(sparse(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)


def test_derived_tensors_of_old_checkpoints_are_left_out(stock: dict[str, Path], tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(stock["llama"], old)
    tensors = load_file(old / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    sparse = load_sparse(converted(old, tmp_path / "out", "swiglu"))
    torch.testing.assert_close(sparse(IDS).logits, stock_model("llama")(IDS).logits, atol=1e-5, rtol=1e-4)


def test_upcycling_keeps_the_function(stock: dict[str, Path], tmp_path: Path) -> None:
    dense = load_sparse(converted(stock["mistral"], tmp_path / "dense"))
    mixture = load_sparse(converted(stock["mistral"], tmp_path / "moe", upcycle_experts=4, upcycle_experts_per_token=2))
    assert isinstance(mixture, SparseMixtralForCausalLM)
    torch.testing.assert_close(mixture(IDS).logits, dense(IDS).logits, atol=1e-5, rtol=1e-4)
    router = mixture.model.layers[0].mlp.gate.weight
    assert router.std() > 0


def test_stock_loading_of_a_sparse_checkpoint_fails_loudly(stock: dict[str, Path], tmp_path: Path) -> None:
    folder = converted(stock["mistral"], tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "sparse_mistral.SparseMistralForCausalLM"
    assert AutoConfig.from_pretrained(folder).model_type == "sparse_mistral"
    assert config["model_type"] not in ("mistral", "mixtral", "llama")


def test_a_patched_block_is_noticed(stock: dict[str, Path]) -> None:
    model = load_sparse(stock["mistral"], "drelu")
    check_activation(model, "drelu")
    with pytest.raises(RuntimeError, match="does not apply reglu"):
        check_activation(model, "reglu")
    model.model.layers[1].mlp.forward = lambda x: x  # what kernel libraries do to an instance
    with pytest.raises(RuntimeError, match="was patched"):
        check_activation(model, "drelu")
