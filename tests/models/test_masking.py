"""Masks that a model stores: what they drop, where, and what old bundles and unknown rules do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparsify.conversion.layout import tensor_shapes
from sparsify.conversion.source_checkpoint import read_checkpoint
from sparsify.conversion.sparse_folder import load_sparse, write_config
from sparsify.conversion.tokenizer import copy_tokenizer
from sparsify.errors import ModelError
from sparsify.files import write_json
from sparsify.models import (
    FAMILIES,
    SITES,
    SiteMask,
    SiteRule,
    SparseMistralConfig,
    SparseMixtralConfig,
    SparseModel,
    mask_tensors,
)
from sparsify.models.masking import drop_small
from tests.conftest import SHAPE, TOKENIZER

IDS = torch.tensor([[1, 5, 9, 200, 77, 1031, 3, 2]])
CONFIGS: dict[str, Any] = {
    "mistral": SparseMistralConfig,
    "mixtral": lambda **fields: SparseMixtralConfig(**fields, num_local_experts=3, num_experts_per_tok=2),
}


def model_with(kind: str, sites: dict[str, str], threshold: float = 0.0) -> SparseModel:
    """A model of the same weights for every mask."""
    torch.manual_seed(0)
    stored = {site: {"rule": "threshold", "per": per} for site, per in sites.items()}
    sparsification = {"method": "test", "sites": stored} if sites else None
    config = CONFIGS[kind](**SHAPE, sparsification=sparsification)
    model = FAMILIES[config.model_type].model(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("threshold"):
            buffer.fill_(threshold)
    return model


def save(model: SparseModel, folder: Path) -> None:
    model.save_pretrained(folder)
    write_config(model.config, folder, model.dtype)
    copy_tokenizer(TOKENIZER, folder)


def test_nan_is_kept_ties_are_dropped_and_minus_infinity_keeps_every_bit() -> None:
    x = torch.tensor([[-0.0, 1.0, -2.0, torch.nan, 0.5]], requires_grad=True)
    dropped = drop_small(x, torch.tensor([1.0]))
    assert dropped[0, :3].tolist() == [0.0, 0.0, -2.0]
    assert dropped[0, 3].isnan()
    dropped[0, [0, 1, 2, 4]].sum().backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]
    kept = drop_small(x, torch.tensor([-torch.inf]))
    assert torch.equal(kept.view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_site_is_masked_and_share_0_is_bitwise_dense(kind: str, site: str, per: str) -> None:
    dense = model_with(kind, {})(IDS).logits
    open_mask = model_with(kind, {site: per}, -torch.inf)
    assert torch.equal(open_mask(IDS).logits, dense)
    closed = model_with(kind, {site: per}, 0.3)
    assert not torch.allclose(closed(IDS).logits, dense, atol=1e-6, rtol=0)
    # With all of it dropped, what depends on the site adds nothing to the stream.
    layer = closed.model.layers[0]
    outputs: list[torch.Tensor] = []
    part = layer.self_attn.o_proj if site.startswith("attn") else layer.mlp
    for name, buffer in closed.named_buffers():
        if name.endswith("threshold"):
            buffer.fill_(torch.inf)
    part.register_forward_hook(lambda _, __, output: outputs.append(output))
    closed(IDS)
    # Queries and keys of zero make every token attend to all before it.
    assert outputs[0].any() == (site in ("attn_in.q", "attn_in.k"))


VECTORS = arrays(np.float32, st.integers(1, 40), elements=st.floats(-4, 4, width=32))


@given(VECTORS, st.floats(0, 1, width=16))
def test_top_k_keeps_the_share_of_the_largest_and_top_p_the_fewest_that_make_up_the_mass(x: Any, share: float) -> None:
    values = torch.from_numpy(x)
    top_k = SiteMask(SiteRule(rule="top_k"), {"kept_share": (1,)}).put({"kept_share": torch.tensor([share])})
    count = min(len(x), max(1, round(share * len(x))))
    kept = top_k(values)
    assert torch.equal(
        kept.abs().sort(descending=True).values[:count], values.abs().sort(descending=True).values[:count]
    )
    assert not kept.abs().sort(descending=True).values[count:].any()
    assert torch.equal(kept[kept != 0], values[kept != 0])
    top_p = SiteMask(SiteRule(rule="top_p"), {"dropped_mass": (1,)}).put({"dropped_mass": torch.tensor([1 - share])})
    heavy = top_p(values).abs()
    total = values.abs().double().sum()
    assert heavy.double().sum() >= share * total - 1e-4
    if heavy.any() and share < 1:
        assert heavy.double().sum() - heavy[heavy > 0].min() <= share * total + 1e-4


def test_weights_decide_what_is_largest_nan_is_kept_and_a_share_of_1_keeps_every_bit() -> None:
    parts = {"kept_share": (1,), "weight": (3, 4)}
    mask = SiteMask(SiteRule(rule="top_k", weighted=True), parts)
    mask.put({"kept_share": torch.tensor([0.25]), "weight": torch.tensor([[1.0, 1, 1, 1], [9, 1, 1, 1], [1, 1, 0, 1]])})
    x = torch.tensor([[1.0, -2.0, 3.0, torch.nan]]).expand(3, -1)
    assert mask(x[:, :3].repeat(1, 2)[:, :4], torch.arange(3)).tolist() == [[0, 0, 3, 0], [1, 0, 0, 0], [0, -2, 0, 0]]
    assert mask(x, 0)[0, 3].isnan()
    whole = SiteMask(SiteRule(rule="top_k"), {"kept_share": (1,)})
    assert torch.equal(whole(x).view(torch.int32), x.contiguous().view(torch.int32))


@pytest.mark.parametrize("kind", CONFIGS)
def test_masks_are_stored_with_the_weights_and_survive_another_activation(kind: str, tmp_path: Path) -> None:
    shared = [site for site in SITES if "." not in site]
    sites = {site: "channel" if number % 2 else "layer" for number, site in enumerate(shared)}
    model = model_with(kind, sites)
    torch.manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("threshold"):
            buffer.uniform_(0.01, 0.1)
    save(model, tmp_path)
    assert read_checkpoint(tmp_path).shapes == tensor_shapes(model.config)
    loaded = load_sparse(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    before = dict(loaded.named_buffers())
    loaded.set_ffn_activation("reglu")
    after = dict(loaded.named_buffers())
    for parts in mask_tensors(model.config).values():
        for name, _ in parts.values():
            assert torch.equal(before[f"model.layers.0.{name}"], after[f"model.layers.0.{name}"])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_bundle_that_says_ffn_thresholds_means_the_same(kind: str, tmp_path: Path) -> None:
    model = model_with(kind, {"inter": "channel"})
    torch.manual_seed(1)
    for block in model.ffn_blocks():
        block.ffn_activation.threshold.uniform_(0.01, 0.1)
    save(model, tmp_path)
    config = read_checkpoint(tmp_path).config
    del config["sparsification"]
    write_json(tmp_path / "config.json", config | {"ffn_thresholds": "neuron"})
    loaded = load_sparse(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.config.sparsification["method"] == "thresholds"
    assert "ffn_thresholds" not in loaded.config.to_dict()
    write_json(tmp_path / "config.json", config | {"ffn_thresholds": "layer"})
    with pytest.raises(ModelError, match="ffn_thresholds is 'layer'"):
        load_sparse(tmp_path)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"elsewhere": {"rule": "threshold", "per": "layer"}}, "the site 'elsewhere'"),
        ({"inter": {"rule": "largest", "per": "layer"}}, "the rule 'largest'"),
        ({"attn_in": {}, "attn_in.q": {}}, "masks on attn_in.q and on attn_in"),
        ({"inter": {"rotated": True}}, "a rotation of inter"),
        ({"gate": {"remainder": "constant"}}, "a remainder at gate"),
        ({"ffn_in": {"remainder": "low_rank", "rank": 2}}, "a low-rank remainder at ffn_in"),
        ({"attn_out": {"remainder": "low_rank"}}, "a low_rank remainder of rank 0"),
        ({"gate": {"by_proxy": True}}, "proxies of gate"),
        ({"ffn_in.up": {}, "inter": {"by_proxy": True}}, "proxies of inter with a mask on ffn_in.up"),
        ({"inter": {"rule": "top_k", "per": "channel"}}, "top_k per channel"),
        ({"inter": {"weighted": True}}, "weighted thresholds"),
        ({"inter": {"rule": "threshold", "per": "token"}}, "the granularity 'token'"),
    ],
)
def test_what_the_model_does_not_apply_is_refused_by_name(sites: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(model_with("mistral", {}), tmp_path)
    config = read_checkpoint(tmp_path).config
    config["sparsification"] = {"method": "test", "sites": sites}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ModelError, match=message):
        load_sparse(tmp_path)
