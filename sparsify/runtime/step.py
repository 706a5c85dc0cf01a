"""The forward of a model whose decoding steps are computed by one call of the C++ kernels.

A call with one new token for each of a few sequences and a cache of what came before is such a step. Prompts, training, probes,
and what the step cannot hold go through the model's own forward, whose blocks still skip rows where they can.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from sparsify.models.masking import is_fused
from sparsify.runtime.block_weights import BlockProduct
from sparsify.runtime.cache_store import Place, advance, place, positions, refusal
from sparsify.runtime.ffn import native_can
from sparsify.runtime.forwards import BlockForward
from sparsify.runtime.masks import is_readable, unknown_to_steps
from sparsify.runtime.native_ffn import MAX_TOKENS
from sparsify.runtime.native_step import Projections, StepPlan, projections
from sparsify.runtime.quantised import BlockFormat
from sparsify.runtime.weights import RowsRead

MOVING_ROPE = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on the length of the sequence."""
ROPE_POSITIONS = 1024
INERT = ("output_capturing", "masking", "modeling_sparse_mixtral", "forwards")
"""Files whose hooks see nothing that a step does not give: transformers leaves its recorders of inner states in place once one was
requested, masks are applied in C++, and the others are checks and inputs of predictors of this package."""
PLAIN = frozenset({"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"})
"""Arguments that a step takes. `logits_to_keep` changes nothing for one token; all others must be absent or false."""
IGNORED = frozenset({"return_dict", "logits_to_keep", "cache_position"})


class StepForward:
    """Forward of a model, installed in place of its class's.

    Args:
        model: A Sparse Mistral or Mixtral.
        forwards: The forward of each layer's block.
        blocks: Format of the attention's projections and of the output layer; None as stored.
        threads: Threads of a step; None for as many as pay off.
    """

    def __init__(
        self, model: Any, forwards: Sequence[BlockForward], blocks: BlockFormat | None, threads: int | None
    ) -> None:
        self.model, self.forwards, self.threads = model, list(forwards), threads
        self.projections = Projections(blocks)
        self.steps = 0
        self._told: set[str] = set()
        self._plan: StepPlan | None = None
        self._made_from: Any = None
        self._rope: tuple[torch.Tensor, torch.Tensor] | None = None
        self._parts: _Parts | None = None
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
        dropped = {"_plan": None, "_made_from": None, "_rope": None, "_parts": None}
        return vars(self) | dropped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and "input_ids" not in kwargs:
            args, kwargs = (), {"input_ids": args[0], **kwargs}
        if not args and self._is_step(kwargs):
            return self._step(
                kwargs["input_ids"],
                kwargs.get("past_key_values"),
                kwargs.get("attention_mask"),
                kwargs.get("position_ids"),
            )
        return type(self.model).forward(self.model, *args, **kwargs)

    def _is_step(self, kwargs: dict[str, Any]) -> bool:
        """Whether C++ computes this call."""
        model, ids, cache = self.model, kwargs.get("input_ids"), kwargs.get("past_key_values")
        most = self.forwards[0].most_tokens(model.model.embed_tokens.weight)
        if (
            ids is None
            or ids.dim() != 2
            or ids.shape[1] != 1
            or not 0 < len(ids) <= min(most, MAX_TOKENS)
            or model.training
            or kwargs.get("use_cache") is False
            or kwargs.get("return_dict") is False
            or any(kwargs[name] for name in kwargs.keys() - PLAIN - IGNORED)
            or (kwargs.get("use_cache") is None and not model.config.use_cache)
            or model.config.output_attentions
            or model.config.output_hidden_states
            or getattr(model.config, "output_router_logits", False)
            or not self._unwatched()
        ):
            return False
        embedding = model.model.embed_tokens.weight
        if embedding.device.type != "cpu" or not native_can(embedding):
            return False
        if torch.is_grad_enabled() and embedding.requires_grad:
            return False
        if int(ids.min()) < 0 or int(ids.max()) >= len(embedding):
            return False  # torch raises its own error; C++ would read other memory
        reason = self._model_refusal()
        if reason is None and cache is not None:
            reason = refusal(cache, len(ids), embedding.dtype, len(self.forwards))
        if reason is None:
            try:
                _shown(kwargs.get("attention_mask"), 0 if cache is None else positions(cache))
            except ValueError as error:
                reason = str(error)
        if reason:
            self._tell(reason)
        return reason is None

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(
                f"Decoding steps go through torch, with sparse feed-forward blocks only: C++ does not compute {reason}.",
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
        if unknown := unknown_to_steps(model.config):
            return unknown
        for index, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                part = getattr(attention, name)
                if not is_readable(part):
                    return f"{name} of layer {index}, which is {part}"
        if type(model.lm_head) is not nn.Linear or model.lm_head.bias is not None:
            return f"the output layer {model.lm_head}"
        replaced = [vars(one)["forward"] for one in model.model.modules() if "forward" in vars(one)]
        if not all(isinstance(one, (BlockForward, BlockProduct)) for one in replaced):
            return "layers whose forward was replaced"
        return None

    def _unwatched(self) -> bool:
        """Whether no module has hooks but those of this package: a hook must see what passes."""
        if self._parts is None or not self._parts.are_current():
            self.hand_over_counts()
            self._plan, self._parts = None, _Parts(self.model)
        return self._parts.are_unwatched()

    def _step(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        plan = self._current_plan()
        past_key_values = DynamicCache(config=self.model.config) if past_key_values is None else past_key_values
        cached = positions(past_key_values)
        attention = plan.call.attention
        empty = torch.empty(len(input_ids), attention.kv_heads, 0, attention.head_dim, dtype=plan.dtype)
        where = place(past_key_values, empty)
        window = self.model.config.sliding_window
        hidden_by_window = 0 if window is None else max(0, where.cached - (window - 1))
        where = _later(where, hidden_by_window, plan)
        if position_ids is None:
            position_ids = torch.tensor([[cached]])
        cos, sin = self._rotations(position_ids.expand(len(input_ids), 1))
        logits = plan.run(
            input_ids[:, 0].long().contiguous(),
            where.keys,
            where.values,
            where.cached,
            where.strides,
            cos,
            sin,
            _visible(_shown(attention_mask, cached), cached + 1, where.cached + 1, len(input_ids)),
        )
        advance(past_key_values)
        self.steps += 1
        kind = MoeCausalLMOutputWithPast if is_fused(self.forwards[0].block) else CausalLMOutputWithPast
        return kind(logits=logits[:, None], past_key_values=past_key_values)

    def _current_plan(self) -> StepPlan:
        assert self._parts is not None
        now = [self.threads or torch.get_num_threads(), *self._parts.tensors()]
        if self._plan is None or now != self._made_from:
            self.hand_over_counts()
            self._plan, self._rope = StepPlan(self.model, self.forwards, self.projections, self.threads), None
            # Making it may reorder the memory of a down projection.
            self._made_from = [now[0], *self._parts.tensors()]
        return self._plan

    def _rotations(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each sequence's position, fp32 [tokens, head_dim], as the model computes them in its dtype."""
        rotary, like = self.model.model.rotary_emb, self.model.model.norm.weight
        if rotary.rope_type in MOVING_ROPE:
            cos, sin = rotary(like, position_ids)
            return cos[:, 0].float().contiguous(), sin[:, 0].float().contiguous()
        last = int(position_ids.max())
        if self._rope is None or last >= len(self._rope[0]):
            cos, sin = rotary(like, torch.arange(last + ROPE_POSITIONS)[None])
            self._rope = cos[0].float(), sin[0].float()
        return self._rope[0][position_ids[:, 0]], self._rope[1][position_ids[:, 0]]

    def hand_over_counts(self) -> None:
        """Moves what C++ counted to the forwards of the blocks."""
        if self._plan is None:
            return
        for layer, forward in zip(self._plan.layers, self.forwards, strict=True):
            tokens, layer.tokens = layer.tokens, 0
            for index in range(forward.count() if tokens else 0):
                one = layer.experts[index]
                rows = RowsRead(one.gate_rows, one.up_rows, one.down_rows, offered=one.offered)
                one.offered = one.gate_rows = one.up_rows = one.down_rows = 0
                if rows.offered:
                    forward.count_step(tokens, rows, forward.weights(index, self.model.model.norm.weight))
                    tokens = 0

    def seconds(self) -> dict[str, float] | None:
        """Seconds of the native steps since the weights last changed, by part; None before the first."""
        return None if self._plan is None else self._plan.seconds()


class _Parts:
    """A model's modules, tensors and hooks as they were found, to notice cheaply that one was replaced, changed or added."""

    def __init__(self, model: Any) -> None:
        modules = [model.model, *model.model.modules(), model.lm_head]
        children = [(one._modules, name) for one in (model, *modules) for name, child in one._modules.items() if child]
        self._children = list({(id(table), name): (table, name) for table, name in children}.values())
        self._found = [table[name] for table, name in self._children]
        kinds = [kind for one in modules for kind in (one._parameters, one._buffers)]
        tensors = [(table, name) for table in kinds for name, tensor in table.items() if tensor is not None]
        self._tensors = list({(id(table), name): (table, name) for table, name in tensors}.values())
        self._hooks = [kind for one in modules for kind in (one._forward_hooks, one._forward_pre_hooks)]
        self._inert = [0] * len(self._hooks)

    def are_current(self) -> bool:
        return [table.get(name) for table, name in self._children] == self._found

    def are_unwatched(self) -> bool:
        counts = list(map(len, self._hooks))
        if counts != self._inert:
            hooks = (hook for table in self._hooks for hook in table.values())
            if not all(getattr(hook, "__module__", "").rpartition(".")[2] in INERT for hook in hooks):
                return False
            self._inert = counts
        return True

    def tensors(self) -> Iterator[tuple[int, int | None]]:
        """Address and version of every tensor: they differ after every change that torch counts."""
        for table, name in self._tensors:
            tensor = table[name]
            yield tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def _shown(mask: torch.Tensor | None, cached: int) -> torch.Tensor | None:
    """An attention mask as bool [batch, positions]: what generate() passes, or what it makes of that for a static cache.

    Raises:
        ValueError: If it is anything else, e.g. adds numbers to scores.
    """
    if mask is None:
        return None
    flat = mask[:, 0, 0] if mask.dim() == 4 and mask.shape[1:3] == (1, 1) else mask
    if flat.dim() == 2 and flat.shape[1] > cached:
        if flat is mask or mask.dtype == torch.bool:
            return flat.bool()
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
