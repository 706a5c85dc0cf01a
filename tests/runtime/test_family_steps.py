"""A native decoding step holds what families differ in: where norms are and how they round, and how far each layer attends."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from sparsify.models import FAMILIES
from sparsify.runtime import accelerate
from tests.runtime.test_step import close, decoded

LAYERS = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
KINDS: dict[str, dict[str, Any]] = {
    "sparse_olmo2": {},
    "sparse_olmo3": LAYERS | {"sliding_window": 7},
    "sparse_gemma3_text": LAYERS | {"sliding_window": 7, "head_dim": 20, "query_pre_attn_scalar": 24},
    "sparse_qwen2": LAYERS | {"sliding_window": 7, "use_sliding_window": True},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _compiled(native: str) -> None:
    """Steps are those of the compiled kernels."""


def made(kind: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A small model of a family with random weights, its norms included."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 90,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "ffn_activation": "drelu",
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    family = FAMILIES[kind]
    model: Any = family.model(family.config(**shape | KINDS[kind] | fields))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.7, 0.3)
    return model.to(dtype).eval()


@EVERY_KIND
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_family_decodes_as_its_own_forward_does(kind: str, batch: int, threads: int) -> None:
    model = made(kind)
    for cache in (None, DynamicCache()):  # with a window of its own for each layer, and with all positions in each
        expected = decoded(model, batch, 14, copy.deepcopy(cache), mask=batch > 1)
        handle = accelerate(model, threads=threads)
        close(model, expected, decoded(model, batch, 14, cache, mask=batch > 1), 14)
        handle.remove()


@EVERY_KIND
def test_half_precision_is_nearer_to_fp32_than_torch_is(kind: str) -> None:
    model = made(kind, torch.bfloat16)
    own = decoded(model, 3, 8)
    accelerate(model)
    native = decoded(model, 3, 8)
    exact = decoded(copy.deepcopy(model).float(), 3, 8)
    assert model.forward.steps == 8
    assert (native - exact).square().mean() <= 1.2 * (own - exact).square().mean()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sparse_olmo3", "sparse_gemma3_text"])
def test_a_cache_of_two_kinds_of_layers_may_be_copied_and_continued_with_a_prompt(kind: str) -> None:
    model, plain = made(kind), made(kind)
    accelerate(model)
    ids = torch.arange(3, 40)[None]
    outputs = []
    for one in (plain, model):
        cache = one(ids[:, :6], use_cache=True).past_key_values
        for step in range(6, 12):
            one(ids[:, step : step + 1], past_key_values=cache)
        twin = copy.deepcopy(cache)
        logits = [one(ids[:, 12:13], past_key_values=cache).logits, one(ids[:, 20:21], past_key_values=twin).logits]
        logits += [one(ids[:, 13:17], past_key_values=cache).logits, one(ids[:, 17:18], past_key_values=cache).logits]
        logits += [one(ids[:, 21:22], past_key_values=twin).logits]
        assert cache.get_seq_length() == 18
        assert twin.get_seq_length() == 14
        outputs.append(torch.cat(logits, 1))
    assert model.forward.steps == 10
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_rotary_embeddings_of_their_own_for_each_kind_of_layer() -> None:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
    }
    model = made("sparse_gemma3_text", rope_parameters=rope, max_position_embeddings=8)
    expected = decoded(model, 2, 8)
    accelerate(model)
    close(model, expected, decoded(model, 2, 8), 8)


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("sparse_gemma3_text", {"final_logit_softcapping": 20.0}, "softcapped"),
        ("sparse_gemma3_text", {"attn_logit_softcapping": 20.0}, "softcapped"),
    ],
)
def test_what_the_kernels_do_not_compute_goes_through_torch_and_is_said(kind: str, fields: Any, said: str) -> None:
    model = made(kind, **fields)
    expected = decoded(model, 1, 3)
    accelerate(model)
    with pytest.warns(UserWarning, match=f"does not compute {said}"):
        close(model, expected, decoded(model, 1, 3), 0)


def test_a_static_cache_of_two_kinds_of_layers_goes_through_torch_and_is_said() -> None:
    model = made("sparse_olmo3")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    expected = model.generate(torch.arange(3, 9)[None], **options)
    accelerate(model)
    with pytest.warns(UserWarning, match="does not compute a cache of StaticLayer, StaticSlidingWindowLayer"):
        assert torch.equal(model.generate(torch.arange(3, 9)[None], **options), expected)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_blocks_of_a_family_give_nearly_the_same(weights: str) -> None:
    model = made("sparse_gemma3_text", hidden_size=64, intermediate_size=96)
    expected = decoded(model, 1, 10)
    accelerate(model, weights=weights)
    given = decoded(model, 1, 10)
    assert model.forward.steps == 10
    error = float((given - expected).norm() / expected.norm())
    assert 0 < error < {"int8": 0.03, "int4": 0.35}[weights]
