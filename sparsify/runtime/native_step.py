"""Describes a whole model to the C++ kernels, which then compute one decoding step in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsify.models import FAMILIES
from sparsify.models.masking import experts_per_token, is_fused, num_experts
from sparsify.models.quantised import BlockFormat, KeptBlocks
from sparsify.runtime.build import kernels
from sparsify.runtime.cache_store import Place
from sparsify.runtime.columns import columns_first, rows_first
from sparsify.runtime.forwards import BlockForward, kept_weights
from sparsify.runtime.masks import bases_of, constant_of, low_rank_of, num_bytes, own_mask, own_part
from sparsify.runtime.native_ffn import (
    NATIVE_DTYPES,
    CLowRank,
    CMask,
    CMatrix,
    FfnCall,
    c_mask,
    c_matrix,
    ffn_call,
    weight_format,
)
from sparsify.runtime.weights import Matrix, line_bytes

PARTS = ("projections", "attention", "ffn", "head", "rest")
"""Where the time of a step goes, as `Part` in native/step.h."""
NORMS = ("attention_norm", "ffn_norm", "attention_output_norm", "ffn_output_norm")
"""Norms of a layer, as a `Family` names them."""
THREAD_BYTES = 1 << 19
"""A step has one thread for each THREAD_BYTES of a layer's weights, at most torch's number: synchronising costs time."""


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", CMatrix),
        ("outputs", ctypes.c_int64),
        ("mask", ctypes.POINTER(CMask)),
        ("constant", ctypes.c_void_p),
        ("low_rank", CLowRank),
        ("format", ctypes.c_int32),
        ("by_columns", ctypes.c_int32),
        ("columns_read", ctypes.c_int64),
    )


class StepLayer(ctypes.Structure):
    """One layer; mirrors StepLayer in native/step.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in NORMS),
        *((name, _Linear) for name in ("q", "k", "v", "o")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "router", "q_norm", "k_norm")),
        ("experts", ctypes.POINTER(FfnCall)),
        *((name, ctypes.c_int64) for name in ("windowed", "tokens")),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("cached", "batch_stride", "head_stride")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "visible")),
        ("scaling", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    )


class StepCall(ctypes.Structure):
    """Arguments of a step; mirrors StepCall in native/step.h."""

    _fields_ = (
        *((name, _Attention) for name in ("attention", "windowed")),
        *((name, ctypes.c_int64) for name in ("hidden", "layers", "num_experts", "experts_per_token")),
        *((name, ctypes.c_void_p) for name in ("ids", "embedding", "final_norm")),
        ("head", _Linear),
        ("layer", ctypes.POINTER(StepLayer)),
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("norm_epsilon", "embedding_scale")),
        *((name, ctypes.c_int32) for name in ("rounds_before_factors", "norms_all_heads")),
        *((name, ctypes.c_int32) for name in ("dtype", "threads", "predictor_reads_residual")),
        ("seconds", ctypes.c_double * len(PARTS)),
    )


HEAD = "lm_head"
ATTENTION = ("q", "k", "v", "o")


def projections(model: Any) -> dict[str, nn.Linear]:
    """The attention's projections and the output layer, by names that a plan uses."""
    named = {
        f"layers.{index}.{one}": getattr(layer.self_attn, f"{one}_proj")
        for index, layer in enumerate(model.model.layers)
        for one in ATTENTION
    }
    return named | {HEAD: model.lm_head}


def head_format(blocks: BlockFormat) -> BlockFormat:
    """Format of the output layer, whose rounding costs more than that of any other matrix: int8 also among int4."""
    return "int8" if blocks == "int4" else blocks


class Reach(NamedTuple):
    """Layers that attend to the same positions, with the same rotary embedding.

    Attributes:
        kind: Of `config.layer_types`.
        layers: Their numbers, ascending.
        positions: How many positions they attend to, that of the new token included; None for all.
    """

    kind: str
    layers: tuple[int, ...]
    positions: int | None


def reaches(config: Any) -> list[Reach]:
    """The layers of a model by what they attend to; those that attend to everything come first."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    return [
        Reach(
            kind,
            tuple(index for index, one in enumerate(kinds) if one == kind),
            window if kind == "sliding_attention" else None,
        )
        for kind in sorted(set(kinds))
    ]


class Sight(NamedTuple):
    """What the layers of one `Reach` read in a step.

    Attributes:
        place: Keys and values of these layers; a list of addresses that was given before must not have changed.
        cos: fp32 [tokens, head_dim], contiguous, of each sequence's position.
        sin: The same.
        visible: uint8 [tokens, cached + 1], contiguous; None if every position is visible.
    """

    place: Place
    cos: torch.Tensor
    sin: torch.Tensor
    visible: torch.Tensor | None


class Projections:
    """The attention's projections and the output layer as C++ reads them: stored or in blocks, by rows or by columns.

    Args:
        blocks: Format of the blocks; None as stored.
        held: Projections that are held by columns, of `held_by_columns`.
        packed: Whether zeros among the attention's weights are skipped.
    """

    def __init__(self, blocks: BlockFormat | None, held: frozenset[str] = frozenset(), *, packed: bool = False) -> None:
        self._blocks: BlockFormat | None = blocks
        self._packed = packed
        self._held = held
        self._kept: dict[str, KeptBlocks] = {}

    def by_columns(self, name: str) -> bool:
        """Whether one of `projections` is held by columns."""
        return name.rpartition(".")[2] in self._held

    def matrix(self, name: str, linear: nn.Linear) -> Matrix:
        """The weight of one of `projections`, [outputs, inputs], or its transpose if it is held by columns."""
        weight, by_columns = linear.weight, self.by_columns(name)
        if name not in self._kept:
            format = head_format(self._blocks) if name == HEAD and self._blocks is not None else self._blocks
            kept = kept_weights(format, packed=self._packed and name != HEAD)
            if kept is None:
                return columns_first(weight) if by_columns else rows_first(weight)
            self._kept[name] = kept
        lines = {0} if by_columns else set[int]()
        return self._kept[name].of(0, (weight,), lambda: (weight.mT if by_columns else weight,), lines)[0]

    def freeze(self, name: str) -> None:
        """Keeps the blocks of one of them, whatever happens to its weight."""
        self._kept[name].freeze()

    @property
    def num_bytes(self) -> int:
        """Memory of blocks and packed weights."""
        return sum(one.num_bytes for one in self._kept.values())

    def replaced_bytes(self, model: Any) -> int:
        """Bytes of the stored weights that steps do not read, since they read these."""
        return sum(one.weight.nbytes for name, one in projections(model).items() if name in self._kept)


def norms_all_heads(attention: Any) -> bool:
    """Whether queries and keys are normed as one vector of all heads each."""
    norm = getattr(attention, "q_norm", None)
    return norm is not None and norm.weight.shape != (attention.head_dim,)


class StepPlan:
    """All addresses of a model's weights. It holds the tensors that they belong to; the caller watches for changes.

    Args:
        model: A sparse model on a CPU.
        forwards: The forward of each layer's block.
        given: What the attention's projections and the output layer are read from.
        threads: Threads of a step; default: see THREAD_BYTES.
    """

    def __init__(self, model: Any, forwards: Sequence[BlockForward], given: Projections, threads: int | None) -> None:
        library = kernels()
        assert library is not None, "the caller checks native_can"
        self._library = library
        self._held: list[Any] = []
        self._projections = given
        self._masks: dict[tuple[int, int | None], CMask] = {}
        self._lines: dict[str, tuple[int, int, int]] = {}
        self._others: list[int] = []
        config, layers, norm = model.config, model.model.layers, model.model.norm
        self._family = FAMILIES[config.model_type]
        self.dtype = model.model.embed_tokens.weight.dtype
        self.reaches = reaches(config)
        self.layers = (StepLayer * len(layers))()
        for index, (layer, forward) in enumerate(zip(layers, forwards, strict=True)):
            self._fill(self.layers[index], index, layer, forward, norm.weight)
            self.layers[index].windowed = index not in self.reaches[0].layers
        attention = layers[0].self_attn
        form = _Attention(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
            dtype=NATIVE_DTYPES[self.dtype],
        )
        scale = self._family.embedding_scale
        self.call = StepCall(
            attention=form,
            windowed=form,
            hidden=config.hidden_size,
            layers=len(layers),
            num_experts=num_experts(config) if is_fused(forwards[0].block) else 0,
            experts_per_token=experts_per_token(config),
            embedding=self._address(model.model.embed_tokens.weight),
            final_norm=self._factors(norm),
            head=self._linear(HEAD, model.lm_head),
            layer=ctypes.cast(self.layers, ctypes.POINTER(StepLayer)),
            norm_epsilon=config.rms_norm_eps,
            embedding_scale=1.0 if scale is None else float(torch.tensor(scale(config)).to(self.dtype)),
            rounds_before_factors=self._family.rounds_before_factors,
            norms_all_heads=norms_all_heads(attention),
            dtype=NATIVE_DTYPES[self.dtype],
            threads=threads or self._default_threads(model),
            predictor_reads_residual=forwards[0].reads_residual,
        )
        self._places: list[Place | None] = [None] * len(self.reaches)
        assert library.sparsify_step_bytes() == ctypes.sizeof(StepCall) + ctypes.sizeof(StepLayer)

    def _fill(self, to: StepLayer, index: int, layer: Any, forward: BlockForward, like: torch.Tensor) -> None:
        attention = layer.self_attn
        for name in NORMS:
            if (norm := getattr(self._family, name)) is not None:
                setattr(to, name, self._factors(getattr(layer, norm)))
        masks, others = [], 0
        for name in ATTENTION:
            linear = getattr(attention, f"{name}_proj")
            masks.append(own_mask(linear) or (own_mask(attention) if name != "o" else None))
            setattr(to, name, self._linear(f"layers.{index}.{name}", linear, masks[-1]))
            others += num_bytes(low_rank_of(linear))
        self._others.append(others + num_bytes(bases_of(*masks)))
        for name in ("q_norm", "k_norm"):
            if (norm := getattr(attention, name, None)) is not None:
                setattr(to, name, self._factors(norm))
        if is_fused(forward.block):
            to.router = self._address(layer.mlp.gate.weight)
        experts = (FfnCall * forward.count())()
        for expert in range(len(experts)):
            weights = forward.weights(expert, like)
            if forward.options.dense:
                weights = replace(weights, predictor=None)
            experts[expert], held = ffn_call(weights, forward.activation(), self.dtype)
            experts[expert].dense = forward.options.dense
            for name in ("gate", "up"):
                part = own_part(forward.block, name)
                mask = own_mask(part) or own_mask(forward.block)
                setattr(experts[expert], f"{name}_in_mask", self._mask(mask, weights.hidden, expert))
                setattr(experts[expert], f"{name}_low_rank", self._low_rank(part, expert))
            if weights.store is not None:
                weights.store.steer(experts[expert])
            self._held += [*held, weights]
        self._held.append(experts)
        to.experts = ctypes.cast(experts, ctypes.POINTER(FfnCall))

    def _linear(self, name: str, linear: nn.Linear, mask: Any = None) -> _Linear:
        matrix = self._projections.matrix(name, linear)
        read = c_matrix(matrix, self._held)
        factor_bytes = 0 if isinstance(matrix, torch.Tensor) else matrix.factor_bytes
        self._lines[name] = matrix.shape[0], line_bytes(matrix), factor_bytes
        constant = constant_of(linear)
        return _Linear(
            weight=read,
            outputs=linear.out_features,
            mask=self._mask(mask, linear.in_features),
            constant=None if constant is None else self._address(constant.float()),
            low_rank=self._low_rank(linear),
            format=weight_format(matrix),
            by_columns=self._projections.by_columns(name),
        )

    def _mask(self, module: Any, inputs: int, expert: int = 0) -> Any:
        """The mask of an input of so many elements; the same for all projections and experts that share it."""
        if module is None:
            return None
        numbers = dict(module.named_buffers(recurse=False)).items()
        of_experts = any(one.dim() > 1 for name, one in numbers if name != "basis")
        key = id(module), expert if of_experts else None
        if key not in self._masks:
            own = module.of_expert(expert) if of_experts else module
            self._masks[key] = c_mask(own, inputs, self.dtype, self._held)
        return ctypes.pointer(self._masks[key])

    def _low_rank(self, module: Any, expert: int = 0) -> CLowRank:
        """What replaces the dropped elements of a projection's input; of rank 0 if nothing does."""
        factors = low_rank_of(module, expert)
        if factors is None:
            return CLowRank()
        left, right = (c_matrix(one.detach().to(self.dtype), self._held) for one in factors)
        return CLowRank(left, right, factors[0].shape[1])

    def _factors(self, norm: nn.Module) -> int:
        """Address of what a norm multiplies by, fp32."""
        weight: Any = norm.weight
        return self._address(weight.float() + self._family.unit_offset)

    def _address(self, tensor: torch.Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._held.append(tensor)
        return tensor.data_ptr()

    def _default_threads(self, model: Any) -> int:
        layer, hidden = self.layers[0], model.config.hidden_size
        attention = model.model.layers[0].self_attn
        weights = sum(getattr(attention, f"{name}_proj").weight.numel() for name in ATTENTION)
        weights += 3 * layer.experts[0].neurons * hidden
        line = layer.experts[0].down_t.row_stride * (1 if layer.q.format else self.dtype.itemsize)
        return max(1, min(torch.get_num_threads(), weights * line // hidden // THREAD_BYTES))

    def attention_reads(self, index: int, steps: int) -> tuple[int, int]:
        """Bytes that so many steps read for a layer's attention projections, all since the last call, and that dense steps read."""
        read, offered = steps * self._others[index], 0
        for name in ATTENTION:
            linear, (lines, line, factors) = getattr(self.layers[index], name), self._lines[f"layers.{index}.{name}"]
            offered += steps * (lines * line + factors)
            read += (linear.columns_read if linear.by_columns else steps * lines) * line + steps * factors
            linear.columns_read = 0
        return read, offered

    def run(self, ids: torch.Tensor, sights: Sequence[Sight]) -> torch.Tensor:
        """One step.

        Args:
            ids: Token of each sequence, int64 [tokens], contiguous.
            sights: What the layers of each of `reaches` read; their keys and values are written behind it.

        Returns:
            Logits, [tokens, vocabulary], of the model's dtype.
        """
        call = self.call
        for index, (attention, sight) in enumerate(zip((call.attention, call.windowed), sights, strict=False)):
            place, visible = sight.place, sight.visible
            attention.tokens, attention.cached = len(ids), place.cached
            attention.batch_stride, attention.head_stride = place.strides
            attention.cos, attention.sin = sight.cos.data_ptr(), sight.sin.data_ptr()
            attention.visible = None if visible is None else visible.data_ptr()
            before = self._places[index]
            if before is None or place.keys is not before.keys or place.values is not before.values:
                for number, key, value in zip(self.reaches[index].layers, place.keys, place.values, strict=True):
                    self.layers[number].keys, self.layers[number].values = key, value
                self._places[index] = place
        logits = torch.empty(len(ids), call.head.outputs, dtype=self.dtype)
        call.ids, call.logits = ids.data_ptr(), logits.data_ptr()
        error = self._library.sparsify_step(ctypes.byref(call))
        assert error == 0, f"sparsify_step refused its arguments: {error}"
        return logits

    def no_positions(self, batch: int) -> torch.Tensor:
        """What a layer's cache holds of keys or of values before its first step: [batch, kv_heads, 0, head_dim]."""
        attention = self.call.attention
        return torch.empty(batch, attention.kv_heads, 0, attention.head_dim, dtype=self.dtype)

    def seconds(self) -> dict[str, float]:
        """Seconds of all steps so far by PARTS."""
        return dict(zip(PARTS, self.call.seconds, strict=True))
