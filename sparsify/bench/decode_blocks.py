"""Interleaved timing of one feed-forward block with a given sparsity: torch, our dense kernel, the exact sparse kernel, and the
sparse kernel with a predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch.nn.functional import linear

from sparsify.bench.decode_result import FfnPoint, Timing
from sparsify.bench.timing import OUT_OF_CACHE_BYTES, Clock, read_data
from sparsify.models import ACTIVATIONS
from sparsify.models.quantised import BlockFormat, BlockMatrix, quantise
from sparsify.runtime import FfnWeights, Predictor, RowsRead, sparse_ffn
from sparsify.runtime.weights import Matrix

DRELU = ACTIVATIONS["drelu"]
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
        neurons, b = self.gate.shape[0], self.predictor.b
        assert isinstance(b, torch.Tensor)
        for token in range(len(self.x)):
            order = torch.randperm(neurons, generator=generator)
            gate_on, both_on = torch.full((neurons,), -SIGN), torch.full((neurons,), -SIGN)
            gate_on[order[: round(gates * neurons)]] = SIGN
            both_on[order[: round(active * neurons)]] = SIGN
            self.gate[:, token] = gate_on
            self.up[:, token] = both_on
            b[:, token] = both_on

    def weights(self) -> FfnWeights:
        gate, up = self.gate, self.up
        if isinstance(self.down_t, BlockMatrix):
            gate, up = (quantise(one, self.down_t.format) for one in (gate, up))
        predictor = self.predictor.like(self.x, in_blocks=isinstance(self.down_t, BlockMatrix))
        return FfnWeights(gate, up, self.down_t, predictor=predictor)


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
    read = down_t if format is None else quantise(down_t, format, by_columns=True)
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
