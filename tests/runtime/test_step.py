"""A native decoding step gives what the model's own forward gives, for every shape, cache and mask that it accepts."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from sparsify.models import (
    SparseMistralConfig,
    SparseMistralForCausalLM,
    SparseMixtralConfig,
    SparseMixtralForCausalLM,
)
from sparsify.models.masking import SITES
from sparsify.predictors import read_predictors, write_predictors
from sparsify.runtime import accelerate
from sparsify.runtime.step import PARTS_IN_TURN
from tests.predictors.untrained import random_predictors
from tests.runtime.blocks import EXTRAS, may_have


@pytest.fixture(autouse=True)
def _compiled(native: str) -> None:
    """Steps are those of the compiled kernels."""


def made(seed: int = 0, *, experts: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A small model of random weights; fields are those of its configuration."""
    shape: dict[str, Any] = {
        "vocab_size": 90,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "sliding_window": None,
        "ffn_activation": "drelu",
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    if experts:
        config: Any = SparseMixtralConfig(**shape | {"num_local_experts": experts} | fields)
        model: Any = SparseMixtralForCausalLM(config)
        config._experts_implementation = "eager"  # torch's grouped products take few shapes and no fp64
    else:
        model = SparseMistralForCausalLM(SparseMistralConfig(**shape | fields))
    fill_masks(model)
    return model.to(dtype).eval()


@torch.no_grad()
def fill_masks(model: Any) -> None:
    """Gives every mask and remainder numbers of its own, but not the whole vector."""
    for name, buffer in model.named_buffers():
        own = torch.rand_like(buffer)
        part = name.rpartition(".")[2]
        numbers = {
            "threshold": own * 0.2,
            "kept_share": own * 0.5 + 0.2,
            "dropped_mass": own * 0.3 + 0.1,
            "weight": own + 0.5,
        }
        if part in numbers:
            buffer.copy_(numbers[part])
        elif part.startswith("remainder"):
            buffer.copy_(own * 0.2 - 0.1)
        elif part == "basis":
            buffer.copy_(torch.linalg.qr(own - 0.5).Q)


@torch.no_grad()
def decoded(
    model: Any, batch: int, tokens: int, cache: Any = None, *, prompt: int = 5, mask: bool = False
) -> torch.Tensor:
    """Logits of `tokens` steps after a prompt. [batch, tokens, vocabulary]"""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (batch, prompt + tokens), generator=generator)
    seen = torch.ones_like(ids)
    for row in range(batch if mask else 0):
        seen[row, : row % prompt] = 0
    logits = []
    cache = model(
        ids[:, :prompt], attention_mask=seen[:, :prompt], past_key_values=cache, use_cache=True
    ).past_key_values
    for step in range(prompt, prompt + tokens):
        given = {"attention_mask": seen[:, : step + 1]} if mask else {}
        if mask:
            given["position_ids"] = (seen[:, : step + 1].sum(1, keepdim=True) - 1).clamp_min(0)
        output = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True, **given)
        logits.append(output.logits)
        cache = output.past_key_values
    return torch.cat(logits, 1)


def close(model: Any, expected: torch.Tensor, given: torch.Tensor, steps: int) -> None:
    assert given.dtype == expected.dtype
    torch.testing.assert_close(given, expected, rtol=2e-4, atol=2e-4 * expected.abs().max().item())
    assert model.forward.steps == steps


@settings(max_examples=60, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    head_dim=st.sampled_from([2, 6, 16, 20, 32]),
    hidden=st.sampled_from([8, 40, 64, 100]),
    neurons=st.integers(1, 90),
    experts=st.sampled_from([0, 0, 2, 5]),
    batch=st.integers(1, 8),
    window=st.sampled_from([None, None, 2, 4, 7]),
    activation=st.sampled_from(["drelu", "reglu", "relu2", "swiglu"]),
    sites=st.sets(st.sampled_from(SITES)),
    per=st.sampled_from(["layer", "channel"]),
    rule=st.sampled_from(["threshold", "top_k", "top_p"]),
    weighted=st.booleans(),
    extra=st.sampled_from(sorted(EXTRAS)),
    cache=st.sampled_from(["own", "plain", "static"]),
    mask=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
    tied=st.booleans(),
    seed=st.integers(0, 999),
)
def test_every_model_decodes_as_its_own_forward_does(
    kv_heads,
    group,
    head_dim,
    hidden,
    neurons,
    experts,
    batch,
    window,
    activation,
    sites,
    per,
    rule,
    weighted,
    extra,
    cache,
    mask,
    threads,
    tied,
    seed,
) -> None:
    if activation == "swiglu" and not sites & {"gate", "up", "inter"}:
        sites = {*sites, "inter"}
    sites = {site for site in sites if "." not in site or site.partition(".")[0] not in sites}
    masks = {}
    for site in sites:
        own = {"per": per} if rule == "threshold" else {"weighted": weighted}
        masks[site] = {"rule": rule} | own | (EXTRAS[extra] if may_have(site, extra) else {})
    model = made(
        seed,
        experts=experts,
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * group,
        head_dim=head_dim,
        hidden_size=hidden,
        intermediate_size=neurons,
        sliding_window=window,
        ffn_activation=activation,
        tie_word_embeddings=tied,
        **({"sparsification": {"method": "percentile", "sites": masks}} if masks else {}),
    ).double()

    def given() -> Any:
        if cache == "static" and window is None:
            return StaticCache(config=model.config, max_cache_len=16)
        return DynamicCache() if cache == "plain" else DynamicCache(config=model.config)

    # In fp64 first: at the edge of a threshold fp32 may round to either side, and such models say nothing.
    exact = decoded(model, batch, 6, given(), mask=mask)
    expected = decoded(model.float(), batch, 6, given(), mask=mask)
    assume(torch.allclose(exact.float(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()))
    accelerate(model, threads=threads)
    close(model, expected, decoded(model, batch, 6, given(), mask=mask), 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", [0, 4])
def test_half_precision_is_nearer_to_fp32_than_torch_is(dtype: torch.dtype, experts: int) -> None:
    model = made(experts=experts, dtype=dtype)
    own = decoded(model, 3, 8)
    accelerate(model)
    native = decoded(model, 3, 8)
    assert native.dtype == dtype
    exact = decoded(copy.deepcopy(model).float(), 3, 8)
    accelerate(model).remove()
    assert (native - exact).square().mean() <= 1.2 * (own - exact).square().mean()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 8},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "rope_theta": 5e5,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ],
)
def test_scaled_rotary_embeddings(rope: dict[str, Any]) -> None:
    model = made(rope_parameters=rope, max_position_embeddings=8)
    expected = decoded(model, 2, 8)
    accelerate(model)
    close(model, expected, decoded(model, 2, 8), 8)


def test_long_contexts_are_attended_to_in_chunks() -> None:
    model = made()
    expected = decoded(model, 2, 8, prompt=510, mask=True)
    accelerate(model)
    native = decoded(model, 2, 8, prompt=510, mask=True)
    close(model, expected, native, 8)
    accelerate(model, threads=2)
    assert torch.equal(decoded(model, 2, 8, prompt=510, mask=True), native)


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "do_sample": True, "top_k": 5},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "repetition_penalty": 1.3, "output_scores": True, "return_dict_in_generate": True},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
    ],
    ids=["beams", "sampled beams", "static", "scores", "prompt lookup"],
)
def test_generate_says_the_same(experts: int, options: dict[str, Any]) -> None:
    model = made(experts=experts)
    batch = 1 if "prompt_lookup_num_tokens" in options else 2
    ids = torch.tensor([[0, 0, 5, 6, 7, 5, 6], [8, 9, 10, 11, 12, 13, 14]])[-batch:]
    options = options | {"max_new_tokens": 12, "pad_token_id": 0, "attention_mask": (ids > 0).long()}

    def said() -> Any:
        torch.manual_seed(0)
        output = model.generate(ids, **options)
        return output if isinstance(output, torch.Tensor) else output.sequences

    expected = said()
    accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(said(), expected)
    assert model.forward.steps > 0


@torch.no_grad()
def test_a_cache_may_be_copied_cropped_and_continued_with_a_prompt() -> None:
    model, plain = made(), made()
    accelerate(model)
    ids = torch.arange(3, 23)[None]
    outputs = []
    for one in (plain, model):
        cache = one(ids[:, :6], use_cache=True).past_key_values
        for step in range(6, 10):
            one(ids[:, step : step + 1], past_key_values=cache)
        twin = copy.deepcopy(cache)
        logits = [one(ids[:, 10:11], past_key_values=cache).logits]
        logits += [one(ids[:, 15:16], past_key_values=twin).logits]
        cache.crop(-3)
        logits += [one(ids[:, 11:12], past_key_values=cache).logits, one(ids[:, 12:16], past_key_values=cache).logits]
        logits += [one(ids[:, 16:17], past_key_values=cache).logits, one(ids[:, 17:18], past_key_values=twin).logits]
        assert cache.get_seq_length() == 14
        assert twin.get_seq_length() == 12
        outputs.append(torch.cat(logits, 1))
    assert model.forward.steps == 9
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_buffer_of_a_cache_grows() -> None:
    model = made()
    expected = decoded(model, 1, 300, prompt=2)
    accelerate(model)
    close(model, expected, decoded(model, 1, 300, prompt=2), 300)


def test_the_number_of_threads_changes_no_bit() -> None:
    for experts in (0, 4):
        model = made(experts=experts, hidden_size=256, intermediate_size=704, dtype=torch.bfloat16)
        given = []
        for threads in (1, 2, 3):
            accelerate(model, threads=threads)
            given.append(decoded(model, 3, 4))
        assert torch.equal(given[0], given[1])
        assert torch.equal(given[0], given[2])


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("seen", ["normed", "residual"])
def test_predictors_choose_the_same_neurons_in_a_step_as_in_a_block(experts: int, seen: Any, tmp_path: Any) -> None:
    model = made(experts=experts)
    write_predictors(random_predictors(model, 0.5, seen, rank=8), tmp_path / "predictors")
    predictors = read_predictors(tmp_path / "predictors").for_decoding(model, "predictors")
    acceleration = accelerate(model, predictors=predictors)
    native = decoded(model, 3, 6)
    steps = [(one.tokens, one.bytes_read, one.rows.total, one.offered) for one in acceleration.reads]
    acceleration.reset()
    model.model.norm.register_forward_hook(lambda *_: None)  # a hook makes every call go through torch
    blocks = decoded(model, 3, 6)
    torch.testing.assert_close(native, blocks, rtol=1e-4, atol=1e-4)
    assert model.forward.steps == 6
    # The prompt of 15 tokens went the dense way in both.
    assert steps == [(one.tokens, one.bytes_read, one.rows.total, one.offered) for one in acceleration.reads]
    assert 0 < steps[0][2] < 3 * steps[0][3]


def test_what_a_step_cannot_compute_goes_through_torch_and_is_said_once() -> None:
    model = made()
    expected = decoded(model, 1, 3)
    accelerate(model)

    class Scaled(nn.Linear):
        """An adapter, as far as a step can tell."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(input)

    decoded(model, 1, 1)
    own = model.model.layers[1].self_attn.q_proj
    scaled = Scaled(*own.weight.T.shape, bias=False)
    scaled.weight = nn.Parameter(own.weight.detach() / 2)
    model.model.layers[1].self_attn.q_proj = scaled
    with pytest.warns(UserWarning, match="does not compute q_proj of layer 1, which is Scaled"):
        close(model, expected, decoded(model, 1, 3), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded(model, 1, 3)
    model.model.layers[1].self_attn.q_proj = own
    close(model, expected, decoded(model, 1, 3), 4)


def test_probes_and_requests_for_inner_states_go_through_torch() -> None:
    model = made()
    accelerate(model)
    cache = model(torch.arange(3, 8)[None], use_cache=True).past_key_values
    with torch.no_grad():
        output = model(torch.tensor([[9]]), past_key_values=cache, output_hidden_states=True)
        assert len(output.hidden_states) == 3
        labelled = model(torch.tensor([[9]]), past_key_values=cache, labels=torch.tensor([[9]]))
        assert labelled.loss is not None
        seen: list[Any] = []
        hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
        model(torch.tensor([[9]]), past_key_values=cache)
        assert seen
        hook.remove()
        assert model.forward.steps == 0
        model(torch.tensor([[9]]), past_key_values=cache)
        assert model.forward.steps == 1


@torch.no_grad()
def test_weights_that_change_are_seen_by_the_next_step() -> None:
    model = made()
    accelerate(model)
    decoded(model, 1, 2)
    for parameter in model.parameters():
        parameter.mul_(0.9)
    model.model.norm.weight = nn.Parameter(model.model.norm.weight * 1.5)
    fresh = copy.deepcopy(model)
    accelerate(fresh).remove()
    close(model, decoded(fresh, 1, 2), decoded(model, 1, 2), 4)


@torch.no_grad()
def test_in_the_middle_of_a_sequence_changes_are_seen_after_a_pause_or_a_few_steps(monkeypatch: Any) -> None:
    model = made()
    accelerate(model)
    ids = torch.randint(3, 90, (1, 40))
    weight = model.model.layers[1].mlp.up_proj.weight
    before = weight.clone()

    def run_through(change_at: int | None = None) -> list[torch.Tensor]:
        weight.copy_(before)
        cache, logits = None, []
        for place in range(40):
            if place == change_at:
                weight.mul_(1.5)
            output = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        return logits

    def seen_at(change_at: int | None = None) -> int:
        pairs = enumerate(zip(run_through(change_at), unchanged, strict=True))
        return next(place for place, (one, other) in pairs if not torch.equal(one, other))

    unchanged = run_through()
    monkeypatch.setattr("sparsify.runtime.step.PAUSE_SECONDS", 0.0)
    assert seen_at(20) == 20
    monkeypatch.setattr("sparsify.runtime.step.PAUSE_SECONDS", 60.0)
    assert 20 <= seen_at(20) < 20 + PARTS_IN_TURN
    model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert seen_at() == 0  # another sequence looks at everything


@pytest.mark.parametrize("window", [None, 6])
def test_layers_of_a_cache_show_what_was_computed(window: int | None) -> None:
    model = made(sliding_window=window)
    plain, ids = copy.deepcopy(model), torch.randint(3, 90, (2, 12))
    accelerate(model)
    with torch.no_grad():
        expected = plain(ids, use_cache=True).past_key_values
        cache = DynamicCache(config=model.config)
        for place in range(12):
            cache = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    unpickled = pickle.loads(pickle.dumps(cache))
    shown = cache.layers[0].keys
    assert shown is cache.layers[0].keys
    cache.crop(-3) if window is None else cache.reset()
    if window is None:
        assert type(cache.layers[0]) is DynamicLayer
        torch.testing.assert_close(cache.layers[1].values, expected.layers[1].values[:, :, :9])
    assert cache.get_seq_length() == (9 if window is None else 0)
    for other in (twin, unpickled):
        assert other.get_seq_length() == expected.get_seq_length() == 12
        for one, same in zip(other.layers, expected.layers, strict=True):
            assert isinstance(one, type(same))
            torch.testing.assert_close(one.keys, same.keys)
            torch.testing.assert_close(one.values, same.values)


def test_weights_of_several_dtypes_go_through_torch() -> None:
    model = made(dtype=torch.bfloat16)
    model.model.norm.float()
    model.lm_head.float()
    expected = decoded(model, 1, 2)
    accelerate(model)
    with pytest.warns(UserWarning, match=r"weights of several dtypes \(torch.bfloat16, torch.float32\)"):
        given = decoded(model, 1, 2)
    assert model.forward.steps == 0
    torch.testing.assert_close(given, expected, rtol=0.05, atol=0.05)


def test_tokens_that_the_model_does_not_have_are_torchs_error() -> None:
    model = made()
    accelerate(model)
    for token in (-1, 90):
        with torch.no_grad(), pytest.raises(IndexError):
            model(torch.tensor([[token]]))


def test_what_is_not_a_number_shows() -> None:
    model = made()
    accelerate(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[3, 4] = torch.nan
    assert decoded(model, 1, 1).isnan().all()


@pytest.mark.parametrize("experts", [0, 3])
def test_dense_steps_read_every_row_and_take_dense_models(experts: int) -> None:
    model = made(experts=experts, ffn_activation="swiglu")
    expected = decoded(model, 2, 5)
    acceleration = accelerate(model, dense=True)
    close(model, expected, decoded(model, 2, 5), 5)
    for reads in acceleration.reads:
        assert reads.rows.gate == reads.rows.up == reads.rows.down == reads.offered > 0
