"""The forward of a model whose decoding steps are one call of the C++ kernels, or on a GPU one CUDA graph.

A call with one new token for each of a few sequences and a cache of what came before is such a step. Prompts, training, probes,
and what the step cannot hold go through the model's own forward, whose blocks still skip rows where they can.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from sparsify.models import FAMILIES
from sparsify.models.masking import is_fused
from sparsify.runtime.block_weights import BlockProduct
from sparsify.runtime.cache_store import Place, advance, place, positions, refusal
from sparsify.runtime.device_step import DeviceStep, device_refusal
from sparsify.runtime.ffn import native_can
from sparsify.runtime.forwards import BlockForward
from sparsify.runtime.masks import is_readable
from sparsify.runtime.native_ffn import MAX_TOKENS, take_rows
from sparsify.runtime.native_step import Projections, Sight, StepPlan, projections, reaches
from sparsify.runtime.triton_ffn import triton_can

MOVING_ROPE = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on the length of the sequence."""
ROPE_POSITIONS = 1024
INERT = ("output_capturing", "masking", "projection_masks", "modeling_sparse_mixtral", "fused_experts", "forwards")
"""Files whose hooks see nothing that a step does not give: transformers leaves its recorders of inner states in place once one was
requested, masks are applied in C++, and the others are checks and inputs of predictors of this package."""
PLAIN = frozenset({"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"})
"""Arguments that a step takes. `logits_to_keep` changes nothing for one token; all others must be absent or false."""
IGNORED = frozenset({"return_dict", "logits_to_keep", "cache_position"})


RECORDED = ("output_attentions", "output_hidden_states", "output_router_logits")
"""Fields of a configuration that request more than a step gives."""
PARTS_IN_TURN = 8
"""In the middle of a sequence a step looks at one of so many parts of a model's modules and tensors."""
PAUSE_SECONDS = 0.005
"""Longest time between two steps in a loop. After a longer one everything is looked at, since somebody may have been at work."""


class _Request(NamedTuple):
    """A call that C++ computes.

    Attributes:
        ids: Token of each sequence, int64 [tokens].
        cached: Positions that the cache holds.
        visible: bool [batch, cached + 1]; None if every position is visible.
        positions: Of each sequence; one number if they are the same.
    """

    ids: torch.Tensor
    cache: Any
    cached: int
    visible: torch.Tensor | None
    positions: list[int]


class StepForward:
    """Forward of a model, installed in place of its class's.

    Args:
        model: A sparse model.
        forwards: The forward of each layer's block.
        given: What the attention's projections and the output layer are read from.
        threads: Threads of a step; None for as many as pay off.
    """

    def __init__(self, model: Any, forwards: Sequence[BlockForward], given: Projections, threads: int | None) -> None:
        self.model, self.forwards, self.threads = model, list(forwards), threads
        self.projections = given
        self._groups = [reach.layers for reach in reaches(model.config)]
        self.steps = self._counted_steps = 0
        self._told: set[str] = set()
        self._uncaptured: str | None = None
        self._plan: StepPlan | DeviceStep | None = None
        self._made_from: Any = None
        self._rope: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._parts: _Parts | None = None
        self._last: tuple[weakref.ref[Any], int, float] | None = None
        self._most_tokens: dict[tuple[str, torch.dtype], int] = {}
        self._output_class = MoeCausalLMOutputWithPast if is_fused(model.ffn_blocks()[0]) else CausalLMOutputWithPast
        for forward in self.forwards:
            forward.step = self

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's own forward: generate() asks for it."""
        return inspect.signature(type(self.model).forward.__get__(self.model))

    def prepare(self) -> None:
        """Makes the blocks of the attention's projections and of the output layer."""
        for name, linear in projections(self.model).items():
            self.projections.matrix(name, linear)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and other processes make their own plan, since they have their own weights."""
        self.hand_over_counts()
        dropped = {"_plan": None, "_made_from": None, "_rope": {}, "_parts": None, "_last": None}
        return vars(self) | dropped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and "input_ids" not in kwargs:
            args, kwargs = (), {"input_ids": args[0], **kwargs}
        output = None
        if not args and not torch.compiler.is_compiling() and self._is_step(kwargs):
            if self._on_device():
                output = self._device_step(kwargs)
            elif native_can(self.model.model.embed_tokens.weight) and (request := self._request(kwargs)) is not None:
                output = self._step(request)
        return type(self.model).forward(self.model, *args, **kwargs) if output is None else output

    def _on_device(self) -> bool:
        """Whether steps are those of the Triton kernels."""
        return triton_can(self.model.model.embed_tokens.weight) and all(one.kept is None for one in self.forwards)

    @property
    def captured(self) -> bool:
        """Whether the last step was a CUDA graph."""
        return isinstance(self._plan, DeviceStep) and self._plan.captured

    def _is_step(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call has one new token for each of a few sequences, and asks for their logits alone."""
        model, ids = self.model, kwargs.get("input_ids")
        if ids is None or ids.dim() != 2 or ids.shape[1] != 1:
            return False
        embedding, config = model.model.embed_tokens.weight, model.config
        return (
            0 < len(ids) <= self._limit(embedding)
            and not model.training
            and kwargs.get("use_cache") is not False
            and kwargs.get("return_dict") is not False
            and not any(kwargs[name] for name in kwargs.keys() - PLAIN - IGNORED)
            and (kwargs.get("use_cache") is not None or config.use_cache)
            and not any(map(partial(_attribute, config), RECORDED))
            and not (torch.is_grad_enabled() and embedding.requires_grad)
            and self._unwatched(self._turn(kwargs.get("past_key_values")))
        )

    def _limit(self, like: torch.Tensor) -> int:
        """Largest number of tokens of a step of a model whose tensors are of this kind."""
        kind = like.device.type, like.dtype
        if kind not in self._most_tokens:
            self._most_tokens[kind] = min([MAX_TOKENS, *(one.most_tokens(like) for one in self.forwards)])
        return self._most_tokens[kind]

    def _request(self, kwargs: dict[str, Any]) -> _Request | None:
        """What C++ computes of such a call; None if that is nothing."""
        ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
        embedding = self.model.model.embed_tokens.weight
        tokens = ids[:, 0].tolist()
        if min(tokens) < 0 or max(tokens) >= len(embedding):
            return None  # torch raises its own error; C++ would read other memory
        reason = self._refusal(cache, len(ids))
        cached = 0 if cache is None or reason is not None else positions(cache)
        visible = None
        if reason is None:
            try:
                visible = _shown(kwargs.get("attention_mask"), cached)
            except ValueError as error:
                reason = str(error)
        if reason:
            self._tell(reason)
        if reason is not None:
            return None
        given = kwargs.get("position_ids")
        places = [cached] if given is None else given.expand(len(ids), 1)[:, 0].tolist()
        return _Request(ids[:, 0].long().contiguous(), cache, cached, visible, places)

    def _device_step(self, kwargs: dict[str, Any]) -> Any:
        """The output of such a call on a GPU; None if it cannot be captured."""
        cache, mask, ids = kwargs.get("past_key_values"), kwargs.get("attention_mask"), kwargs["input_ids"]
        reason = self._uncaptured
        if isinstance(cache, Cache) and any(isinstance(one, StaticLayer) for one in cache.layers):
            reason = reason or "a static cache"
        reason = self._refusal(cache, len(ids)) if reason is None else reason
        if reason is None and self._plan is None:
            reason = device_refusal(self.model, self.forwards)
        cached = 0 if reason is not None or cache is None else positions(cache)
        if reason is None and mask is not None and not (mask.dim() == 2 and mask.shape[1] > cached):
            reason = f"an attention mask of shape {list(mask.shape)}"
        if reason is None and (kind := _rope_type(self.model)) in MOVING_ROPE:
            reason = f"{kind} rotary embeddings"
        if reason is None:
            plan = self._current_plan(None)
            assert isinstance(plan, DeviceStep)
            cache = DynamicCache(config=self.model.config) if cache is None else cache
            try:
                logits = plan.run(ids, cache, mask, kwargs.get("position_ids"))
                self.steps += 1
                return self._output(logits, cache)
            except RuntimeError as error:
                if plan.captured or not ids.is_cuda:
                    raise
                reason = self._uncaptured = f"what a capture refuses: {str(error)[:300]}"
        if reason:
            self._tell(reason)
        return None

    def _refusal(self, cache: Any, batch: int) -> str | None:
        """Why no step can be computed with a cache; None if it can, "" without a reason to give."""
        reason = self._model_refusal()
        if reason is None and cache is not None:
            reason = refusal(cache, batch, self.model.model.embed_tokens.weight, self._groups)
        return reason

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            who = "a CUDA graph" if self._on_device() else "C++"
            warnings.warn(
                f"Decoding steps go through torch, with sparse feed-forward blocks only: {who} does not compute {reason}.",
                stacklevel=4,
            )

    def _model_refusal(self) -> str | None:
        """Why no step of this model can be computed; looked at once for each plan."""
        if self._plan is not None:
            return None
        model = self.model
        dtypes = {parameter.dtype for parameter in model.parameters()}
        if len(dtypes) > 1:
            return f"weights of several dtypes ({', '.join(sorted(map(str, dtypes)))})"
        if unknown := _unknown_structure(model):
            return unknown
        for index, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                part = getattr(attention, name)
                if not is_readable(part, with_bias=True):
                    return f"{name} of layer {index}, which is {part}"
        if type(model.lm_head) is not nn.Linear or model.lm_head.bias is not None:
            return f"the output layer {model.lm_head}"
        replaced = [vars(one)["forward"] for one in model.model.modules() if "forward" in vars(one)]
        if not all(isinstance(one, (BlockForward, BlockProduct)) for one in replaced):
            return "layers whose forward was replaced"
        return None

    def _unwatched(self, turn: int | None) -> bool:
        """Whether no module has hooks but those of this package: a hook must see what passes."""
        if self._parts is None or not self._parts.are_current(turn):
            self.hand_over_counts()
            self._plan, self._parts = None, _Parts(self.model)
        return self._parts.are_unwatched()

    def _turn(self, cache: Any) -> int | None:
        """Which part of the model a step looks at for changes: all (None), unless it follows at once on the last one of its sequence."""
        if self._last is None or cache is None or self._last[0]() is not cache:
            return None
        _, end, time = self._last
        if perf_counter() - time > PAUSE_SECONDS or positions(cache) != end:
            return None
        return self.steps % PARTS_IN_TURN

    def _step(self, request: _Request) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        plan, model, batch = self._current_plan(self._turn(request.cache)), self.model, len(request.ids)
        assert isinstance(plan, StepPlan)
        cache = DynamicCache(config=model.config) if request.cache is None else request.cache
        sights = []
        for reach in plan.reaches:
            where = place(cache, reach.layers, lambda: plan.no_positions(batch))
            where = _later(where, 0 if reach.positions is None else max(0, where.cached - (reach.positions - 1)), plan)
            visible = _visible(request.visible, request.cached + 1, where.cached + 1, batch)
            sights.append(Sight(where, *self._rotations(reach.kind, request.positions, batch), visible))
        logits = plan.run(request.ids, sights)
        advance(cache, self._groups)
        self.steps += 1
        self._last = weakref.ref(cache), request.cached + 1, perf_counter()
        return self._output(logits, cache)

    def _output(self, logits: torch.Tensor, cache: Any) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        # Without the checks of its fields, which take longer than all else that makes it.
        kind: Any = self._output_class
        output = kind.__new__(kind)
        output["logits"], output["past_key_values"] = logits[:, None], cache
        return output

    def _current_plan(self, turn: int | None) -> StepPlan | DeviceStep:
        assert self._parts is not None
        threads = self.threads or torch.get_num_threads()
        if self._plan is None or (threads, self._parts.state(turn)) != (self._made_from[0], self._state_then(turn)):
            self.hand_over_counts()
            if self._on_device():
                self._plan = DeviceStep(self.model, self.forwards, self.projections)
            else:
                self._plan, self._rope = StepPlan(self.model, self.forwards, self.projections, self.threads), {}
            # Making it may reorder the memory of projections.
            self._made_from = threads, [self._parts.state(one) for one in range(PARTS_IN_TURN)]
        return self._plan

    def _state_then(self, turn: int | None) -> list[int | None]:
        """What `_Parts.state` was when the plan was made."""
        _, states = self._made_from
        return [one for state in states for one in state] if turn is None else states[turn]

    def _rotations(self, kind: str, positions: list[int], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each sequence's position for a kind of layers, fp32 [batch, head_dim], as the model computes them in its dtype."""
        rotary, like = self.model.model.rotary_emb, self.model.model.norm.weight
        asked = (kind,) if isinstance(rotary.rope_type, dict) else ()
        if _rope_type(self.model, kind) in MOVING_ROPE:
            cos, sin = rotary(like, torch.tensor(positions)[:, None].expand(batch, 1), *asked)
            return cos[:, 0].float().contiguous(), sin[:, 0].float().contiguous()
        last = max(positions)
        if kind not in self._rope or last >= len(self._rope[kind][0]):
            cos, sin = rotary(like, torch.arange(last + ROPE_POSITIONS)[None], *asked)
            self._rope[kind] = cos[0].float(), sin[0].float()
        cos, sin = self._rope[kind]
        if batch == 1:
            return cos[last : last + 1], sin[last : last + 1]
        rows = torch.tensor(positions).expand(batch)
        return cos[rows], sin[rows]

    def hand_over_counts(self) -> None:
        """Moves what C++ or a device counted to the forwards of the blocks."""
        if isinstance(self._plan, DeviceStep):
            self._plan.hand_over()
        if not isinstance(self._plan, StepPlan):
            return
        steps, self._counted_steps = self.steps - self._counted_steps, self.steps
        for number, (layer, forward) in enumerate(zip(self._plan.layers, self.forwards, strict=True)):
            forward.count_attention(steps, *self._plan.attention_reads(number, steps))
            forward.count_rotations(steps)
            tokens, layer.tokens = layer.tokens, 0
            for index in range(forward.count() if tokens else 0):
                one = layer.experts[index]
                rows = take_rows(one)
                if rows.offered:
                    forward.count_step(tokens, rows, forward.weights(index, self.model.model.norm.weight))
                    tokens = 0

    def seconds(self) -> dict[str, float] | None:
        """Seconds of the native steps since the weights last changed, by part; None before the first."""
        return self._plan.seconds() if isinstance(self._plan, StepPlan) else None


def _rope_type(model: Any, kind: str | None = None) -> str:
    """The kind of rotary embedding of a kind of layers, by default the first of them whose frequencies move."""
    types: Any = model.model.rotary_emb.rope_type
    if not isinstance(types, dict):
        return types
    return types[kind] if kind else next((one for one in types.values() if one in MOVING_ROPE), "default")


def _unknown_structure(model: Any) -> str | None:
    """What a model of a family may do that the kernels do not compute, in words."""
    config = model.config
    if difference := FAMILIES[config.model_type].layer_difference:
        return difference
    if others := {one.kind for one in reaches(config)} - {"full_attention", "sliding_attention"}:
        return f"layers of {', '.join(sorted(others))}"
    if getattr(config, "final_logit_softcapping", None) or getattr(config, "attn_logit_softcapping", None):
        return "softcapped logits or scores"
    if (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        return "rotary embeddings of a part of each head"
    if getattr(config, "norm_topk_prob", True) is False and config.num_experts_per_tok > 1:
        return "a router whose weights do not sum to 1"
    return None


class _Parts:
    """A model's modules, tensors and hooks as they were found, to notice cheaply that one was replaced, changed or added.

    A step looks at hundreds of them, in loops of the interpreter's C code: a loop in Python takes four times as long.
    """

    def __init__(self, model: Any) -> None:
        modules = [model.model, *model.model.modules(), model.lm_head]
        children = [(one._modules, name) for one in (model, *modules) for name, child in one._modules.items() if child]
        self._children = _places(children)
        self._found = [list(map(dict.get, *places)) for places in self._children]
        kinds = [kind for one in modules for kind in (one._parameters, one._buffers)]
        # Those on `meta` were freed: blocks that nothing changes stand for them.
        tensors = [(table, name) for table in kinds for name, tensor in table.items() if _is_held(tensor)]
        self._tensors = _places(tensors)
        self._hooks = [kind for one in modules for kind in (one._forward_hooks, one._forward_pre_hooks)]
        self._inert = [0] * len(self._hooks)

    def are_current(self, turn: int | None) -> bool:
        """Whether the modules of one part, or of all, are those that were found."""
        return all(list(map(dict.get, *self._children[one])) == self._found[one] for one in _turns(turn))

    def are_unwatched(self) -> bool:
        if not any(self._hooks):
            return True
        counts = list(map(len, self._hooks))
        if counts != self._inert:
            hooks = (hook for table in self._hooks for hook in table.values())
            if not all(getattr(hook, "__module__", "").rpartition(".")[2] in INERT for hook in hooks):
                return False
            self._inert = counts
        return True

    def state(self, turn: int | None) -> list[int | None]:
        """Addresses and versions of the tensors of one part, or of all: they differ after every change that torch counts."""
        return [number for one in _turns(turn) for number in self._state(one)]

    def _state(self, turn: int) -> list[int | None]:
        tensors = list(map(dict.__getitem__, *self._tensors[turn]))
        try:
            versions = list(map(attrgetter("_version"), tensors))
        except RuntimeError:  # tensors made in inference mode have none
            versions = [None if one.is_inference() else one._version for one in tensors]
        return [*map(torch.Tensor.data_ptr, tensors), *versions]


def _is_held(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and not tensor.is_meta


def _places(pairs: Sequence[tuple[dict[str, Any], str]]) -> list[tuple[list[dict[str, Any]], list[str]]]:
    """Tables and names of (table, name) pairs, each once, in PARTS_IN_TURN parts."""
    once = list({(id(table), name): (table, name) for table, name in pairs}.values())
    parts = [once[turn::PARTS_IN_TURN] for turn in range(PARTS_IN_TURN)]
    return [([table for table, _ in part], [name for _, name in part]) for part in parts]


def _turns(turn: int | None) -> Sequence[int]:
    return range(PARTS_IN_TURN) if turn is None else (turn,)


def _attribute(config: Any, name: str) -> Any:
    """A field without what transformers does around each look at one."""
    try:
        return object.__getattribute__(config, name)
    except AttributeError:
        return None


def _shown(mask: torch.Tensor | None, cached: int) -> torch.Tensor | None:
    """An attention mask as bool [batch, positions]: what generate() passes, or what it makes of that for a static cache. None if it
    hides nothing.

    Raises:
        ValueError: If it is anything else, e.g. adds numbers to scores.
    """
    if mask is None:
        return None
    flat = mask[:, 0, 0] if mask.dim() == 4 and mask.shape[1:3] == (1, 1) else mask
    if flat.dim() == 2 and flat.shape[1] > cached:
        if flat is mask or mask.dtype == torch.bool:
            return None if bool(flat.all()) else flat.bool()
        if ((flat == 0) | (flat <= torch.finfo(flat.dtype).min)).all():
            return flat == 0
    raise ValueError(f"an attention mask of {mask.dtype} of shape {list(mask.shape)}")


def _later(where: Place, positions: int, plan: StepPlan) -> Place:
    """The place without its first positions, which a sliding window hides."""
    if not positions:
        return where
    skipped = positions * plan.call.attention.head_dim * plan.dtype.itemsize
    keys, values = ([one + skipped for one in side] for side in (where.keys, where.values))
    return Place(keys, values, where.cached - positions, where.strides)


def _visible(mask: torch.Tensor | None, length: int, shown: int, batch: int) -> torch.Tensor | None:
    """The mask of the last `shown` of `length` positions, uint8 [batch, shown]; None if it hides nothing."""
    if mask is None:
        return None
    mask = mask[:, length - shown : length]
    return None if bool(mask.all()) else mask.to(torch.uint8).expand(batch, -1).contiguous()
