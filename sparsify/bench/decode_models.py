"""Interleaved timing of a whole model that decodes the same tokens densely and sparsely, and where its time goes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sparsify.bench.decode_result import MODEL_VARIANTS, LayerRead, ModelPoint, Timing
from sparsify.bench.llamacpp import LlamaCpp, missing
from sparsify.bench.timing import OUT_OF_CACHE_BYTES, Clock, read_data
from sparsify.runtime import Acceleration, accelerate
from sparsify.runtime.accelerate import block_format, is_packed, model_bytes
from sparsify.runtime.native_step import Projections
from sparsify.runtime.step import StepForward
from sparsify.runtime.weights import LayerPredictors

WARM_UP_TOKENS = 2


@dataclass
class Variant:
    """One way to decode the same weights.

    Attributes:
        model: Its model; None for llama.cpp.
        acceleration: Handle of an accelerated model.
        llamacpp: The engine, if it is that.
        decode: Seconds per token of each repeat.
        prompt: Seconds for the prompt of each repeat.
        parts: Seconds per token by part of the model, summed over the repeats.
    """

    model: Any = None
    acceleration: Acceleration | None = None
    llamacpp: LlamaCpp | None = None
    decode: list[float] = field(default_factory=list)
    prompt: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)

    def run(self, ids: torch.Tensor, decode_tokens: int, counts: bool) -> None:
        """Decodes once; the first time only warms up."""
        if self.llamacpp is not None:
            prompt, seconds = self.llamacpp.decode(ids, decode_tokens, WARM_UP_TOKENS)
            parts: dict[str, float] = {}
        else:
            prompt, seconds, parts = _decode(self.model, self.acceleration, ids, decode_tokens)
        if not counts:
            return
        self.prompt.append(prompt)
        self.decode.append(seconds)
        if parts:
            parts |= {"overhead": max(0.0, seconds - sum(parts.values()))}
        for name, value in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + value

    def is_captured(self) -> bool:
        """Whether its last step was one CUDA graph."""
        return self.model is not None and getattr(self.model.forward, "captured", False)

    def bytes_read(self) -> float:
        """Bytes of weights that a token reads."""
        if self.llamacpp is not None:
            return self.llamacpp.bytes_read
        if self.acceleration is None:
            return model_bytes(self.model).total
        reads = self.acceleration.reads
        return self.acceleration.other_bytes + sum(one.bytes_read / max(one.tokens, 1) for one in reads)


def measure_model(
    model: Any,
    name: str,
    predictors: LayerPredictors | None,
    ids: torch.Tensor,
    decode_tokens: int,
    repeats: int,
    on_progress: Callable[[str], object],
    weights: str = "stored",
    *,
    llamacpp: bool = False,
) -> ModelPoint:
    """Decodes the last `decode_tokens` of `ids` [1, tokens] one by one with a model in several ways; the others are the prompt.

    The ways are torch, llama.cpp on request, our kernels reading every row, exactly, and with predictors; of sparse weights that can
    be packed, every row and exactly without the zeros in the weights, too. `weights` is the format of our kernels and llama.cpp's.
    The model stays accelerated.
    """
    variants = {"torch": Variant(dense_twin(model))}
    if ids.is_cuda:
        capture_steps(variants["torch"].model)
    with TemporaryDirectory() as folder:
        without = missing(model, weights) if llamacpp else "not requested"
        if without is None:
            on_progress(f"{name}: writing a file for llama.cpp")
            engine = LlamaCpp(variants["torch"].model, weights, torch.get_num_threads(), ids.shape[1], Path(folder))
            variants["llama.cpp"] = Variant(llamacpp=engine)
        exact = accelerate(model, weights=weights, packed=False)
        others: dict[str, dict[str, Any]] = {"dense": {"dense": True}}
        if is_packed(model, block_format(weights), dense=False):
            others |= {"packed": {"dense": True, "packed": True}, "both": {"packed": True}}
        if predictors is not None:
            others["predictor"] = {"predictors": predictors}
        made = {"exact": Variant(model, exact)}
        for key, options in others.items():
            twin = sharing(model)
            made[key] = Variant(twin, accelerate(twin, weights=weights, **options))
        variants |= {key: made[key] for key in MODEL_VARIANTS if key in made}
        reading: list[float] = []
        data = torch.ones(OUT_OF_CACHE_BYTES // 4, device=ids.device)
        clock = Clock(ids.device.type)
        for repeat in range(repeats + 1):
            for key, one in variants.items():
                on_progress(f"{name}: {key}, repeat {repeat} of {repeats}")
                one.run(ids, decode_tokens, repeat > 0)
            start = clock.mark()
            read_data(data, torch.get_num_threads())
            reading.append(clock.seconds(start, clock.mark()))
        for one in variants.values():
            if one.llamacpp is not None:
                one.llamacpp.close()
    reads = exact.reads
    return ModelPoint(
        model=name,
        weights=weights,
        without_llamacpp=without,
        dtype=str(model.dtype).removeprefix("torch."),
        layers=len(reads),
        prompt_tokens=ids.shape[1] - decode_tokens,
        threads=torch.get_num_threads(),
        active_share=sum(one.rows.down for one in reads) / sum(one.offered for one in reads),
        decode_seconds={key: Timing(seconds=one.decode) for key, one in variants.items()},
        prompt_seconds={key: Timing(seconds=one.prompt) for key, one in variants.items()},
        captured=[key for key, one in variants.items() if one.is_captured()],
        parts={key: {part: total / repeats for part, total in one.parts.items()} for key, one in variants.items()},
        bytes_read={key: one.bytes_read() for key, one in variants.items()},
        read_bytes_per_second=data.nbytes / median(reading[1:]),
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
    """A copy of the model that shares all memory except down_proj, whose memory layout the acceleration changes."""
    twin = sharing(model)
    for block in twin.ffn_blocks():
        down = block.down_proj if isinstance(block.down_proj, torch.nn.Parameter) else block.down_proj.weight
        down.data = down.data.clone()
    return twin


def capture_steps(model: Any) -> None:
    """Makes the decoding steps of a model CUDA graphs of torch's operators: the baseline of those of our kernels."""
    model.forward = StepForward(model, [], Projections(None), None)


def sharing(model: Any) -> Any:
    """A copy of the model whose parameters share its memory."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    kept = {}
    for module in (model, *model.ffn_blocks()):
        kept[module] = vars(module).pop("forward", None)
    twin = copy.deepcopy(model, memo)
    for module, forward in kept.items():
        if forward is not None:
            module.forward = forward
    # New parameters over the same memory, so that the layout of one can be changed. They keep requires_grad: without it torch copies
    # the output layer for a token that is a slice of a prompt.
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    twin.tie_weights()
    return twin


@torch.no_grad()
def _decode(
    model: Any, acceleration: Acceleration | None, ids: torch.Tensor, decode_tokens: int
) -> tuple[float, float, dict[str, float]]:
    """Seconds for the prompt, for one token, and for the parts of the model in one token.

    Native steps say where their time goes; of others on a CPU only the feed-forward blocks are known, by hooks that mark their calls.
    On a GPU a step is one CUDA graph, which has no parts.
    """
    clock = Clock(ids.device.type)
    native = acceleration is not None and acceleration.backend == "native"
    start = clock.mark()
    cache = model(ids[:, :-decode_tokens], use_cache=True, logits_to_keep=1).past_key_values
    prompt_seconds = clock.seconds(start, clock.mark())
    unmarked = native or ids.is_cuda
    with nullcontext([]) if unmarked else _marked_blocks(model, clock) as marks:
        for token in ids[0, -decode_tokens:][:WARM_UP_TOKENS]:
            cache = model(token.view(1, 1), past_key_values=cache, use_cache=True).past_key_values
        marks.clear()
        before: dict[str, float] = {}
        if acceleration is not None:
            acceleration.reset()
            before = acceleration.seconds or {}
        start = clock.mark()
        rest = ids[0, -decode_tokens:][WARM_UP_TOKENS:]
        for token in rest:
            cache = model(token.view(1, 1), past_key_values=cache, use_cache=True).past_key_values
        seconds = clock.seconds(start, clock.mark())
    if native and acceleration is not None and acceleration.seconds is not None:
        parts = {part: total - before[part] for part, total in acceleration.seconds.items()}
    elif ids.is_cuda:
        parts = {}
    else:
        parts = {"ffn": sum(clock.seconds(*pair) for pair in zip(marks[::2], marks[1::2], strict=True))}
    return prompt_seconds, seconds / len(rest), {part: total / len(rest) for part, total in parts.items()}


@contextmanager
def _marked_blocks(model: Any, clock: Clock) -> Iterator[list[Any]]:
    """Collects alternating marks of the start and the end of each block."""
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
