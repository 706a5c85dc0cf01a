"""Compares what `sparsify simulate` predicts of this machine with what the runtime takes here, over limits on memory and policies.

    python scripts/validate_simulator.py --to my_folder

Writes a model of random weights, in which every token's neurons are known, and a file of its neurons to the folder. Measures this
machine as a device, then decodes the same tokens once by the runtime and once by the simulator, from empty caches, in rounds. Both have
the same memory for neurons. Prints a table of docs/larger_than_memory.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sparsify.bench.decode_shapes import SHAPES
from sparsify.bench.offload_model import KINDS, Firing, perfect_predictors, write_model
from sparsify.models.masking import num_neurons
from sparsify.reporting.tables import Table
from sparsify.runtime import accelerate
from sparsify.simulation.device import Device
from sparsify.simulation.footprint import Bits, ModelShape, footprint
from sparsify.simulation.machine import measure_machine
from sparsify.simulation.replay import Caching, Moves, replay
from sparsify.simulation.timeline import time_decode
from sparsify.simulation.trace import LayerTrace, RecordedTrace, divide, units_of

FIRING = Firing(active=0.1, skew=0.9)
SHARES = (0.15, 0.3, 0.6)
WAYS = (("predictor", "lru"), ("predictor", "lfu"), ("exact", "lfu"))
CONTEXT = 256


@dataclass(frozen=True)
class Subject:
    folder: Path
    layers: int
    rank: int
    threads: int
    tokens: np.ndarray
    warm: int


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--to", type=Path, required=True, help="folder of the model and its neuron files")
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16, help="measured tokens of a round")
    parser.add_argument("--warm", type=int, default=8, help="tokens before them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write-only", action="store_true", help="write the files, and measure nothing")
    given = parser.parse_args()
    os.environ["SPARSIFY_NEURON_CACHE"] = str(given.to)
    torch.set_num_threads(given.threads)
    folder = given.to / f"{given.shape}-{given.layers}"
    write_model(folder, given.shape, given.layers, FIRING, print)
    tokens = np.random.default_rng(7).integers(0, KINDS, given.warm + given.tokens)
    subject = Subject(folder, given.layers, KINDS, given.threads, tokens, given.warm)
    shape = SHAPES[given.shape]
    ffn = given.layers * 3 * shape.neurons * shape.hidden * 2
    if given.write_only:
        for way, policy in WAYS[1:3]:
            run(replace(subject, tokens=tokens[:2], warm=1), way, policy, ffn // 2)
        return
    cases = [(share, way, policy) for share in SHARES for way, policy in WAYS]
    measured: dict[tuple[float, str, str], list[float]] = {case: [] for case in cases}
    predicted: dict[tuple[float, str, str], list[float]] = {case: [] for case in cases}
    seen: dict[tuple[float, str, str], tuple[float, ...]] = {}
    for number in range(given.rounds):
        # A disk that others use as well changes within minutes: each round is predicted from what it gave then.
        device = {
            way: measure_machine(
                given.to,
                lambda _: None,
                parts * 2 * shape.hidden,
                hidden=shape.hidden,
                slots=shape.neurons,
                threads=given.threads,
            )
            for way, parts in (("predictor", 3), ("exact", 2))
        }
        for one in device.values():
            print(one.model_dump_json())
        for case in cases[:: -1 if number % 2 else 1]:
            share, way, policy = case
            seconds, hits, read = run(subject, way, policy, round(share * ffn))
            speed, own_hits, own_read = simulated(subject, device[way], way, policy, round(share * ffn))
            measured[case].append(1 / seconds)
            predicted[case].append(speed)
            seen[case] = hits, own_hits, read, own_read
    table = Table(
        f"{given.layers} layers of {given.shape}, {ffn / 1e9:.2f} GB of neurons in bf16, {FIRING.active:.0%} fire (skew {FIRING.skew:g})",
        [
            *("memory for neurons", "decoding", "policy", "hits", "simulated", "MB", "simulated"),
            *("tokens/s", "simulated", "simulated / measured"),
        ],
        left=(1, 2),
    )
    for case in cases:
        share, way, policy = case
        hits, own_hits, read, own_read = seen[case]
        ratios = [one / other for one, other in zip(predicted[case], measured[case], strict=True)]
        table.add(
            *(
                f"{share:.0%}",
                way,
                policy,
                f"{hits:.1%}",
                f"{own_hits:.1%}",
                f"{read / 1e6:.1f}",
                f"{own_read / 1e6:.1f}",
            ),
            f"{statistics.median(measured[case]):.2f}",
            f"{statistics.median(predicted[case]):.2f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        )
    print(table.markdown())


def run(subject: Subject, way: str, policy: str, num_bytes: int) -> tuple[float, float, float]:
    """Seconds of a token, share of hits, and bytes read for a token."""
    made = accelerate(
        subject.folder,
        memory=10**15,
        neuron_memory=num_bytes,
        policy=policy,
        predictors=(lambda model, _: perfect_predictors(model.config, FIRING, subject.rank))
        if way == "predictor"
        else None,
        context_tokens=CONTEXT,
        threads=subject.threads,
        tell=print,
    )
    past, begin = None, 0.0
    with torch.no_grad():
        for step, token in enumerate(subject.tokens.tolist()):
            if step == subject.warm:
                made.reset()
                begin = time.perf_counter()
            output = made.model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = output.past_key_values
    counted = len(subject.tokens) - subject.warm
    seconds = (time.perf_counter() - begin) / counted
    assert made.neurons is not None
    print(way, policy, num_bytes, f"{seconds * 1e3:.1f} ms", made.neurons, made.seconds, flush=True)
    return seconds, made.neurons.hit_rate, made.neurons.bytes_read / counted


def simulated(subject: Subject, device: Device, way: str, policy: str, num_bytes: int) -> tuple[float, float, float]:
    """Tokens per second, share of hits, and bytes read for a token."""
    from sparsify.runtime.stored_weights import StoredModel

    config = StoredModel(subject.folder).config
    shape, bits = ModelShape.of(config), Bits.of_weights(16)
    fetch = units_of("neurons" if way == "predictor" else "gate_first", shape, bits)
    neurons = num_neurons(config)
    layers = [LayerTrace([FIRING.drawn(layer, 0, neurons).numpy()[subject.tokens]]) for layer in range(subject.layers)]
    predictors = subject.layers * subject.rank * (shape.hidden + neurons) * 2 if way == "predictor" else 0
    most = max(int(layer.masks[0].sum(1).max()) for layer in layers)
    division = divide(fetch, shape, num_bytes, most)
    moves = replay(RecordedTrace(layers), Caching(policy, division.capacities))
    later = Moves(*(getattr(moves, name)[subject.warm :] for name in ("hits", "ahead", "late", "prefetched")))
    static = footprint(shape, bits, len(subject.tokens)).static + predictors
    held = division.held_share * fetch.static_read_bytes
    found = time_decode(device, fetch, later, static + held, fetch.static_read_bytes - held)
    parts = (found.static_seconds, found.slots_seconds, found.flash_seconds)
    print("simulated", way, policy, num_bytes, *(f"{1e3 * one / found.tokens:.1f} ms" for one in parts))
    return found.tokens_per_second, found.hit_rate, found.flash_bytes / found.tokens


if __name__ == "__main__":
    main()
