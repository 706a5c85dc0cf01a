"""A rotated model computes what it did, and has no outliers left; what cannot be rotated is refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sparsify.conversion.architecture import sparse_config
from sparsify.conversion.convert import convert
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import RecipeError
from sparsify.methods.weights.rotation import check_rotation, rotate_checkpoint, turns_heads
from sparsify.models import SparseConfig
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection
from tests.conftest import FAMILY_STOCK

ROTATED = ("mistral", "mixtral", "llama", "qwen2", "qwen3", "qwen3_moe", "phi3")
BASE = "package:sparsify/assets/quickstart_base"


def held(source: str, to: Path) -> Path:
    convert(ModelSection(source=source), ActivationSection("swiglu"), to, seed=0, dtype=torch.float32)
    return to


def largest_difference(first: Path, second: Path, vocabulary: int = 2000) -> float:
    ids = torch.randint(3, vocabulary, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [load_sparse(one, dtype=torch.float32)(input_ids=ids).logits for one in (first, second)]
    return float((logits[0] - logits[1]).abs().max())


@pytest.mark.parametrize("kind", ROTATED)
def test_a_rotation_leaves_the_logits(kind: str, family_stock: dict[str, Path], tmp_path: Path) -> None:
    source = held(str(family_stock[kind]), tmp_path / "held")
    rotate_checkpoint(source, tmp_path / "rotated")
    assert largest_difference(source, tmp_path / "rotated") < 1e-4
    old, new = load_sparse(source), load_sparse(tmp_path / "rotated")
    assert not new.config.tie_word_embeddings
    for layer in new.model.layers:
        assert torch.equal(layer.input_layernorm.weight, torch.ones_like(layer.input_layernorm.weight))
    assert not torch.allclose(old.model.embed_tokens.weight.float(), new.model.embed_tokens.weight, atol=1e-3)


def test_a_rotation_leaves_the_logits_of_the_quickstarts_base_and_spreads_its_outliers(tmp_path: Path) -> None:
    source = held(BASE, tmp_path / "held")
    rotate_checkpoint(source, tmp_path / "rotated")
    assert largest_difference(source, tmp_path / "rotated") < 1e-4
    ids = torch.randint(3, 2000, (1, 64), generator=torch.Generator().manual_seed(1))
    peaks = []
    for folder in (source, tmp_path / "rotated"):
        model, seen = load_sparse(folder, dtype=torch.float32), []
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(input_ids=ids)
        rows = torch.cat(seen).flatten(0, 1)
        peaks.append(float((rows.abs().amax(1) / rows.square().mean(1).sqrt()).mean()))
    assert peaks[1] < peaks[0]


def test_masks_inside_the_block_stay(family_stock: dict[str, Path], tmp_path: Path) -> None:
    source = held(str(family_stock["mistral"]), tmp_path / "held")
    add_mask(source, {"inter": {"rule": "threshold", "per": "channel"}}, tmp_path / "masked", 0.2)
    check_rotation(config_of(tmp_path / "masked"), down=True)
    rotate_checkpoint(tmp_path / "masked", tmp_path / "rotated")
    assert largest_difference(tmp_path / "masked", tmp_path / "rotated") < 1e-4
    assert largest_difference(tmp_path / "masked", source) > 1e-2


def add_mask(source: Path, sites: dict[str, dict[str, object]], to: Path, threshold: float) -> None:
    model = load_sparse(source, dtype=torch.float32)
    config = sparse_config(model.config.to_dict() | {"sparsification": {"method": "own", "sites": sites}}, "swiglu", "")
    masked = type(model)(config)
    masked.load_state_dict(model.state_dict(), strict=False)
    for name, buffer in masked.named_buffers():
        if name.endswith("threshold"):
            buffer.fill_(threshold)
    shutil.copytree(source, to, ignore=shutil.ignore_patterns("*.safetensors*"))
    masked.save_pretrained(to)
    config_file = to / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"model_type": config.model_type}))


def config_of(folder: Path) -> SparseConfig:
    return load_sparse(folder).config


@pytest.mark.parametrize(
    ("kind", "reason"), [("olmo2", "without a norm"), ("olmo3", "without a norm"), ("gemma3_text", "behind its blocks")]
)
def test_families_with_norms_behind_blocks_are_refused(
    kind: str, reason: str, family_stock: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=reason):
        check_rotation(load_sparse(family_stock[kind]).config, down=False)


def test_every_family_is_rotated_or_refused(family_stock: dict[str, Path]) -> None:
    refused = {"olmo2", "olmo3", "gemma3_text"}
    assert set(FAMILY_STOCK) == {*ROTATED, *refused}


def test_sizes_and_masks_that_do_not_allow_it_are_refused(family_stock: dict[str, Path]) -> None:
    fields = load_sparse(family_stock["mistral"]).config.to_dict()
    odd = fields | {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16}
    with pytest.raises(RecipeError, match="hidden_size is 54"):
        check_rotation(sparse_config(odd, "swiglu", ""), down=False)
    neurons = sparse_config(fields | {"intermediate_size": 99}, "swiglu", "")
    check_rotation(neurons, down=False)
    with pytest.raises(RecipeError, match="number of neurons is 99"):
        check_rotation(neurons, down=True)
    rule = {"rule": "threshold", "per": "layer"}
    for site in ("attn_in", "ffn_in", "attn_out"):
        masked = sparse_config(fields | {"sparsification": {"method": "own", "sites": {site: rule}}}, "swiglu", "")
        with pytest.raises(RecipeError, match=site):
            check_rotation(masked, down=False)


def test_heads_are_mixed_only_where_their_number_allows_it(family_stock: dict[str, Path]) -> None:
    fields = load_sparse(family_stock["mistral"]).config.to_dict()
    nine = fields | {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    assert not turns_heads(sparse_config(nine, "swiglu", ""))
    assert turns_heads(sparse_config(fields | {"num_attention_heads": 4, "num_key_value_heads": 2}, "swiglu", ""))
