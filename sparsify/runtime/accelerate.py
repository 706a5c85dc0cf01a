"""Makes decoding read only the weights of neurons that fire; counts the bytes that dense decoding reads.

`generate()`, its cache and its sampling are unchanged. A decoding step is one call of the C++ kernels for the whole model, on a GPU
one CUDA graph (`step.py`). Otherwise a block's forward calls the kernels for a few tokens, and the class's forward for long prompts, training, and
blocks whose activation has hooks. Nothing is copied: weights keep their names, shapes and values, and down_proj gets another order in
memory (a neuron's column becomes contiguous), as do projections whose input is masked; moving and casting keep it. Only int8 and int4
blocks are copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from sparsify.errors import ModelError
from sparsify.models import FAMILIES
from sparsify.models.activations import ACTIVATIONS, activation_names
from sparsify.models.integer_linear import CODES, quantisation
from sparsify.models.masking import GROUP, experts_per_token, is_fused, num_experts, ranks_by_proxy, site_rules
from sparsify.models.quantised import BlockFormat
from sparsify.runtime.block_weights import check_not_dropped, drop_block, drop_projections
from sparsify.runtime.build import load_formats
from sparsify.runtime.columns import held_by_columns
from sparsify.runtime.ffn import backend_of, native_can
from sparsify.runtime.file_reads import NeuronReads
from sparsify.runtime.forwards import BlockForward, ExpertsForward, MlpForward
from sparsify.runtime.integer_projections import IntegerProjections
from sparsify.runtime.masks import is_readable, unknown_to_blocks
from sparsify.runtime.native_ffn import STORED_FORMATS
from sparsify.runtime.native_step import Projections, head_format
from sparsify.runtime.neuron_cache import RUNTIME_POLICIES
from sparsify.runtime.offload import CONTEXT_TOKENS, Limits, OffloadedModel, OffloadedStep, parse_memory
from sparsify.runtime.packed import PACKED
from sparsify.runtime.prefetch import PREFETCHES, Prefetch
from sparsify.runtime.step import StepForward
from sparsify.runtime.stored_weights import StoredModel
from sparsify.runtime.weights import AttentionReads, LayerPredictors, Options, RowsRead

WEIGHT_FORMATS = ("stored", *get_args(BlockFormat))
"""How decoding may read the feed-forward weights."""


@dataclass
class BlockReads:
    """Weights of one layer that decoding has read since `reset`.

    Args:
        tokens: Tokens that the block, or all its experts together, computed.
        bytes_read: Bytes of weights that the block read, predictors included.
        rows: Rows read and rows offered.
        touched_share: Share of the bytes of the block's three projections that were read.
        attention: What native steps read of the attention's projections.
    """

    tokens: int = 0
    bytes_read: int = 0
    rows: RowsRead = field(default_factory=RowsRead)
    touched_share: float = 0.0
    attention: AttentionReads = field(default_factory=AttentionReads)

    @property
    def offered(self) -> int:
        """Rows of one projection that could have been read."""
        return self.rows.offered


class Acceleration:
    """Handle of an accelerated model: counts its reads, and undoes the acceleration."""

    def __init__(
        self, model: Any, offloaded: OffloadedModel | None = None, integers: IntegerProjections | None = None
    ) -> None:
        self._model, self.offloaded, self.integers = model, offloaded, integers

    @property
    def model(self) -> Any:
        """The accelerated model."""
        return self._model

    @property
    def neurons(self) -> NeuronReads | None:
        """What was read of a file of neurons since `reset`; None if all of them are in memory."""
        return None if self.offloaded is None else self.offloaded.cache.counts

    @property
    def forwards(self) -> list[BlockForward]:
        """The forward of every layer's block, in order; none of a model of integers, whose projections have forwards."""
        if self.integers is not None:
            return []
        return [vars(block)["forward"] for block in self._model.ffn_blocks()]

    @property
    def reads(self) -> list[BlockReads]:
        """Reads of every layer since `reset`. On a GPU this synchronises with the device."""
        return [
            BlockReads(one.tokens, one.bytes_read, one.rows, one.touched_share, one.attention) for one in self.forwards
        ]

    @property
    def backend(self) -> str:
        if self.integers is not None:
            return "integers"
        in_blocks = any(one.kept is not None for one in self.forwards)
        return backend_of(next(self._model.parameters()), in_blocks=in_blocks)

    @property
    def kept_bytes(self) -> int:
        """Memory of int8 or int4 blocks, in addition to the stored weights if these were kept, of int4 copies that rank neurons, and
        of integers as the kernels read them.
        """
        if self.integers is not None:
            return self.integers.num_bytes
        ffn = sum(one.kept.num_bytes for one in self.forwards if one.kept is not None)
        return ffn + sum(one.copied_bytes for one in self.forwards) + self._model.forward.projections.num_bytes

    @property
    def other_bytes(self) -> int:
        """Bytes of weights that a decoding step reads outside the feed-forward blocks: the mean of native steps since `reset`, where
        inputs of the attention's projections are masked.
        """
        everything = model_bytes(self._model).other
        if self.integers is not None:
            return everything
        blocks = self._model.forward.projections.num_bytes
        everything += blocks - self._model.forward.projections.replaced_bytes(self._model)
        reads = [one.attention for one in self.forwards]
        skipped = sum((one.bytes_offered - one.bytes_read) / max(one.steps, 1) for one in reads)
        return round(everything - skipped)

    @property
    def seconds(self) -> dict[str, float] | None:
        """Seconds of all native steps since the weights last changed, by part of the model; None before the first."""
        return None if self.integers is not None else self._model.forward.seconds()

    def reset(self) -> None:
        for forward in self.forwards:
            forward.reset()
        if self.offloaded is not None:
            self.offloaded.cache.reset_counts()

    def remove(self) -> None:
        """Restores the model's own forward. The order of projections in memory stays.

        Raises:
            ModelError: If the stored weights were freed, or are in a file.
        """
        if self.offloaded is not None:
            raise ModelError(
                "The model's neurons are in a file, which only this acceleration reads.",
                next_step="Load the model again, without memory=.",
            )
        if self.integers is not None:
            return self.integers.remove()
        check_not_dropped(self._model)
        for forward in self.forwards:
            forward.remove()
        del self._model.forward


def accelerate(
    model: Any,
    *,
    weights: str = "stored",
    predictors: LayerPredictors | Callable[[Any, StoredModel], LayerPredictors] | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
    keep_weights: bool = True,
    dense: bool = False,
    packed: bool | None = None,
    memory: str | int | None = None,
    policy: str = "lru",
    prefetch: Prefetch = "none",
    gamma: float = 1.0,
    context_tokens: int = CONTEXT_TOKENS,
    neuron_memory: str | int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Acceleration:
    """Makes the decoding of a sparse model read only the rows it needs.

    A step of one token for each sequence is one call that computes the whole model: of the compiled kernels on a CPU, of a CUDA graph
    on a GPU. All other calls go through the model's own forward, whose blocks skip rows where they can.

    Masks that the model stores are applied on every path. Those on `gate`, `up` and `inter` save rows of what is read after them,
    those on the inputs of projections save columns of these.

    With `memory`, `model` is a folder with a sparse model, which is loaded and decoded in no more memory than that: what is not a
    feed-forward neuron is in memory, and neurons are read from a file, which is written once.

    Args:
        model: A sparse model of any family: an exported bundle as transformers loads it, or one of this package.
        weights: One of WEIGHT_FORMATS. `stored` reads the model's own weights; `int8` and `int4` round them into blocks of
            32 for decoding, 8.5 or 4.5 bits a weight; the output layer is int8 in both. After a change, move or cast of the
            weights the next step makes new blocks; writes through `.data` are not noticed.
        predictors: Predictors of this model: `read_predictors(folder).for_decoding(model, where)`. Exact decoding without. With
            `memory`, a function that makes them, given the model without weights and where its weights are.
        max_tokens: Largest number of tokens of a step, over the whole batch, for which the kernels are used. Default: 8, or 4
            on a CPU with stored bf16 weights, where torch's dense product is faster from about six tokens on.
        threads: Threads of the C++ kernels; default: torch's number.
        keep_weights: Whether the stored weights stay in addition to int8 or int4 blocks. Without them prompts are multiplied with the
            blocks, too, and the model can be neither saved, moved nor trained. It changes nothing for `stored`.
        dense: Read every row: the baseline of speed-ups. A dense model is accepted, too.
        packed: Whether zeros among the weights are skipped, at one bit for each weight: a copy of the weights of all
            projections. By default where `config.weight_sparsity` says that they are sparse, this is a CPU with the compiled kernels,
            weights are bf16, int8 or int4, and not `dense`. The output layer stays dense.
        memory: Most memory of this process, everything included, such as "4GB"; None for a model that is in memory.
        policy: Which neurons stay in memory: one of RUNTIME_POLICIES. Of `memory` alone, as all that follow.
        prefetch: Which neurons of the next layer are read while this one is computed: `none`, `persistence` or `frequency`.
        gamma: Where masks choose inputs (DIP): below 1 they prefer what is in memory, by this factor of the sizes of what is not.
        context_tokens: Positions, over all sequences, whose keys and values have room in the memory.
        neuron_memory: Most memory for neurons alone; None for what is left of `memory`.
        tell: Gets a line of text while the file of neurons is written.

    Returns:
        A handle that counts the reads. The model itself is changed in place; one that was loaded is the handle's `model`.

    Raises:
        RunError: If the memory is too small, with the smallest that works.
        StorageError: If the file of neurons cannot be written or read.
        ModelError: If the model is not a sparse one, or makes no zeros, or int8 or int4 blocks are requested for a
            model that is not on a CPU, or its stored weights were freed before.
    """
    blocks = block_format(weights)
    offloaded = None
    if memory is not None:
        most = None if neuron_memory is None else parse_memory(neuron_memory)
        limits = Limits(parse_memory(memory), policy, prefetch, context_tokens, most, gamma)
        offloaded = _offloaded(model, limits, weights, predictors, dense, tell)
        model, predictors = offloaded.model, offloaded.predictors
    elif isinstance(model, str | Path):
        raise ModelError(f"{model} is a folder.", next_step="Load the model, or give memory= to decode it from there.")
    assert not callable(predictors)
    check_acceleratable(model, dense=dense)
    if quantisation(model.config) is not None:
        _check_integers(weights, predictors, dense=dense, packed=bool(packed))
        return Acceleration(model, integers=IntegerProjections(model, threads))
    check_not_dropped(model)
    if blocks is not None:
        _check_device(model, weights)
    if packed is None:
        packed = offloaded is None and is_packed(model, blocks, dense=dense)
    elif packed and offloaded is not None:
        raise ModelError("Neurons in a file are not packed.", next_step="Omit packed= or memory=.")
    if packed:
        _check_packable(model, blocks)
    load_formats(_formats_read(model, blocks, packed=packed))
    if ranks_by_proxy(site_rules(model.config)):
        _check_proxies(model, weights, predictors)
    if GROUP in site_rules(model.config):
        _check_routers(model, predictors)
    held = frozenset() if dense or packed else held_by_columns(model, in_blocks=blocks is not None)
    if offloaded is not None and not offloaded.by_columns:
        held -= {"gate", "up"}  # the file has their rows
    for layer, block in enumerate(model.ffn_blocks()):
        if "forward" in vars(block):
            vars(block)["forward"].remove()
        own = None if predictors is None else predictors.layers[layer]
        # Of predicted neurons alone, rows are fewer bytes than columns.
        options = Options(max_tokens, threads, own, blocks, dense, held if own is None else frozenset(), packed)
        if offloaded is not None:
            block.forward = offloaded.forward(layer, block, options)
            if blocks is not None:
                drop_block(block.forward)
        else:
            block.forward = (ExpertsForward if is_fused(block) else MlpForward)(block, options)
        block.forward.prepare()
        if offloaded is None and blocks is not None and not keep_weights:
            drop_block(block.forward)
        if predictors is not None and predictors.input == "residual":
            name = FAMILIES[model.config.model_type].ffn_norm
            if name is not None:  # otherwise the block reads the residual itself
                block.forward.watch(getattr(model.model.layers[layer], name))
    forwards = [vars(block)["forward"] for block in model.ffn_blocks()]
    given = Projections(blocks, held, packed=packed)
    if offloaded is not None:
        model.forward = OffloadedStep(offloaded, forwards, given, threads)
        offloaded.finish(given)
        return Acceleration(model, offloaded)
    model.forward = StepForward(model, forwards, given, threads)
    if packed or (blocks is not None and keep_weights):
        model.forward.prepare()
    if blocks is not None and not keep_weights:
        drop_projections(model, model.forward.projections)
    return Acceleration(model)


def _offloaded(
    folder: Any,
    limits: Limits,
    weights: str,
    predictors: LayerPredictors | Callable[[Any, StoredModel], LayerPredictors] | None,
    dense: bool,
    tell: Callable[[str], None],
) -> OffloadedModel:
    """Loads a model whose neurons stay in a file."""
    if not isinstance(folder, str | Path):
        raise ModelError(
            f"A {type(folder).__name__} is in memory already, so memory= cannot keep a limit.",
            allowed="The folder of a sparse model.",
        )
    if limits.policy not in RUNTIME_POLICIES:
        raise ModelError(f"There is no policy {limits.policy!r}.", allowed=f"{', '.join(RUNTIME_POLICIES)}.")
    if limits.prefetch not in PREFETCHES:
        raise ModelError(f"There is no prefetch {limits.prefetch!r}.", allowed=f"{', '.join(PREFETCHES)}.")
    if isinstance(predictors, LayerPredictors):
        raise ModelError(
            "Predictors of a model that is not loaded yet must be made while it is.",
            next_step="Give a function of the model and of where its weights are.",
        )

    def check(model: Any) -> None:
        check_acceleratable(model, dense=dense)
        if quantisation(model.config) is not None:
            raise ModelError(
                "The model holds integers instead of weights, and a file of neurons holds weights.",
                next_step="Omit memory= (--memory).",
            )

    return OffloadedModel(
        Path(folder), limits, weights=weights, predictors=predictors, dense=dense, check=check, tell=tell
    )


def _formats_read(model: Any, blocks: BlockFormat | None, *, packed: bool) -> set[str]:
    """Formats whose kernels a step reads most of the weights with; compiled together, they take less time."""
    like = next(model.parameters())
    if like.device.type != "cpu" or like.dtype not in STORED_FORMATS:
        return set()
    head = STORED_FORMATS[like.dtype] if blocks is None else head_format(blocks)
    return {head, PACKED[blocks] if packed else blocks or head}


def block_format(weights: str) -> BlockFormat | None:
    """The block format of one of WEIGHT_FORMATS; None for stored weights."""
    if weights not in WEIGHT_FORMATS:
        raise ModelError(f"Weights cannot be read as {weights!r}.", allowed=f"{', '.join(WEIGHT_FORMATS)}.")
    return next((one for one in get_args(BlockFormat) if one == weights), None)


def is_packed(model: Any, blocks: BlockFormat | None, *, dense: bool) -> bool:
    """Whether a model's weights are read packed unless somebody says."""
    like = next(model.parameters())
    fits = blocks is not None or like.dtype == torch.bfloat16
    return bool(getattr(model.config, "weight_sparsity", None)) and not dense and fits and native_can(like)


def _check_packable(model: Any, blocks: BlockFormat | None) -> None:
    like = next(model.parameters())
    if not native_can(like):
        raise ModelError(
            f"Packed weights are read by the compiled kernels alone, and these cannot be used for {like.dtype} on {like.device}.",
            next_step="Omit packed=, or move the model to a CPU with a C++ compiler.",
        )
    if blocks is None and like.dtype != torch.bfloat16:
        raise ModelError(
            f"Stored weights are packed as bf16, and the model's are {like.dtype}.",
            next_step="Load it in bf16, choose weights= int8 or int4, or omit packed=.",
        )


def _check_device(model: Any, weights: str) -> None:
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ModelError(
            f"The model is on {device}, and {weights} blocks can only be read on a CPU.",
            next_step="Move the model to the CPU, or omit weights=.",
        )


def _check_proxies(model: Any, weights: str, predictors: LayerPredictors | None) -> None:
    reason, next_step = "", "Omit predictors=."
    if predictors is not None:
        reason = "Its mask chooses neurons by int4 copies of their weights; predictors would choose once more."
    elif weights == "int4":
        reason = "Its mask ranks neurons by int4 copies of gate and up: int4 weights are these copies, and nothing is left to save."
        next_step = "Read its weights as int8 or stored, or mask it by another method."
    elif next(model.parameters()).device.type != "cpu":
        reason = "Its mask ranks neurons by int4 copies of gate and up, which only the kernels for a CPU read."
        next_step = "Move the model to the CPU, or decode it as it is: model.generate() alone."
    if reason:
        raise ModelError(reason, next_step=next_step)


def _check_routers(model: Any, predictors: LayerPredictors | None) -> None:
    if predictors is not None:
        raise ModelError(
            "Its routers choose groups of neurons; predictors would choose once more.", next_step="Omit predictors=."
        )
    if next(model.parameters()).device.type != "cpu":
        raise ModelError(
            "Its routers choose groups of neurons, which only the kernels for a CPU read.",
            next_step="Move the model to the CPU, or decode it as it is: model.generate() alone.",
        )


def _check_integers(weights: str, predictors: LayerPredictors | None, *, dense: bool, packed: bool) -> None:
    given = {"weights": weights != "stored", "predictors": predictors is not None, "dense": dense, "packed": packed}
    if any(given.values()):
        names = " and ".join(name for name, one in given.items() if one)
        raise ModelError(
            f"The model holds integers instead of weights, which are read as they are and all of them; given: {names}.",
            next_step="Omit that, or accelerate the model that it was made from.",
        )


def check_acceleratable(model: Any, *, dense: bool = False) -> None:
    """Raises ModelError if a model is not sparse (allowed if `dense`), not of a known type, or has layers that the kernels
    cannot read.
    """
    if not hasattr(model, "ffn_blocks") or model.config.model_type not in FAMILIES:
        raise ModelError(
            f"{type(model).__name__} has no blocks with a named activation.",
            allowed="A bundle that `sparsify export` wrote, or a folder that `sparsify convert` wrote.",
            next_step="Convert the checkpoint first: sparsify convert MODEL --activation drelu --to DIR",
        )
    for layer, block in enumerate(model.ffn_blocks()):
        activation = block.ffn_activation
        if activation.name not in ACTIVATIONS:
            raise ModelError(
                f"Layer {layer} has the activation {activation.name!r}, which no kernel knows.",
                allowed=f"Activations: {', '.join(ACTIVATIONS)}.",
            )
        if unknown := unknown_to_blocks(model.config):
            raise ModelError(
                f"The model stores {unknown}, which the kernels do not apply.",
                allowed="By proxy thresholds, otherwise every rule.",
                next_step="Decode it as it is, under its mask: sparsify generate --dense, or model.generate() alone.",
            )
        if quantisation(model.config) is not None:
            continue  # nothing is skipped, and what its projections are the model says itself
        # Bundles from older versions have only `threshold`.
        masks = [getattr(activation, name, None) for name in ("threshold", "gate_mask")]
        row = ACTIVATIONS[activation.name]
        has_zeros = row.makes_zeros or masks != [None, None] or site_rules(model.config)
        if not dense and not has_zeros and not getattr(model.config, "weight_sparsity", None):
            sparse = activation_names(lambda row: row.makes_zeros)
            raise ModelError(
                f"The model is dense: {row.name} makes no zeros, so there is nothing to skip.",
                allowed=f"{', '.join(sparse)}, or a mask.",
                next_step="Convert it and train it first: sparsify train RECIPE",
            )
        for name, part in block.named_children():
            if name.endswith("_proj") and not is_readable(part):
                raise ModelError(
                    f"{name} of layer {layer} is {part}, which the kernels cannot read.",
                    allowed="Plain linear layers without biases in fp32, bf16 or fp16.",
                    next_step="Merge adapters into the weights, or load the model without quantisation.",
                )


__all__ = [
    "WEIGHT_FORMATS",
    "Acceleration",
    "BlockReads",
    "accelerate",
    "block_format",
    "check_acceleratable",
]


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a model's weights.

    Args:
        ffn_per_token: Feed-forward blocks; of a mixture, the experts that one token is sent to.
        other: Attention, norms, routers and the output layer. The one row of the input embedding that a token
            reads is not counted.
    """

    ffn_per_token: float
    other: int

    @property
    def total(self) -> float:
        return self.ffn_per_token + self.other


def model_bytes(model: Any) -> ModelBytes:
    """Counts a sparse model's weights."""
    ffn = sum(_bytes(block) for block in model.ffn_blocks())
    embedding = model.get_input_embeddings()
    tied = model.get_output_embeddings().weight is embedding.weight
    other = _bytes(model) - ffn - (0 if tied else _bytes(embedding))
    config = model.config
    experts = num_experts(config)
    return ModelBytes(ffn * experts_per_token(config) / experts, other)


def _bytes(module: Any) -> int:
    codes = (part for one in module.modules() if hasattr(one, CODES) for part in one.buffers(recurse=False))
    return sum(one.nbytes for one in (*module.parameters(), *codes))
