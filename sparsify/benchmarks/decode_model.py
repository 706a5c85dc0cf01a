"""Whole models that decode the same tokens densely and sparsely, in turns: one of random weights, or a user's bundle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsify.benchmarks.clock import Clock
from sparsify.benchmarks.decode_ffn import SIGN
from sparsify.benchmarks.decode_result import LayerRead, ModelPoint, Timing
from sparsify.models import SparseMistralConfig, SparseMistralForCausalLM
from sparsify.runtime import Acceleration, accelerate
from sparsify.runtime.bytes import model_bytes
from sparsify.runtime.predictors import Predictors

WARM_UP_TOKENS = 2


def random_model(
    layers: int, active: float, gates: float, rank: int, dtype: torch.dtype
) -> tuple[Any, Predictors]:
    """Layers of Mistral-7B's shape with random weights, of which a set share fires for every token; and predictors.

    Channel 0 of the hidden states is far larger than the others, so that column 0 of a projection decides the signs.
    """
    config = SparseMistralConfig(
        num_hidden_layers=layers,
        ffn_activation="drelu",
        max_position_embeddings=4096,
        sliding_window=None,
        initializer_range=0.001,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: Any = SparseMistralForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.get_input_embeddings().weight.data[:, 0] = 100.0
    tensors = {}
    for layer, block in enumerate(model.ffn_blocks()):
        neurons = config.intermediate_size
        order = torch.randperm(neurons)
        for projection, share in ((block.gate_proj, gates), (block.up_proj, active)):
            column = torch.full((neurons,), -SIGN)
            column[order[: round(share * neurons)]] = SIGN
            projection.weight.data[:, 0] = column
        a = torch.rand(rank, config.hidden_size, dtype=dtype) * 1e-4
        a[0, 0] = 1.0
        b = torch.rand(neurons, rank, dtype=dtype) * 1e-4
        b[:, 0] = block.up_proj.weight.data[:, 0]
        tensors |= {f"layers.{layer}.A": a, f"layers.{layer}.B": b}
    return model, Predictors("normed", 0.0, tensors, None)


def measure_model(
    model: Any,
    name: str,
    predictors: Predictors | None,
    ids: torch.Tensor,
    decode_tokens: int,
    repeats: int,
    say: Callable[[str], object],
    weights: str = "stored",
) -> ModelPoint:
    """Feeds the same tokens to the model and to its accelerated self.

    Args:
        model: A sparse model. It is left accelerated.
        name: What to call it.
        predictors: Tried besides exact decoding if given.
        ids: Prompt and the tokens after it, [1, tokens].
        decode_tokens: How many of them are decoded one by one; the others are the prompt.
        repeats: Of everything.
        say: Told what happens.
        weights: How the accelerated ones read the feed-forward weights: stored, int8 or int4.
    """
    contenders: dict[str, Any] = {"torch": dense_twin(model)}
    accelerations = {"exact": accelerate(model, weights=weights)}
    contenders["exact"] = model
    if predictors is not None:
        contenders["predictor"] = predicting = _sharing(model)
        accelerations["predictor"] = accelerate(predicting, weights=weights, predictors=predictors)
    decode: dict[str, list[float]] = {key: [] for key in contenders}
    prompt: dict[str, list[float]] = {key: [] for key in contenders}
    outside = dict.fromkeys(contenders, 0.0)
    for repeat in range(repeats + 1):
        for key, one in contenders.items():
            say(f"{name}: {key}, repeat {repeat} of {repeats}")
            acceleration = accelerations.get(key)
            prompt_seconds, seconds, ffn = _decode(one, acceleration, ids, decode_tokens)
            if repeat:  # the first warms up
                prompt[key].append(prompt_seconds)
                decode[key].append(seconds)
                outside[key] += (1 - ffn / seconds) / repeats
    size = model_bytes(contenders["torch"])
    bytes_read = {"torch": size.total} | {
        key: size.other + sum(one.bytes_read / one.tokens for one in acceleration.reads)
        for key, acceleration in accelerations.items()
    }
    reads = accelerations["exact"].reads
    return ModelPoint(
        model=name,
        weights=weights,
        dtype=str(model.dtype).removeprefix("torch."),
        layers=len(reads),
        prompt_tokens=ids.shape[1] - decode_tokens,
        threads=torch.get_num_threads(),
        active_share=sum(one.rows.down for one in reads) / sum(one.offered for one in reads),
        decode_seconds={key: Timing(seconds=times) for key, times in decode.items()},
        prompt_seconds={key: Timing(seconds=times) for key, times in prompt.items()},
        outside_share=outside,
        bytes_read=bytes_read,
        reads=[
            LayerRead(
                layer=layer,
                fired_share=one.rows.down / one.offered,
                touched_share=one.touched_share,
            )
            for layer, one in enumerate(reads)
        ],
    )


def dense_twin(model: Any) -> Any:
    """The model as it is, beside the accelerated one: only down_proj, whose order in memory will change, is copied."""
    twin = _sharing(model)
    for block in twin.ffn_blocks():
        down = (
            block.down_proj
            if isinstance(block.down_proj, torch.nn.Parameter)
            else block.down_proj.weight
        )
        down.data = down.data.clone()
    return twin


def _sharing(model: Any) -> Any:
    """A copy whose parameters are the model's own memory."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    kept = {}
    for block in model.ffn_blocks():
        kept[block] = vars(block).pop("forward", None)
    twin = copy.deepcopy(model, memo)
    for block, forward in kept.items():
        if forward is not None:
            block.forward = forward
    for module in (
        twin.modules()
    ):  # parameters of its own over the same memory, so that one can be laid out anew
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.data, requires_grad=False)
    twin.tie_weights()
    return twin


@torch.no_grad()
def _decode(
    model: Any, acceleration: Acceleration | None, ids: torch.Tensor, decode_tokens: int
) -> tuple[float, float, float]:
    """Seconds of the prompt, of a token, and of a token's feed-forward blocks."""
    clock = Clock(ids.device.type)
    start = clock.mark()
    cache = model(ids[:, :-decode_tokens], use_cache=True).past_key_values
    prompt_seconds = clock.seconds(start, clock.mark())
    with _marked_blocks(model, clock) as marks:
        for token in ids[0, -decode_tokens:][:WARM_UP_TOKENS]:
            cache = model(token.view(1, 1), past_key_values=cache, use_cache=True).past_key_values
        marks.clear()
        if acceleration is not None:
            acceleration.reset()
        start = clock.mark()
        rest = ids[0, -decode_tokens:][WARM_UP_TOKENS:]
        for token in rest:
            cache = model(token.view(1, 1), past_key_values=cache, use_cache=True).past_key_values
        seconds = clock.seconds(start, clock.mark())
    inside = sum(clock.seconds(*pair) for pair in zip(marks[::2], marks[1::2], strict=True))
    return prompt_seconds, seconds / len(rest), inside / len(rest)


@contextmanager
def _marked_blocks(model: Any, clock: Clock) -> Iterator[list[Any]]:
    """Where each block starts and ends, in turns."""
    marks: list[Any] = []
    hooks = []
    for block in model.ffn_blocks():
        hooks.append(block.register_forward_pre_hook(lambda *_: marks.append(clock.mark())))
        hooks.append(block.register_forward_hook(lambda *_: marks.append(clock.mark())))
    try:
        yield marks
    finally:
        for hook in hooks:
            hook.remove()
