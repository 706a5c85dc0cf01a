"""Models whose feed-forward neurons stay in a file: loaded, prompted and decoded within a limit on this process's memory.

Attention, norms, embeddings, routers, the output layer, predictors and what masks need are in memory. Neurons are read when a step
needs them (`neuron_cache.py`); a prompt reads each block whole, one after the other.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers.initialization import no_init_weights

from sparsify.errors import ModelError, RunError
from sparsify.models.activations import ACTIVATIONS, GATES_WITHOUT_ZEROS
from sparsify.models.masking import GROUP, has_experts, is_fused, num_experts, num_neurons, ranks_by_proxy, site_rules
from sparsify.models.quantised import BlockFormat, BlockMatrix
from sparsify.runtime.block_weights import BlockProduct
from sparsify.runtime.build import kernels
from sparsify.runtime.column_cache import ColumnCache, column_ring_bytes
from sparsify.runtime.forwards import BlockForward
from sparsify.runtime.memory_plan import ring_bytes, smallest_memory
from sparsify.runtime.native_ffn import MAX_TOKENS
from sparsify.runtime.native_step import HEAD, Projections, head_format, projections
from sparsify.runtime.neuron_cache import NeuronCache
from sparsify.runtime.neuron_file import Layout, NeuronLayout, neuron_layout, open_neurons, row_bytes
from sparsify.runtime.prefetch import FITTED, Prefetch, PromptExamples
from sparsify.runtime.step import StepForward
from sparsify.runtime.stored_forwards import CHUNK_TOKENS, StoredExpertsForward, StoredMlpForward
from sparsify.runtime.stored_weights import StoredModel
from sparsify.runtime.weights import LayerPredictors, Options

OTHER_BYTES = 96_000_000
"""For what Python, torch and the system allocate in addition, such as stacks of threads."""
CACHE_ROOM = 2.5
"""A cache of keys and values grows by half, and is copied then."""
CONTEXT_TOKENS = 2048
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Limits:
    """How a model that is larger than memory is decoded.

    Args:
        memory_bytes: Most memory that this process may have, everything included.
        policy: Which neurons stay in memory: one of `neuron_cache.RUNTIME_POLICIES`.
        prefetch: Which neurons of the next layer are read while this one is computed.
        context_tokens: Positions of keys and values, over all sequences, for which there is room.
        neuron_bytes: Most memory for neurons; None for what is left.
        gamma: Of masks that choose inputs: factor of the sizes of what is not in memory.
    """

    memory_bytes: int
    policy: str = "lru"
    prefetch: Prefetch = "none"
    context_tokens: int = CONTEXT_TOKENS
    neuron_bytes: int | None = None
    gamma: float = 1.0


def parse_memory(text: str | int) -> int:
    """Bytes of a size such as 4GB or 3.5GiB.

    Raises:
        RunError: If it is not a size.
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    size = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    if not 0 < size < 2**60:
        raise RunError(
            f"The memory is {text[:30]!r}.",
            allowed="A size with its unit (KB, MB, GB, TB, KiB, MiB, GiB, TiB), such as 4GB, 900MB or 3.5GiB.",
        )
    return int(size)


def rss_bytes() -> int:
    """Memory of this process now.

    Raises:
        RunError: Where the system does not say.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        raise RunError(
            "This system does not say how much memory a process has (/proc/self/statm), so no limit can be kept.",
            next_step="Omit the limit on memory, or use Linux.",
        ) from None
    return pages * mmap.PAGESIZE


def peak_rss_bytes() -> int:
    """Most memory that this process has had; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


class OffloadedModel:
    """A model with everything in memory but its neurons, and the file and the memory of these.

    Args:
        folder: A folder that `sparsify export` or `sparsify convert` wrote.
        limits: The memory, and what it is used for.
        weights: `stored`, or the format of blocks.
        predictors: Makes predictors, given the model without weights; None for exact decoding.
        dense: Read every row.
        check: Raises ModelError if the kernels cannot compute the model, which has no weights yet.
        tell: Gets what takes long, as a line of text.

    Raises:
        ModelError: If the folder holds no sparse model, or one whose neurons cannot be read by rows.
        RunError: If the memory is too small, with the smallest that works.
        StorageError: If the neuron file cannot be written or read.
    """

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        *,
        weights: str = "stored",
        predictors: Callable[[Any, StoredModel], LayerPredictors] | None = None,
        dense: bool = False,
        check: Callable[[Any], None] = lambda _: None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        if kernels() is None:
            raise ModelError(
                "Only the compiled kernels read neurons from a file, and there are none here.",
                next_step="Install a C++ compiler, or a wheel of sparsify that was built where there is one.",
            )
        self.stored, self.limits, self.weights = StoredModel(folder), limits, weights
        if difference := self.stored.family.layer_difference:
            raise ModelError(
                f"{folder} is a {self.stored.config.model_type}, which has {difference}: its neurons cannot be read from a file.",
                next_step="Decode it in memory.",
            )
        self.blocks: BlockFormat | None = None if weights == "stored" else ("int8" if weights == "int8" else "int4")
        self.model = self._skeleton()
        check(self.model)
        self.predictors = None if predictors is None else predictors(self.model, self.stored)
        layout = self._layout(dense)
        self._check_memory(layout, folder)
        with torch.no_grad():
            file = open_neurons(self.stored, layout, tell)
            _trim()
            self._load_resident()
            for_neurons = limits.memory_bytes - rss_bytes() - self._working_bytes() - _ring_bytes(layout)
            experts = num_experts(self.stored.config)
            if for_neurons < smallest_memory(layout):
                file.close()
                raise self._too_small(limits.memory_bytes + smallest_memory(layout) - for_neurons)
            if limits.neuron_bytes is not None:
                for_neurons = max(min(for_neurons, limits.neuron_bytes), smallest_memory(layout))
            self.by_columns = layout.layout == "columns"
            if self.by_columns:
                self.cache = ColumnCache(file, for_neurons, policy=limits.policy, gamma=limits.gamma)
            else:
                self.cache = NeuronCache(
                    file, for_neurons, experts=experts, policy=limits.policy, prefetch=limits.prefetch
                )

    # ---- what is needed ----

    def _layout(self, dense: bool) -> NeuronLayout:
        config = self.stored.config
        rules = site_rules(config)
        up_first = "up" in rules and "gate" not in rules
        gate = ACTIVATIONS[config.ffn_activation].gate
        routed = ranks_by_proxy(rules) or GROUP in rules
        rows_suffice = gate not in GATES_WITHOUT_ZEROS or bool({"gate", "up"} & rules.keys()) or routed
        by_columns = not dense and not rows_suffice and self._has_columns(rules)
        if not dense and not rows_suffice and not by_columns:
            raise ModelError(
                f"Every row of gate and up of {self.stored.folder} is needed for every token: its gates are never zero, and its "
                "mask chooses neurons only when both are known.",
                allowed="A gate that makes zeros (relu and its kin), a mask on gate or up, one by proxy, or, in a dense model whose "
                "weights are read as stored, one on ffn_in.",
                next_step="Decode it in memory, or convert it to such an activation.",
            )
        if by_columns:
            self._check_columns()
            return neuron_layout(self.stored, self.weights, "columns", "gate")
        if self.limits.gamma != 1:
            raise ModelError(
                f"gamma is {self.limits.gamma:g}, and the neurons of {self.stored.folder} do not depend on what is in memory.",
                allowed="1, or a model whose masks choose inputs, such as those of DIP.",
            )
        if self.limits.prefetch in FITTED and has_experts(config):
            raise ModelError(
                f"prefetch {self.limits.prefetch} guesses from the layer before, and which experts come next is not known then.",
                allowed="none, persistence or frequency with experts.",
            )
        chosen_before = self.predictors is not None or routed
        layout: Layout = "whole" if chosen_before and not dense else "apart"
        return neuron_layout(self.stored, self.weights, layout, "up" if up_first else "gate")

    def _has_columns(self, rules: Any) -> bool:
        """Whether the masks choose inputs whose columns can be read from a file."""
        own = rules.get("ffn_in")
        plain = own is not None and not own.rotated and own.remainder != "low_rank"
        return plain and self.weights == "stored" and not has_experts(self.stored.config) and self.predictors is None

    def _check_columns(self) -> None:
        limits = self.limits
        if limits.prefetch != "none":
            raise ModelError(
                f"prefetch {limits.prefetch} reads neurons, and the masks of {self.stored.folder} choose inputs.",
                allowed="none.",
            )
        if limits.policy == "static":
            raise ModelError(
                "The policy static holds neurons, and masks that choose inputs hold columns.", allowed="lru or lfu."
            )
        if not 0 <= limits.gamma <= 1:
            raise ModelError(f"gamma is {limits.gamma:g}.", allowed="0 to 1.")

    def _resident(self) -> dict[str, int]:
        """Bytes of every tensor that stays in memory, by name."""
        ffn = _neuron_weights(self.model)
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {
            name: self.stored.tensor(name).nbytes
            for name, tensor in own.items()
            if id(tensor) not in ffn and name in self.stored
        }

    def resident_bytes(self) -> int:
        """Of everything that stays in memory besides neurons."""
        total = sum(self._resident().values())
        if self.blocks is not None:
            for name, linear in projections(self.model).items():
                outputs, inputs = linear.weight.shape
                format = head_format(self.blocks) if name == HEAD else self.blocks
                total += outputs * row_bytes(inputs, format, self.stored.dtype)
                if not (name == HEAD and self.stored.config.tie_word_embeddings):
                    total -= outputs * inputs * self.stored.dtype.itemsize
        if ranks_by_proxy(site_rules(self.stored.config)):
            config = self.stored.config
            of_block = 2 * num_neurons(config) * row_bytes(config.hidden_size, "int4", self.stored.dtype)
            total += of_block * num_experts(config) * config.num_hidden_layers
        if self.predictors is not None:
            total += sum(one.a.nbytes + one.b.nbytes for layer in self.predictors.layers for one in layer)
        return total

    def _working_bytes(self) -> int:
        """Memory that prompts and steps need for a time."""
        config, item = self.stored.config, self.stored.dtype.itemsize
        neurons, hidden = num_neurons(config), config.hidden_size
        tokens = min(CHUNK_TOKENS, self.limits.context_tokens)
        heads = self.model.model.layers[0].self_attn.head_dim * config.num_key_value_heads
        cache = 2 * config.num_hidden_layers * heads * item * self.limits.context_tokens
        states = tokens * (5 * neurons + 8 * hidden) * 4 + 12 * self.limits.context_tokens * hidden * 4
        copies = neurons * hidden * item * (1 if self.blocks is None else 4)
        if self.blocks is not None and not config.tie_word_embeddings:  # while blocks of it are made
            copies = max(copies, config.vocab_size * hidden * item)
        if self.limits.prefetch in FITTED:
            states += PromptExamples.num_bytes(config.num_hidden_layers, hidden, neurons)
        return round(CACHE_ROOM * cache) + states + copies + 16 * config.vocab_size + OTHER_BYTES

    def _check_memory(self, layout: NeuronLayout, folder: Path) -> None:
        """Refuses a limit before anything is read or written."""
        needed = (
            rss_bytes() + self.resident_bytes() + self._working_bytes() + _ring_bytes(layout) + smallest_memory(layout)
        )
        if needed > self.limits.memory_bytes:
            raise self._too_small(needed)

    def _too_small(self, needed: int) -> RunError:
        config = self.stored.config
        megabytes = -(-needed * 101 // 100 // 10**6)
        return RunError(
            f"{self.stored.folder} cannot be decoded in {self.limits.memory_bytes / 1e6:,.0f} MB: attention, embeddings and the "
            f"output layer take {self.resident_bytes() / 1e6:,.0f} MB, one feed-forward block "
            f"{3 * num_neurons(config) * row_bytes(config.hidden_size, self.weights, self.stored.dtype) / 1e6:,.0f} MB, and "
            f"Python, torch and what a prompt needs the rest.",
            allowed=f"{megabytes:,} MB or more.".replace(",", ""),
            next_step=f"Give --memory {megabytes}MB, fewer tokens of context, or --weights int8.",
        )

    # ---- loading ----

    def _skeleton(self) -> Any:
        """The model without weights."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.stored.dtype)
        try:
            with init_empty_weights(include_buffers=False), no_init_weights():
                model = self.stored.family.model(self.stored.config)
        finally:
            torch.set_default_dtype(before)
        model.generation_config = self.stored.generation_config()
        return model.eval().requires_grad_(False)

    def _load_resident(self) -> None:
        model, stored = self.model, self.stored
        tied = stored.config.tie_word_embeddings
        ffn = _neuron_weights(model)
        in_blocks = {id(one.weight) for one in projections(model).values()} if self.blocks is not None else set()
        if tied:
            in_blocks.discard(id(model.get_input_embeddings().weight))
        for module_name, module in model.named_modules():
            computed = module._non_persistent_buffers_set
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or name in computed or id(tensor) in ffn or id(tensor) in in_blocks:
                    continue
                full = f"{module_name}.{name}"
                if tied and full == "lm_head.weight":
                    continue
                source = stored.tensor(full)
                if source.shape != tuple(tensor.shape):
                    raise ModelError(
                        f"{full} of {stored.folder} is {list(source.shape)}.", allowed=f"{list(tensor.shape)}."
                    )
                value = source.read()
                if name in module._buffers:
                    module._buffers[name] = value.to(tensor.dtype)
                else:
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)
        if tied:
            model.tie_weights()

    def _put(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)

    def finish(self, given: Projections) -> None:
        """Makes blocks of the attention's projections and of the output layer, one after the other, if there are any."""
        self.model.save_pretrained = _refuse_to_save
        for name, linear in projections(self.model).items() if self.blocks is not None else ():
            if linear.weight.is_meta:
                full = f"{name}.weight" if name == HEAD else _attention_name(name)
                self._put(linear, "weight", self.stored.tensor(full).read())
            matrix = given.matrix(name, linear)
            assert isinstance(matrix, BlockMatrix)
            linear.forward = BlockProduct(matrix, linear, by_columns=given.by_columns(name))
            if not (name == HEAD and self.stored.config.tie_word_embeddings):
                empty = torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device="meta")
                self._put(linear, "weight", empty)
            given.freeze(name)

    def forward(self, layer: int, block: Any, options: Options) -> BlockForward:
        """The forward of a layer's block."""
        experts = num_experts(self.stored.config)
        if has_experts(self.stored.config):
            assert isinstance(self.cache, NeuronCache)
            made = StoredExpertsForward(block, options, self.cache, layer * experts)
        else:
            made = StoredMlpForward(block, options, self.cache, layer)
        if made.ranks_by_proxy:
            self._make_proxies(layer, made)
        return made

    def _make_proxies(self, layer: int, forward: BlockForward) -> None:
        """Makes the int4 copies that rank a block's neurons."""
        fused = has_experts(self.stored.config)
        for expert in range(forward.count()):
            gate, up, _ = self.stored.block(layer, expert if fused else None)
            copied = forward._copied(expert)
            for (kept, _), sources in zip(copied, ((gate, up),) if fused else ((gate,), (up,)), strict=True):
                weight = torch.cat([one.read() for one in sources])
                kept.of(expert, [weight], lambda weight=weight: [weight])
        for kept, _ in forward._copied(0):
            kept.freeze()


def _ring_bytes(layout: NeuronLayout) -> int:
    return column_ring_bytes(layout) if layout.layout == "columns" else ring_bytes(layout)


def _neuron_weights(model: Any) -> set[int]:
    """Ids of the parameters whose rows are in the neuron file."""
    found: list[Any] = []
    for block in model.ffn_blocks():
        if is_fused(block):
            found += [block.gate_up_proj, block.down_proj]
        else:
            found += [block.gate_proj.weight, block.up_proj.weight, block.down_proj.weight]
    return {id(one) for one in found}


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise ModelError(
        "The model's neurons are in a file, so it cannot be saved.",
        next_step="Copy the folder that it was loaded from.",
    )


def _attention_name(name: str) -> str:
    layers, index, projection = name.split(".")
    return f"model.{layers}.{index}.self_attn.{projection}_proj.weight"


def _trim() -> None:
    """Gives freed memory back to the system, where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class OffloadedStep(StepForward):
    """Forward of a model whose neurons are in a file: says what went wrong with it, and keeps the cache within its room."""

    def __init__(self, offloaded: OffloadedModel, forwards: Any, given: Projections, threads: int | None) -> None:
        super().__init__(offloaded.model, forwards, given, threads)
        self.offloaded = offloaded

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self.offloaded.cache
        self._check_room(args, kwargs)
        cache.file.check()
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None and ids.shape[1] == 1:
            cache.hold()
        few = ids is not None and ids.numel() <= MAX_TOKENS
        with _interrupts_wait() if few else nullcontext():
            try:
                output = super().__call__(*args, **kwargs)
            except Exception:
                cache.raise_failure()
                raise
            cache.raise_failure()
        return output

    def _check_room(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            return
        past = kwargs.get("past_key_values")
        positions = ids.shape[1] + (0 if past is None else int(past.get_seq_length()))
        room = self.offloaded.limits.context_tokens
        if len(ids) * positions > room:
            raise RunError(
                f"{len(ids) * positions:,} positions of keys and values do not fit into the memory that was set aside for them.",
                allowed=f"{room:,}, as context_tokens says.",
                next_step="Give a shorter text, or a larger context_tokens.",
            )


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Handles what comes of SIGINT and SIGTERM when the step inside has ended: their handlers raise, and C++ cannot be left so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    mine = [one for one, handler in before.items() if callable(handler)]
    for one in mine:
        signal.signal(one, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for one in mine:
            signal.signal(one, before[one])
        for number in came[:1]:
            signal.raise_signal(number)


__all__ = [
    "CONTEXT_TOKENS",
    "Limits",
    "OffloadedModel",
    "OffloadedStep",
    "parse_memory",
    "peak_rss_bytes",
    "rss_bytes",
]
