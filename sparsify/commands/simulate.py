"""`sparsify simulate`: what decoding from a memory that is smaller than the model would take on a device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from sparsify.errors import RunError, check_choice
from sparsify.mixture.sequences.held_out import check_text_or_mixture, text_or_mixture_calibration
from sparsify.mixture.sequences.reader import PackedSequence
from sparsify.models import SparseModel
from sparsify.models.quantised import bits_per_weight
from sparsify.recipe.recipe import CACHE_DIR
from sparsify.runs.load import load
from sparsify.runtime.cache_policies import POLICIES
from sparsify.runtime.offload import parse_memory
from sparsify.runtime.prefetch import FITTED, PREFETCHERS
from sparsify.simulation.cache_aware_decode import check_cache_aware, decode_cache_aware
from sparsify.simulation.device import Device, read_device
from sparsify.simulation.footprint import Bits, Footprint, ModelShape, footprint
from sparsify.simulation.machine import measure_machine
from sparsify.simulation.profile import PREFIX, Profile, ProfileTrace, read_profile
from sparsify.simulation.record import check_fetch, natural_fetch, record
from sparsify.simulation.replay import Caching, Moves, replay
from sparsify.simulation.result import Parts, Simulated, Simulation
from sparsify.simulation.timeline import Decode, time_decode
from sparsify.simulation.trace import FETCHES, Division, Fetch, Trace, divide, units_of

logger = logging.getLogger(__name__)

THIS_MACHINE = "this_machine"
WEIGHTS = ("stored", "int8", "int4")
SEED = 1
CACHE_AWARE_POLICIES = ("lru", "lfu", "no_cache")


@dataclass(frozen=True)
class Request:
    """What is simulated.

    Attributes:
        model: A sparse model, or `profile:NAME`.
        device: A device of the package, a YAML file, or `this_machine`, which is measured.
        disk: Folder on the disk that is measured.
        memories: Sizes such as 4GB; none for half of the feed-forward weights.
        policies: Of `cache_policies.POLICIES`.
        prefetches: Of `prefetch.PREFETCHERS`.
        gammas: Of cache-aware masks; none for the model's own masks.
        fetch: Of `trace.FETCHES`; None for what the model's zeros allow.
        weights: Format of the weights on the device.
        on: Text or mixture.
        tokens: Of each sequence.
        sequences: Decodes.
        other_tokens: Of other text, to which hot sets and prefetchers are fitted.
        context_tokens: Positions of keys and values in memory at the end of a decode; None for `tokens`.
    """

    model: str
    device: str
    disk: Path = Path()
    memories: Sequence[str] = ()
    policies: Sequence[str] = ("lfu",)
    prefetches: Sequence[str] = ("none",)
    gammas: Sequence[float] = ()
    fetch: str | None = None
    weights: str = "stored"
    on: str = "quickstart"
    tokens: int = 256
    sequences: int = 2
    other_tokens: int = 2048
    context_tokens: int | None = None


def simulate(request: Request) -> Simulation:
    """Simulates every memory with every policy and prefetcher, and with every γ.

    Raises:
        UserError: If the model, the text, the device or a setting cannot be used, or a memory is too small.
    """
    _check(request)
    subject = _Profiled(request) if request.model.startswith(PREFIX) else _Recorded(request)
    device = _device(request, subject)
    simulation = _Simulation(request, device, subject)
    memories = [parse_memory(text) for text in request.memories] or [simulation.half()]
    simulation.check_memories(memories)
    rows = [row for memory in memories for row in simulation.rows(memory)]
    return simulation.result(rows)


def _check(request: Request) -> None:
    for option, values, known in (
        ("--policy", request.policies, POLICIES),
        ("--prefetch", request.prefetches, PREFETCHERS),
        ("--fetch", [request.fetch] if request.fetch else [], FETCHES),
        ("--weights", [request.weights], WEIGHTS),
    ):
        for value in values:
            check_choice(option, value, known)
        if len(set(values)) != len(values):
            raise RunError(f"{option} is {','.join(values)}.", allowed="Each once.")
    if request.gammas:
        unusable = [policy for policy in request.policies if policy not in CACHE_AWARE_POLICIES]
        if unusable:
            raise RunError(
                f"--gamma with --policy {unusable[0]}: masks that depend on the cache are not known beforehand.",
                allowed=f"Policies with --gamma: {', '.join(CACHE_AWARE_POLICIES)}.",
            )
        if tuple(request.prefetches) != ("none",):
            raise RunError("--prefetch would be ignored: with --gamma nothing is prefetched.", next_step="Omit one.")
        if request.model.startswith(PREFIX):
            raise RunError("--gamma needs a model that computes, and this is a profile.", next_step="Omit --gamma.")
    if (request.context_tokens or request.tokens) < request.tokens:
        raise RunError(
            f"--context {request.context_tokens} is shorter than a sequence of {request.tokens} tokens.",
            allowed=f"{request.tokens} or more.",
        )


def _device(request: Request, subject: _Subject) -> Device:
    if request.device != THIS_MACHINE:
        return read_device(request.device)
    largest = int(max(unit.slot_bytes for unit in subject.fetch.units))
    shape = subject.shape
    return measure_machine(request.disk, logger.info, largest, hidden=shape.hidden, slots=shape.slots)


class _Subject:
    """A model, or its published statistics: shapes, bytes, and what its tokens need."""

    name: str
    text: str
    shape: ModelShape
    bits: Bits
    fetch: Fetch
    predictors: float = 0.0
    """Bytes that predictors have."""
    decodes: int
    traces: Sequence[Trace]
    """Of the decodes; empty if their masks depend on caches."""
    other: Sequence[Trace]

    @property
    def predictors_read(self) -> float:
        """Bytes of predictors that a token reads: those of its experts."""
        return self.predictors * self.shape.experts_per_token / self.shape.experts


class _Recorded(_Subject):
    def __init__(self, request: Request) -> None:
        check_text_or_mixture(request.on)
        loaded = load(request.model)
        self.model: SparseModel = loaded.model.eval()
        config = self.model.config
        self.name, self.text = loaded.name, request.on
        self.shape = ModelShape.of(config)
        stored = self.model.lm_head.weight.dtype.itemsize * 8
        weight = (
            float(stored)
            if request.weights == "stored"
            else bits_per_weight("int8" if request.weights == "int8" else "int4")
        )
        self.bits = Bits(attention=weight, ffn=weight, output_layer=weight, keys_and_values=float(stored))
        name = request.fetch or natural_fetch(config)
        check_fetch(name, config)
        if request.gammas and name != "inputs":
            check_cache_aware(config)
            raise RunError(f"--fetch {name} would be ignored: masks with --gamma fetch inputs.", next_step="Omit it.")
        if request.gammas:
            check_cache_aware(config)
            self.model = self.model.float()  # losses are measured
        self.fetch = units_of(name, self.shape, self.bits)
        length = request.tokens
        if length > config.max_position_embeddings:
            raise RunError(
                f"--tokens {length:,} is longer than the model's context.",
                allowed=f"Up to {config.max_position_embeddings:,}.",
            )
        needs_other = "static" in request.policies or any(one in FITTED for one in request.prefetches)
        calibration, held_out = text_or_mixture_calibration(
            request.on,
            loaded.tokenizer,
            num_tokens=max(request.other_tokens, length),
            validation_tokens=request.sequences * length,
            sequence_length=length,
            seed=SEED,
            cache_dir=Path(CACHE_DIR).expanduser(),
        )
        self.sequences = [one for own in held_out.values() for one in own][: request.sequences]
        self.decodes = len(self.sequences)
        if needs_other:
            logger.info(f"Recording {len(calibration)} sequences of other text")
        self.other = self._record(calibration, name) if needs_other else []
        self.traces = [] if request.gammas else self._record(self.sequences, name)

    def _record(self, sequences: Sequence[PackedSequence], fetch: str) -> Sequence[Trace]:
        ids = [torch.as_tensor(sequence.input_ids) for sequence in sequences]
        return record(self.model, ids, fetch, logger.info)


class _Profiled(_Subject):
    def __init__(self, request: Request) -> None:
        if request.weights != "stored":
            raise RunError(
                f"--weights {request.weights} would be ignored: a profile says its own bits.", next_step="Omit it."
            )
        profile: Profile = read_profile(request.model.removeprefix(PREFIX))
        if request.fetch not in (None, "neurons", "dense"):
            raise RunError(
                f"--fetch {request.fetch} needs masks that a profile does not have.", allowed="neurons or dense."
            )
        self.name, self.text = profile.name, "published statistics"
        self.shape = profile.model_shape
        self.bits = Bits.of_weights(profile.weight_bits.value)
        self.fetch = units_of("neurons", self.shape, self.bits)
        self.predictors = profile.resident_bytes.value
        self.decodes = request.sequences
        self.traces = [ProfileTrace(profile, request.tokens, SEED + number) for number in range(request.sequences)]
        self.other = [ProfileTrace(profile, max(1, request.other_tokens), SEED + request.sequences)]
        if any(one in FITTED for one in request.prefetches) and "low_rank" in request.prefetches:
            raise RunError("--prefetch low_rank reads hidden states, and a profile has none.", next_step="Omit it.")


class _Simulation:
    def __init__(self, request: Request, device: Device, subject: _Subject) -> None:
        self._request, self._device, self._subject = request, device, subject
        context = request.context_tokens or request.tokens
        self._full: Footprint = footprint(subject.shape, subject.bits, context)
        # On average over the decode, which ends when the context is full.
        self._mean: Footprint = footprint(subject.shape, subject.bits, context - request.tokens // 2)

    @property
    def _least(self) -> float:
        """Bytes without which nothing is decoded."""
        return self._full.static + self._subject.predictors

    def _division(self, memory: int) -> Division:
        return divide(self._subject.fetch, self._subject.shape, memory - self._least, self._most_needed)

    @cached_property
    def _most_needed(self) -> int | None:
        """Slots that a token needs of a layer at most, where that decides how memory is divided."""
        if not self._device.gathers or len(self._subject.fetch.units) > 1:
            return None
        layers = (layer for trace in self._subject.traces for layer in trace.layers())
        return max(int(layer.masks[0].sum(1).max()) for layer in layers)

    def half(self) -> int:
        """Memory for what always stays in it, and half of the other feed-forward weights."""
        static = self._subject.fetch.static_bytes
        return int(self._least + static + (self._full.ffn - static) / 2)

    def check_memories(self, memories: Sequence[int]) -> None:
        for memory in memories:
            if memory <= self._least:
                raise RunError(
                    f"A memory of {memory / 1e9:,.3f} GB is too small for what always stays in it.",
                    allowed=f"Above {self._least / 1e9:,.3f} GB: attention {self._full.attention / 1e9:,.3f}, output layer "
                    f"{self._full.output_layer / 1e9:,.3f}, keys and values {self._full.keys_and_values / 1e9:,.3f}, "
                    f"predictors {self._subject.predictors / 1e9:,.3f}.",
                )

    def rows(self, memory: int) -> list[Simulated]:
        request, subject = self._request, self._subject
        slots = self._division(memory).capacities
        if request.gammas:
            return [
                self._cache_aware(memory, slots, policy, gamma)
                for policy in request.policies
                for gamma in request.gammas
            ]
        rows = []
        for policy in request.policies:
            for prefetch in request.prefetches:
                logger.info(f"{memory / 1e9:g} GB, {policy}, prefetch {prefetch}")
                caching = Caching(policy, slots, prefetch, SEED)
                decodes = [self._time(memory, replay(trace, caching, subject.other)) for trace in subject.traces]
                rows.append(self._row(memory, policy, prefetch, decodes))
        return rows

    def _cache_aware(self, memory: int, slots: Sequence[int], policy: str, gamma: float) -> Simulated:
        assert isinstance(self._subject, _Recorded)
        found = decode_cache_aware(
            self._subject.model,
            self._subject.sequences,
            gamma=gamma,
            policy=policy,
            capacities=slots,
            tell=logger.info,
        )
        decodes = [self._time(memory, replay(one.trace, Caching(policy, slots))) for one in found]
        loss = sum(one.loss for one in found) / max(1, sum(one.labels for one in found))
        return self._row(memory, policy, "none", decodes, gamma=gamma, loss=loss)

    def _time(self, memory: int, moves: Moves) -> Decode:
        subject = self._subject
        read, held = subject.fetch.static_read_bytes, self._division(memory).held_share
        static = self._mean.static + subject.predictors_read + read * held
        return time_decode(self._device, subject.fetch, moves, static, read * (1 - held))

    def _row(
        self,
        memory: int,
        policy: str,
        prefetch: str,
        decodes: Sequence[Decode],
        *,
        gamma: float | None = None,
        loss: float | None = None,
    ) -> Simulated:
        def mean(of: Callable[[Decode], float]) -> float:
            return sum(map(of, decodes)) / len(decodes)

        dense = self._dense_seconds(memory)
        speed = mean(lambda one: one.tokens_per_second)
        return Simulated(
            memory_bytes=memory,
            cached_share=min(1.0, (memory - self._least) / self._full.ffn),
            policy=policy,
            prefetch=prefetch,
            gamma=gamma,
            hit_rate=mean(lambda one: one.hit_rate),
            recall=None if prefetch == "none" else mean(lambda one: one.recall),
            over_fetch=None if prefetch == "none" else mean(lambda one: one.over_fetch),
            needed_bytes=mean(lambda one: one.needed_bytes / one.tokens),
            flash_bytes=mean(lambda one: one.flash_bytes / one.tokens),
            stall_bytes=mean(lambda one: one.stall_bytes / one.tokens),
            flash_reads=mean(lambda one: one.flash_reads / one.tokens),
            seconds=Parts(
                static=mean(lambda one: one.static_seconds / one.tokens),
                neurons=mean(lambda one: one.slots_seconds / one.tokens),
                flash=mean(lambda one: one.flash_seconds / one.tokens),
                fixed=mean(lambda one: one.fixed_seconds / one.tokens),
            ),
            tokens_per_second=speed,
            dense_tokens_per_second=1 / dense,
            loss=loss,
        )

    def _dense_seconds(self, memory: int) -> float:
        """Of a token that reads every neuron of its experts; those that do not fit are streamed each time."""
        shape, device = self._subject.shape, self._device
        per_token = self._full.ffn * shape.experts_per_token / shape.experts
        held = min(1.0, max(0.0, (memory - self._full.static) / self._full.ffn))
        dram = device.dram_seconds(self._mean.static + held * per_token)
        flash = device.flash_seconds((1 - held) * per_token, shape.layers)
        return device.fixed_seconds + (max(dram, flash) if device.concurrent else dram + flash)

    def result(self, rows: Sequence[Simulated]) -> Simulation:
        subject, device = self._subject, self._device
        prompt_dram, prompt_flash = device.dram_seconds(self._full.static), device.flash_seconds(self._full.ffn, 1)
        return Simulation(
            model=subject.name,
            device=device,
            text=subject.text,
            sequences=subject.decodes,
            tokens=self._request.tokens,
            fetch=subject.fetch.name,
            weights_bits=subject.bits.ffn,
            attention_bytes=self._full.attention,
            output_layer_bytes=self._full.output_layer,
            keys_and_values_bytes=self._full.keys_and_values,
            predictors_bytes=subject.predictors,
            ffn_bytes=self._full.ffn,
            ffn_static_bytes=subject.fetch.static_bytes,
            prompt_seconds=max(prompt_dram, prompt_flash) if device.concurrent else prompt_dram + prompt_flash,
            rows=list(rows),
        )
