"""Thresholds and gate thresholds survive an export: a fresh process reproduces the model's outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsify.conversion.layout import tensor_shapes
from sparsify.conversion.source_checkpoint import read_checkpoint
from sparsify.conversion.sparse_folder import load_sparse, write_config
from sparsify.conversion.tokenizer import copy_tokenizer
from sparsify.export.check import accept
from sparsify.models import FAMILIES, SparseMistralConfig, SparseMixtralConfig, SparseModel
from tests.conftest import SHAPE, TOKENIZER

FIELDS = SHAPE | {
    "ffn_activation": "fatrelu",
    "ffn_gate_threshold": 0.1,
    "ffn_thresholds": "neuron",
}
CONFIGS = {
    "mistral": SparseMistralConfig(**FIELDS),
    "mixtral": SparseMixtralConfig(**FIELDS, num_local_experts=3, num_experts_per_tok=2),
}
IDS = torch.tensor([[1, 5, 9, 200, 77, 1031, 3, 2]])


def written(kind: str, folder: Path) -> SparseModel:
    """A model with effective thresholds, saved like an export."""
    torch.manual_seed(0)
    model = FAMILIES[CONFIGS[kind].model_type].model(CONFIGS[kind]).eval()
    plain = model(IDS).logits
    for block in model.ffn_blocks():
        block.ffn_activation.threshold.uniform_(0.02, 0.2)
    assert not torch.allclose(model(IDS).logits, plain)
    model.save_pretrained(folder)
    write_config(model.config, folder, model.dtype)
    copy_tokenizer(TOKENIZER, folder)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_thresholds_are_stored_with_the_weights(kind: str, tmp_path: Path) -> None:
    model = written(kind, tmp_path)
    assert read_checkpoint(tmp_path).shapes == tensor_shapes(model.config)
    assert torch.equal(load_sparse(tmp_path)(IDS).logits, model(IDS).logits)


def test_a_fresh_process_applies_them_inside_fused_experts(tmp_path: Path) -> None:
    model = written("mixtral", tmp_path / "bundle")
    with torch.no_grad():
        reference = {"input_ids": IDS, "logits": model(IDS).logits.contiguous()}
    save_file(reference, tmp_path / "reference.safetensors")
    accepted = accept(tmp_path / "bundle", "fatrelu", ["fp32"], tmp_path / "reference.safetensors")
    assert accepted.logits_difference is not None
    assert accepted.logits_difference < 1e-6
