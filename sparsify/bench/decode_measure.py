"""Interleaved timing of dense and sparse decoding: of one feed-forward block with a given sparsity, and of whole models.

The variants are torch, our dense kernel, the exact sparse kernel, and the sparse kernel with a predictor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import linear

from sparsify.bench.decode_result import VARIANTS, FfnPoint, LayerRead, ModelPoint, Timing
from sparsify.bench.llamacpp import LlamaCpp, missing
from sparsify.bench.timing import Clock
from sparsify.models import ACTIVATIONS, SparseMistralConfig, SparseMistralForCausalLM
from sparsify.runtime import Acceleration, FfnWeights, Predictor, RowsRead, accelerate, sparse_ffn
from sparsify.runtime.accelerate import model_bytes
from sparsify.runtime.build import kernels
from sparsify.runtime.quantised import BlockFormat, BlockMatrix, quantise
from sparsify.runtime.weights import LayerPredictors, Matrix

DRELU = ACTIVATIONS["drelu"]
MIB = 1 << 20
OUT_OF_CACHE_BYTES = 256 * MIB
"""Size of the weights that one round reads, so that none of them are still in the cache."""
SIGN = 12.0
"""Magnitude of the entry that decides a pre-activation's sign, far above the random part."""


@dataclass
class Block:
    """A block in which column t of the projections decides which neurons fire for token t.

    Args:
        x: Hidden states, [tokens, hidden].
        gate, up: [neurons, hidden].
        down_t: [neurons, hidden], stored or in quantised blocks, for the kernels.
        down: [hidden, neurons], for the dense model.
        predictor: A perfect predictor.
    """

    x: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down_t: Matrix
    down: torch.Tensor
    predictor: Predictor

    def fire(self, active: float, gates: float, generator: torch.Generator) -> None:
        """Sets the share of neurons that fire for each token, and the share whose gate is positive."""
        neurons = self.gate.shape[0]
        for token in range(len(self.x)):
            order = torch.randperm(neurons, generator=generator)
            gate_on, both_on = torch.full((neurons,), -SIGN), torch.full((neurons,), -SIGN)
            gate_on[order[: round(gates * neurons)]] = SIGN
            both_on[order[: round(active * neurons)]] = SIGN
            self.gate[:, token] = gate_on
            self.up[:, token] = both_on
            self.predictor.b[:, token] = both_on

    def weights(self) -> FfnWeights:
        gate, up = self.gate, self.up
        if isinstance(self.down_t, BlockMatrix):
            gate, up = (quantise(one, self.down_t.format) for one in (gate, up))
        return FfnWeights(gate, up, self.down_t, predictor=self.predictor)


def make_blocks(
    hidden: int,
    neurons: int,
    rank: int,
    tokens: int,
    dtype: torch.dtype,
    format: BlockFormat | None = None,
    device: str = "cpu",
    out_of_cache_bytes: int = OUT_OF_CACHE_BYTES,
) -> list[Block]:
    """Blocks with random weights, `out_of_cache_bytes` of them; quantised for the kernels if `format` is given."""
    generator = torch.Generator().manual_seed(0)
    blocks = [_make_block(hidden, neurons, rank, tokens, dtype, format, generator, device)]
    size = 3 * blocks[0].down_t.nbytes
    while len(blocks) < round(out_of_cache_bytes / size):
        blocks.append(_make_block(hidden, neurons, rank, tokens, dtype, format, generator, device))
    return blocks


def _make_block(
    hidden: int,
    neurons: int,
    rank: int,
    tokens: int,
    dtype: torch.dtype,
    format: BlockFormat | None,
    generator: torch.Generator,
    device: str,
) -> Block:
    def uniform(
        *shape: int,
    ) -> torch.Tensor:  # cheaper than a normal distribution; preserves the variance of x
        return (torch.rand(*shape, generator=generator) - 0.5).to(dtype).mul_(3.4 / shape[1] ** 0.5)

    x = uniform(tokens, hidden) * hidden**0.5
    x[:, :tokens] = torch.eye(tokens)
    a = uniform(rank, hidden)
    a[:tokens] = 0.0
    a[:tokens, :tokens] = torch.eye(tokens)  # hidden unit t of the predictor detects token t
    x, a, b = x.to(device), a.to(device), uniform(neurons, rank).to(device)
    predictor = Predictor(a, b, threshold=0.0)
    gate, up, down_t = (uniform(neurons, hidden).to(device) for _ in range(3))
    read = down_t if format is None else quantise(down_t, format)
    return Block(x, gate, up, read, down_t.T.contiguous(), predictor)


def measure_point(
    blocks: Sequence[Block],
    active: float,
    gates: float,
    tokens: int,
    threads: int,
    repeats: int,
    out_of_cache_bytes: int = OUT_OF_CACHE_BYTES,
) -> FfnPoint:
    """Times all variants, interleaved, on the first `tokens` of each block's tokens."""
    generator = torch.Generator().manual_seed(1)
    device = blocks[0].x.device.type
    clock = Clock(device)
    data = torch.ones(out_of_cache_bytes // 4, device=device)
    for block in blocks:
        block.fire(active, gates, generator)
    predicted = [block.weights() for block in blocks]
    exact = [replace(weights, predictor=None) for weights in predicted]

    def sparse(index: int, weights: FfnWeights, dense: bool = False) -> RowsRead:
        x = blocks[index].x[:tokens]
        return sparse_ffn(x, weights, DRELU, dense=dense, threads=threads)[1]

    own: dict[str, Callable[[int], RowsRead]] = {
        "dense": lambda index: sparse(index, exact[index], dense=True),
        "exact": lambda index: sparse(index, exact[index]),
        "predictor": lambda index: sparse(index, predicted[index]),
    }
    weights = predicted[0]
    # torch reads the stored matrices, whatever the format of the kernels' weights.
    bytes_read = {"torch": 3 * blocks[0].gate.nbytes}
    bytes_read |= {name: run(0).total * weights.row_bytes for name, run in own.items()}
    bytes_read["predictor"] += -(-tokens // 8) * weights.predictor_bytes
    variants = {"torch": lambda index: _torch_dense(blocks[index], tokens)} | own
    rounds = {name: clock.prepared(partial(_over, run, len(blocks))) for name, run in variants.items()}
    rounds["reading"] = clock.prepared(lambda: read_data(data, threads))
    taken: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(repeats):
        for name, run in rounds.items():
            start = clock.mark()
            run()
            taken[name].append(clock.seconds(start, clock.mark()))
    reading = taken.pop("reading")
    seconds = {name: [one / len(blocks) for one in times] for name, times in taken.items()}
    return FfnPoint(
        active_share=active,
        gate_share=gates,
        tokens=tokens,
        threads=threads,
        bytes_read=bytes_read,
        read_bytes_per_second=data.numel() * 4 / median(reading),
        seconds={name: Timing(seconds=times) for name, times in seconds.items()},
    )


def _over(run: Callable[[int], object], count: int) -> None:
    for index in range(count):
        run(index)


def _torch_dense(block: Block, tokens: int) -> torch.Tensor:
    x = block.x[:tokens]
    product = linear(x, block.gate).relu() * linear(x, block.up).relu()
    return linear(product, block.down)


def read_data(data: torch.Tensor, threads: int) -> None:
    """Reads memory as fast as possible: every thread only sums what it reads."""
    library = None if data.is_cuda else kernels()
    if library is None:
        data.sum()
    else:
        library.sparsify_read(data.data_ptr(), data.numel(), threads)


WARM_UP_TOKENS = 2


def random_model(
    layers: int, active: float, gates: float, rank: int, dtype: torch.dtype
) -> tuple[Any, LayerPredictors]:
    """A model with random weights and layers of Mistral-7B's shape in which a given share of neurons fires, with predictors.

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
    predictors = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[0] = 0.0
    for block in model.ffn_blocks():
        neurons = config.intermediate_size
        order = torch.randperm(neurons)
        for projection, share in ((block.gate_proj, gates), (block.up_proj, active)):
            column = torch.full((neurons,), -SIGN)
            column[order[: round(share * neurons)]] = SIGN
            projection.weight.data[:, 0] = column
        # What a block adds stays small, and nothing is added to channel 0: its sign decides in every layer.
        block.down_proj.weight.data.mul_(1e-4)[0] = 0.0
        a = torch.rand(rank, config.hidden_size, dtype=dtype) * 1e-4
        a[0, 0] = 1.0
        b = torch.rand(neurons, rank, dtype=dtype) * 1e-4
        b[:, 0] = block.up_proj.weight.data[:, 0]
        predictors.append([Predictor(a, b, 0.0)])
    return model, LayerPredictors("normed", predictors)


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

    The ways are torch, llama.cpp on request, our kernels reading every row, exactly, and with predictors; `weights` is the format of
    our kernels and llama.cpp's. The model stays accelerated.
    """
    variants = {"torch": Variant(dense_twin(model))}
    with TemporaryDirectory() as folder:
        without = missing(model, weights) if llamacpp else "not requested"
        if without is None:
            on_progress(f"{name}: writing a file for llama.cpp")
            engine = LlamaCpp(variants["torch"].model, weights, torch.get_num_threads(), ids.shape[1], Path(folder))
            variants["llama.cpp"] = Variant(llamacpp=engine)
        exact = accelerate(model, weights=weights)
        others: dict[str, dict[str, Any]] = {"dense": {"dense": True}}
        if predictors is not None:
            others["predictor"] = {"predictors": predictors}
        made = {"exact": Variant(model, exact)}
        for key, options in others.items():
            twin = _sharing(model)
            made[key] = Variant(twin, accelerate(twin, weights=weights, **options))
        variants |= {key: made[key] for key in VARIANTS if key in made}
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
    twin = _sharing(model)
    for block in twin.ffn_blocks():
        down = block.down_proj if isinstance(block.down_proj, torch.nn.Parameter) else block.down_proj.weight
        down.data = down.data.clone()
    return twin


def _sharing(model: Any) -> Any:
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

    Native steps say where their time goes; of others only the feed-forward blocks are known, by hooks that mark their calls.
    """
    clock = Clock(ids.device.type)
    native = acceleration is not None and acceleration.backend == "native"
    start = clock.mark()
    cache = model(ids[:, :-decode_tokens], use_cache=True, logits_to_keep=1).past_key_values
    prompt_seconds = clock.seconds(start, clock.mark())
    with nullcontext([]) if native else _marked_blocks(model, clock) as marks:
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
