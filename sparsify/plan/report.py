"""A plan as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.text import Text

from sparsify.plan.estimate import Plan, SourcePlan
from sparsify.plan.fit import Verdict, gb
from sparsify.plan.memory import DeviceMemory, HostMemory
from sparsify.recipe.recipe import CACHE_DIR
from sparsify.reporting.tables import Table


def plan_table(plan: Plan) -> Table:
    rows = [[name, value, Text(remark, "dim")] for name, value, remark in _rows(plan)]
    return Table(f"Plan of {plan.recipe}, an estimate", None, rows, left=(0, 2))


def _rows(plan: Plan) -> Iterator[tuple[str, str, str]]:
    parts = plan.parameters.model_dump(exclude={"total"})
    yield "", "", ""
    yield "parameters", f"{plan.parameters.total:,}", f"{plan.active_parameters:,} for each token"
    yield from ((f"  {part}", f"{count:,}", "") for part, count in parts.items() if count)
    active, computed = plan.active_flops_per_token, plan.flops_per_token
    remark = "" if active == computed else f"; {computed:,} computed, with zeros of inactive sub-dimensions"
    yield "FLOPs per token", f"{active:,}", f"of training, forward and backward{remark}"
    if plan.zero_weights:
        frozen = "stay zero: their gradients are; gradients and optimiser take the memory of a dense model"
        yield "zero weights", f"{plan.zero_weights:,}", frozen
    yield "", "", ""
    yield from _memory(plan)
    yield (
        "checkpoint",
        _size(plan.checkpoint_bytes),
        f"{_size(plan.disk_bytes)} on disk at most",
    )
    yield "", "", ""
    yield "steps", f"{plan.num_steps:,}", f"of {plan.step_tokens:,} tokens"
    yield "  warm-up", f"{plan.warmup_steps:,}", ""
    yield "  forward passes", f"{plan.accumulation_steps:,}", "per step and process"
    yield (
        "learning rate",
        f"{plan.peak_learning_rate:g}",
        f"to {plan.final_learning_rate:g}, cosine",
    )
    yield "sequences", f"{plan.num_sequences:,}", f"of {plan.sequence_length:,} tokens"
    yield "tokens", f"{plan.num_tokens:,}", ""
    for name, source in plan.sources.items():
        yield f"  {name}", f"{source.tokens:,}", _shares_of(plan, name) + _epochs(source)
    if any(source.epochs is None for source in plan.sources.values()):
        yield "", "", f"epochs: unknown unless the whole source is tokenised in {plan.cache_dir}"
        if plan.cache_dir == CACHE_DIR:
            yield "", "", "`sparsify mixture stats` tokenises there as much as its --budget-tokens needs"
    if len(plan.phases) > 1:
        yield "phases", f"{len(plan.phases)}", "each source's shares above are in this order"
        yield from _phases(plan)
    yield from _outcome(plan)


def _memory(plan: Plan) -> Iterator[tuple[str, str, str]]:
    stage = (
        f"{plan.precision}, ZeRO-{plan.zero_stage}, {plan.processes} process(es), "
        f"{plan.micro_batch_size} sequence(s) a forward pass"
    )
    if plan.gradient_checkpointing:
        stage += ", checkpointing"
    device = plan.device
    yield "planned for", plan.hardware.name, f"{gb(plan.hardware.device_bytes)} for each process"
    needed = device.total + plan.allowance_bytes
    yield "memory per process", _size(needed), f"{stage}; peak at: {device.moment}"
    yield from _sizes(device)
    yield "  allowance", _size(plan.allowance_bytes), "assumed: framework and fragmentation"
    yield (
        "activations then",
        _size(plan.activations_without_checkpointing_bytes),
        "without gradient checkpointing",
    )
    yield "", _size(plan.activations_with_checkpointing_bytes), "with gradient checkpointing"
    if plan.host.total:
        yield "host memory", _size(plan.host.total), "of one node, all its processes together"
        yield from _sizes(plan.host)
    if plan.calibration is not None:
        yield (
            plan.calibration.method.replace("_", " ") if plan.calibration.by_layer else "upcycling",
            _size(plan.calibration.memory_bytes),
            f"before training, {'one layer at a time' if plan.calibration.by_layer else 'the whole model'}; {plan.calibration.num_tokens:,} tokens, "
            f"{_size(plan.calibration.disk_bytes)} on disk in the meantime",
        )
    if plan.refits is not None:
        yield (
            "refits",
            _size(plan.refits.memory_bytes),
            f"in addition to weights and optimiser, between steps, one layer at a time; {plan.refits.num_refits} of "
            f"{plan.refits.num_tokens:,} tokens",
        )


def _outcome(plan: Plan) -> Iterator[tuple[str, str, str]]:
    cost, hardware = plan.cost, plan.hardware
    basis = "as given"
    if cost.assumed:
        peak = f"{hardware.peak_flops / 1e12:,.4g} TFLOP/s"
        basis = f"assumed: {hardware.mfu:.0%} of {peak}, no overlap"
    yield "", "", ""
    yield "tokens a second", f"{cost.tokens_per_second:,.0f}", basis
    yield "hours of training", f"{cost.hours:,.1f}", f"{cost.device_hours:,.0f} device hours"
    if cost.price:
        price = f"at {hardware.gpu_hour_price:.2f} a device and hour; --gpu-hour-price"
        yield "price, US dollars", f"{cost.price:,.0f}", price
    yield "", "", ""
    verdict = plan.verdict
    yield "verdict", "fits" if verdict.fits else "does not fit", verdict.reason
    if verdict.chosen:
        yield "  engine=auto", "", "chose these settings: the shortest assumed step that fits"
    if not verdict.fits:
        yield "  nearest that fits", "", nearest_sentence(verdict)


def nearest_sentence(verdict: Verdict) -> str:
    if verdict.nearest is None:
        return "no ZeRO stage, micro-batch or offload fits: use more or larger devices"
    return f"{' '.join(verdict.nearest.overrides)} ({gb(verdict.nearest.device_bytes)})"


def _shares_of(plan: Plan, name: str) -> str:
    """A source's share of the run and, if it changes, of each phase: `4.80%: 2.00%, 2.00% → 30.00%`."""
    mean = f"{plan.sources[name].tokens / plan.num_tokens:.2%}"
    if len(plan.phases) == 1:
        return mean
    parts = [
        f"{phase.first[name]:.2%}"
        if phase.first[name] == phase.last[name]
        else f"{phase.first[name]:.2%} → {phase.last[name]:.2%}"
        for phase in plan.phases
    ]
    return f"{mean}: {', '.join(parts)}"


def _epochs(source: SourcePlan) -> str:
    seen = "" if source.epochs is None else f"; {source.epochs:.2f} epochs"
    if source.max_epochs is None:
        return seen
    then = {"stop": "more is refused", "redistribute": "then the others take over"}
    return f"{seen}; at most {source.max_epochs:g} epochs, {then[source.when_exhausted]}"


def _phases(plan: Plan) -> Iterator[tuple[str, str, str]]:
    for phase in plan.phases:
        share = phase.until_tokens / plan.num_tokens
        kind = "constant shares" if phase.first == phase.last else "ramp"
        yield f"  until {share:.0%}", f"{phase.until_tokens:,}", kind


def _sizes(part: DeviceMemory | HostMemory) -> Iterator[tuple[str, str, str]]:
    for name, size in part.parts().items():
        if size:
            yield f"  {name.removesuffix('_bytes').replace('_', ' ')}", _size(size), ""


def _size(num_bytes: int) -> str:
    unit = min(int(math.log(max(num_bytes, 1), 1024)), 4)
    return f"{num_bytes / 1024**unit:,.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
