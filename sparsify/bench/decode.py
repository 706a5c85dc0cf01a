"""`sparsify bench decode`: speed-up of sparse over dense decoding on this machine, with the same weights in one process."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsify.bench.decode_blocks import make_blocks, measure_point
from sparsify.bench.decode_models import measure_model
from sparsify.bench.decode_result import DecodeBench, FfnPoint, ModelPoint, SpeculationPoint
from sparsify.bench.decode_shapes import SHAPES, drop_weights, random_model
from sparsify.bench.decode_speculation import measure_speculation
from sparsify.errors import RunError
from sparsify.files import write_text
from sparsify.metadata import read_record
from sparsify.predictors import read_predictors
from sparsify.runs.load import Loaded, load
from sparsify.runs.run_folder import RunFolder
from sparsify.runtime.accelerate import WEIGHT_FORMATS, block_format, check_acceleratable
from sparsify.runtime.native_ffn import MAX_TOKENS
from sparsify.runtime.triton_ffn import triton_can

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
USUAL_ACTIVE = 0.1
"""Active share for the measurements over batches and threads, and for whole models."""
EXPORT_TOKENS, EXPORT_REPEATS = 48, 7
"""Tokens and repeats of a run's export."""


@dataclass(frozen=True)
class DecodeSettings:
    """Settings of the benchmark.

    Args:
        device: `cpu` or `cuda`.
        dtype: A key of DTYPES, for hidden states and torch's dense block.
        weights: Format of the weights for the C++ kernels: stored, int8 or int4; predictors are then int8.
        sparsities: Shares of neurons that do not fire.
        batches: Batch sizes in tokens.
        rank: Rank of predictors; None for a quarter of the hidden size.
        shape: A key of SHAPES: the model with random weights; None for the first.
        layers: Its layers; 0 for no such model, None for the shape's own number.
        weight_sparsity: Share of the weights of its projections that are zero; None for none.
        gates: Share of its gates that are positive; None if the gate alone decides which neurons fire.
        together: Numbers of tokens whose verification in one step of that model is measured, instead of the model; empty for none.
        overlaps: Shares of the firing neurons that these tokens have in common.
        bundle: A model of the user to decode with; None for none.
        predictors: Predictors of that model; None for exact decoding only.
        prompt: Prompt for that model.
        decode_tokens: Tokens that models decode one by one.
        llamacpp: Whether models are also measured in llama.cpp, if it is installed and holds a dense model of their shape.
    """

    hidden: int
    neurons: int
    rank: int | None
    device: str
    dtype: str
    weights: str
    sparsities: tuple[float, ...]
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    repeats: int
    shape: str | None
    layers: int | None
    weight_sparsity: float | None
    gates: float | None
    together: tuple[int, ...]
    overlaps: tuple[float, ...]
    bundle: str | None
    predictors: Path | None
    prompt: str
    decode_tokens: int
    llamacpp: bool = True

    def check(self) -> None:
        """Raises RunError for settings that cannot be measured."""
        tokens = max(self.batches, default=1)
        rank = self.rank or rank_of(self.hidden)
        random = {"--shape": self.shape, "--layers": self.layers or None, "--gates": self.gates}
        random |= {"--weight-sparsity": self.weight_sparsity}
        random |= {"--together": self.together or None}
        unused = ", ".join(name for name, given in random.items() if given is not None)
        numbers = (*self.batches, *self.threads, self.repeats, self.neurons)
        wrong = {
            f"--device {self.device} (here: {', '.join(devices())})": self.device not in devices(),
            f"--dtype {self.dtype} (allowed: {', '.join(DTYPES)})": self.dtype not in DTYPES,
            f"--weights {self.weights} (allowed: {', '.join(WEIGHT_FORMATS)})": self.weights not in WEIGHT_FORMATS,
            "--sparsity outside [0, 1)": not all(0 <= one < 1 for one in self.sparsities),
            "a number below 1": min(numbers) < 1,
            "no --batch or no --threads": not self.batches or not self.threads,
            f"--batch {tokens}, more than the width of the block or the rank": tokens > min(self.hidden, rank),
            f"--tokens {self.decode_tokens}, fewer than 4": self.decode_tokens < 4,
            "--threads, which has no effect on a GPU": self.device == "cuda"
            and self.threads != (torch.get_num_threads(),),
            f"--shape {self.shape} (allowed: {', '.join(SHAPES)})": self.shape is not None and self.shape not in SHAPES,
            f"--gates {self.gates}, fewer than the {USUAL_ACTIVE} of the neurons that fire": self.gates is not None
            and self.gates < USUAL_ACTIVE,
            f"--together {max(self.together, default=1)}, more than {MAX_TOKENS} or on a GPU": bool(self.together)
            and (max(self.together) > MAX_TOKENS or self.device != "cpu"),
            "--together without layers": bool(self.together) and self.layers == 0,
            "--weight-sparsity without layers, with --together, on a GPU, or of stored weights that are not bf16": bool(
                self.weight_sparsity
            )
            and (
                self.layers == 0
                or bool(self.together)
                or self.device != "cpu"
                or (self.weights == "stored" and self.dtype != "bf16")
            ),
            f"{unused} of a model with random weights, with --bundle": self.bundle is not None and bool(unused),
            "--predictors without --bundle": self.predictors is not None and self.bundle is None,
        }
        if found := [text for text, so in wrong.items() if so]:
            raise RunError(f"This cannot be measured: {'; '.join(found)}.")


def rank_of(hidden: int) -> int:
    """Rank of predictors for states of a width, unless one is requested."""
    return max(1, hidden // 4)


def bench_decode(settings: DecodeSettings, on_progress: Callable[[str], object]) -> DecodeBench:
    """Measures blocks over sparsity, batch and threads, then whole models.

    Raises:
        ModelError: If the bundle cannot be loaded or accelerated.
        RunError: If a setting is out of range.
    """
    settings.check()
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    before = torch.get_num_threads()
    most = max(settings.threads)
    torch.set_num_threads(most)
    try:
        models = list(_models(settings, on_progress)) if settings.bundle else []
        ffn = list(_blocks(settings, on_progress))
        models += [] if settings.bundle else list(_models(settings, on_progress))
        speculation = list(_speculation(settings, on_progress))
    finally:
        torch.set_num_threads(before)
    return DecodeBench(
        hidden=settings.hidden,
        neurons=settings.neurons,
        rank=settings.rank,
        dtype=settings.dtype,
        weights=settings.weights,
        threads=most,
        repeats=settings.repeats,
        device=settings.device,
        processor=torch.cuda.get_device_name() if settings.device == "cuda" else _cpu(),
        load_before=load_before,
        ffn=ffn,
        models=models,
        speculation=speculation,
    )


def _blocks(settings: DecodeSettings, on_progress: Callable[[str], object]) -> Iterator[FfnPoint]:
    if not settings.sparsities:
        return
    on_progress("making weights")
    most = max(settings.threads)
    blocks = make_blocks(
        settings.hidden,
        settings.neurons,
        settings.rank or rank_of(settings.hidden),
        max(settings.batches),
        DTYPES[settings.dtype],
        block_format(settings.weights),
        settings.device,
    )
    done: set[tuple[float, float, int, int]] = set()
    for active, gates, tokens, threads in _grid(settings, most):
        if (active, gates, tokens, threads) in done:
            continue
        done.add((active, gates, tokens, threads))
        on_progress(f"{1 - active:.0%} zeros, gates positive {gates:.0%}, batch {tokens}, {threads} threads")
        torch.set_num_threads(threads)
        yield measure_point(blocks, active, gates, tokens, threads, settings.repeats)
    torch.set_num_threads(most)


def _grid(settings: DecodeSettings, most: int) -> Iterator[tuple[float, float, int, int]]:
    for sparsity in settings.sparsities:
        active = round(1 - sparsity, 6)
        yield active, active, 1, most  # all zeros come from the gate
        yield active, active**0.5, 1, most  # gate and up are zero independently
    for tokens in settings.batches:
        yield USUAL_ACTIVE, USUAL_ACTIVE, tokens, most
    for threads in settings.threads:
        yield USUAL_ACTIVE, USUAL_ACTIVE, 1, threads


def _models(settings: DecodeSettings, on_progress: Callable[[str], object]) -> Iterator[ModelPoint]:
    model: Any
    if settings.bundle is not None:
        name = settings.bundle
        on_progress(f"loading {name}")
        loaded = load(name)
        model = loaded.model
        check_acceleratable(model)
        model.to(settings.device)
        predictors = None
        if settings.predictors is not None:
            own = read_predictors(settings.predictors)
            predictors = own.for_decoding(model, str(settings.predictors))
        ids = _tokens(loaded, settings.prompt, settings.decode_tokens, settings.device)
    elif settings.layers != 0 and not settings.together:
        key = settings.shape or next(iter(SHAPES))
        shape = SHAPES[key]
        layers = settings.layers or shape.layers
        gates = settings.gates or USUAL_ACTIVE
        name = f"random weights of {key}'s shape, gates positive for {gates:.0%}"
        on_progress("making a model of random weights")
        rank = settings.rank or rank_of(shape.hidden)
        model, predictors = random_model(shape, layers, USUAL_ACTIVE, gates, rank, DTYPES[settings.dtype])
        if settings.weight_sparsity is not None:
            name += f", {settings.weight_sparsity:.0%} of the weights zero"
            drop_weights(model, settings.weight_sparsity)
        model.to(settings.device)
        ids = torch.arange(100, 164 + settings.decode_tokens, device=settings.device)[None]
    else:
        return
    yield measure_model(
        *(model, name, predictors, ids, settings.decode_tokens, settings.repeats, on_progress),
        weights=settings.weights,
        llamacpp=settings.device == "cpu" and settings.llamacpp,
    )


def _speculation(settings: DecodeSettings, on_progress: Callable[[str], object]) -> Iterator[SpeculationPoint]:
    shape = SHAPES[settings.shape or next(iter(SHAPES))]
    for overlap in settings.overlaps if settings.together else ():
        yield from measure_speculation(
            *(shape, settings.layers or shape.layers, USUAL_ACTIVE, settings.gates or USUAL_ACTIVE, overlap),
            *(settings.together, DTYPES[settings.dtype], settings.weights, settings.repeats, on_progress),
        )


def time_export(run: RunFolder, on_progress: Callable[[str], object]) -> ModelPoint | None:
    """Decodes a finished run's export densely and sparsely on this machine's CPU. What was measured once is read from `run.decoding`.

    Returns:
        None if the recipe does not ask for it, or the model makes no zeros and has no sparse weights that can be packed.
    """
    settings = run.load_recipe().eval
    recipe = run.load_recipe()
    packed = run.has_sparse_weights and recipe.training.precision == "bf16"
    if not settings.time_decoding or (recipe.is_dense and not run.is_masked and not packed):
        return None
    if not run.decoding.is_file():
        on_progress(
            "Timing the export's decoding; the kernels are compiled at their first use, which takes about a minute"
        )
        loaded = load(str(run.export))
        ids = _tokens(loaded, (settings.sample_prompts or ["The"])[0], EXPORT_TOKENS, "cpu")
        name = "The export on this machine"
        point = measure_model(loaded.model, name, None, ids, EXPORT_TOKENS, EXPORT_REPEATS, on_progress)
        write_text(run.decoding, point.model_dump_json(indent=1) + "\n")
    return read_record(run.decoding, ModelPoint, "what timing an export wrote", RunError, f"Remove {run.decoding}.")


def _tokens(loaded: Loaded, prompt: str, count: int, device: str) -> torch.Tensor:
    """The prompt and the model's own greedy continuation. [1, tokens]"""
    inputs = loaded.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    model: Any = loaded.model
    return model.generate(
        **inputs,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=loaded.tokenizer.eos_token_id,
    )


def devices() -> list[str]:
    """Devices on which decoding can be measured, the fastest last."""
    gpu = torch.cuda.is_available() and triton_can(torch.zeros(1, device="cuda"))
    return ["cpu", "cuda"] if gpu else ["cpu"]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} core(s)"
