"""Forward functions that `accelerate` installs in feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsify.errors import ModelError
from sparsify.models.activations import ACTIVATIONS, Activation
from sparsify.models.projection_masks import masked_product
from sparsify.models.quantised import BlockFormat, BlockMatrix, KeptBlocks, product
from sparsify.runtime.columns import columns_first, rows_first
from sparsify.runtime.ffn import Routing, backend_of, sparse_experts, sparse_ffn
from sparsify.runtime.masks import (
    bases_of,
    constant_of,
    copies_of,
    low_rank_of,
    num_bytes,
    own_mask,
    own_part,
    router_of,
    thresholds_of,
)
from sparsify.runtime.packed import PACKED, KeptPacked
from sparsify.runtime.triton_columns import masked_by_triton
from sparsify.runtime.triton_ffn import triton_can
from sparsify.runtime.weights import (
    AttentionReads,
    Copies,
    FfnWeights,
    LineBytes,
    Matrix,
    Options,
    Predictor,
    RowsRead,
)

WORTHWHILE_TOKENS = {("cpu", torch.bfloat16): 4}
"""Default limit on the tokens of a call with stored weights, where it is not 8: with more tokens torch's dense product,
which multiplies in bf16, is faster."""


def kept_weights(blocks: BlockFormat | None, *, packed: bool) -> KeptBlocks | None:
    """Where copies of weights for decoding are kept: in blocks, packed, or both; None for none."""
    if packed:
        return KeptPacked(PACKED[blocks])
    return None if blocks is None else KeptBlocks(blocks)


class BlockForward:
    """A block's forward that reads only the rows it needs, and counts them.

    It holds no weights: it reads the block's own at every call, and `kept` follows their changes.

    Attributes:
        counts: int64 [6] on a device, to which a captured step adds what it reads; such a step calls `count_step` later.
    """

    def __init__(self, block: Any, options: Options) -> None:
        self.block, self.options = block, options
        self.kept = kept_weights(options.blocks, packed=options.packed)
        self._norm_input: torch.Tensor | None = None
        self._watching: Any = None
        self._stack: Predictor | None = None
        self.step: Any = None
        self.in_blocks_alone = False
        self.counts: torch.Tensor | None = None
        self.reset()

    def reset(self) -> None:
        self._fetch()
        self._tokens, self._read_of = 0, dict[LineBytes, RowsRead]()
        self._attention, self._rotated_bytes = AttentionReads(), 0

    @property
    def tokens(self) -> int:
        """Tokens that the kernels computed."""
        self._fetch()
        return self._tokens

    @property
    def reads_residual(self) -> bool:
        """Whether predictors read the input of the block's norm."""
        return self._watching is not None

    def _fetch(self) -> None:
        """Takes the counts of native steps, which add up in C++."""
        if self.step is not None:
            self.step.hand_over_counts()

    def count_step(self, tokens: int, rows: RowsRead, weights: FfnWeights) -> None:
        """Adds what native steps computed and read."""
        self._tokens += tokens
        self._add(rows, weights)

    @property
    def rows(self) -> RowsRead:
        """Rows read. On a GPU this synchronises with the device."""
        self._fetch()
        total = RowsRead()
        for rows in self._read_of.values():
            total += rows
        return total

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read, those of predictors, rotations and low-rank factors included."""
        self._fetch()
        read = sum(one.weights(rows) + rows.offered * one.others for one, rows in self._read_of.items())
        return round(read) + self._rotated_bytes

    @property
    def touched_share(self) -> float:
        """Share of the bytes of all three projections that were read."""
        self._fetch()
        offered = sum(rows.offered * one.dense for one, rows in self._read_of.items())
        return sum(one.weights(rows) for one, rows in self._read_of.items()) / max(offered, 1)

    @property
    def attention(self) -> AttentionReads:
        """What native steps read of the projections of the attention in the same layer."""
        self._fetch()
        return self._attention

    def count_attention(self, steps: int, read: int, offered: int) -> None:
        """Adds steps, and bytes that they read for the attention's projections and that dense steps read."""
        own = self._attention
        self._attention = AttentionReads(own.steps + steps, own.bytes_read + read, own.bytes_offered + offered)

    def count_rotations(self, steps: int) -> None:
        """Adds what so many steps read to rotate the block's inputs."""
        masks = (own_mask(one) for one in (self.block, own_part(self.block, "gate"), own_part(self.block, "up")))
        self._rotated_bytes += steps * num_bytes(bases_of(*masks))

    def remove(self) -> None:
        """Restores the forward of the block's class."""
        if self._watching is not None:
            self._watching.remove()
        del self.block.forward

    def watch(self, norm: nn.Module) -> None:
        """Keeps the input of the block's RMS norm, for predictors of the residual."""
        self._watching = norm.register_forward_pre_hook(self._keep_norm_input)

    def _keep_norm_input(self, _norm: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._norm_input = arguments[0]

    def freeze(self) -> None:
        """Keeps the blocks, and reads nothing else from now on: the stored weights may be freed."""
        assert self.kept is not None
        self.kept.freeze()
        for kept, _ in self._copied(0) if self.ranks_by_proxy else ():
            kept.freeze()
        self.in_blocks_alone = True

    def _dense(self, *arguments: Any) -> Any:
        if self.in_blocks_alone:
            return self._from_blocks(*arguments)
        return type(self.block).forward(self.block, *arguments)

    def _from_blocks(self, *arguments: torch.Tensor) -> torch.Tensor:
        """As the class's forward, by torch's products with what the blocks stand for."""
        raise NotImplementedError

    def _products(self, seen: torch.Tensor, x: torch.Tensor, index: int = 0) -> torch.Tensor:
        """The block's output, or an expert's, for states [..., hidden] before and after the mask on its input."""
        gate, up, down_t = self._blocks(index)

        def multiply(name: str, states: torch.Tensor, by: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            part = own_part(self.block, name)
            return by(states) if part is None else masked_product(part, states, by, index)

        factors = [
            multiply(name, x, partial(product, matrix=matrix, by_columns=name in self.by_columns))
            for name, matrix in (("gate", gate), ("up", up))
        ]
        copies = self.copies(index)
        proxies = None if copies is None else [product(x, one, by_columns=False) for one in (copies.gate, copies.up)]
        own = self.block.ffn_activation
        options: dict[str, Any] = {} if proxies is None else {"proxies": proxies}
        if self.is_routed:
            router = self.block.group_router
            options["groups"] = router.factors(router(seen, index))
        neurons = own(*factors, experts=index, **options)
        return multiply("down", neurons, lambda states: states @ down_t.dequantised(dtype=x.dtype))

    @property
    def by_columns(self) -> frozenset[str]:
        """Which of `gate` and `up` are held by columns."""
        return self.options.by_columns & {"gate", "up"}

    def _blocks(self, index: int) -> Sequence[BlockMatrix]:
        assert self.kept is not None
        by_columns = {place for place, name in enumerate(("gate", "up", "down")) if self._is_by_columns(name)}
        return self.kept.of(index, tuple(self.block.parameters()), lambda: self._stored(index), by_columns)

    def _can(self, x: torch.Tensor) -> bool:
        """Whether this call can use the kernels: few tokens, no gradients, no hooks on the activation."""
        block = self.block
        if self.kept is not None and x.device.type != "cpu":
            raise ModelError(
                f"The model is on {x.device}, and {self.kept.format} blocks can only be read on a CPU.",
                next_step="Move the model back to the CPU, or accelerate it again without weights=.",
            )
        watched = (block.ffn_activation, *block.children())
        return (
            x.device.type in (("cpu",) if self.ranks_by_proxy or self.is_routed else ("cpu", "cuda"))
            and 0 < x.numel() <= self.most_tokens(x) * x.shape[-1]
            # What replaces dropped elements is computed from these: in a step alone.
            and not any(self._low_rank(name) for name in ("gate", "up"))
            and not (torch.is_grad_enabled() and any(p.requires_grad for p in block.parameters()))
            and not any(m._forward_hooks or m._forward_pre_hooks for m in watched)
        )

    def most_tokens(self, like: torch.Tensor) -> int:
        """Largest number of tokens of a step, over the batch, that the kernels compute for tensors of this kind."""
        usual = WORTHWHILE_TOKENS.get((like.device.type, like.dtype), 8) if self.kept is None else 8
        return self.options.max_tokens or usual

    def prepare(self) -> None:
        for index in range(self.count() if self.kept is not None else 0):
            self._matrices(index)
            self.copies(index)

    def count(self) -> int:
        """Number of weight sets: one, or one for each expert."""
        return 1

    def _stored(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate, up and down_t of the block, or of an expert, as `FfnWeights` holds them."""
        raise NotImplementedError

    def _matrices(self, index: int) -> Sequence[Matrix]:
        """The same in the format in which the kernels read them."""
        return self._stored(index) if self.kept is None else self._blocks(index)

    def weights(self, index: int, like: torch.Tensor) -> FfnWeights:
        """The weights of the block, or of an expert, with the predictor in the dtype and on the device of `like`."""
        gate, up, down_t = self._matrices(index)
        expert = index if self.count() > 1 else None
        predictor = self._predictor(index, like)
        thresholds, masks = thresholds_of(self.block, expert)
        return FfnWeights(
            *(gate, up, down_t),
            **thresholds,
            **self._constants(expert),
            predictor=predictor,
            by_columns=self.by_columns,
            masks=masks,
            other_bytes=sum(num_bytes(self._low_rank(name, index)) for name in ("gate", "up")),
            copies=self.copies(index),
            router=router_of(self.block, index),
        )

    @property
    def unknown_to_triton(self) -> str:
        """What of the block the kernels for a GPU do not compute, in words; or nothing."""
        if self.ranks_by_proxy:
            return "masks by int4 copies"
        if self.is_routed:
            return "routers of groups"
        if any(self._low_rank(name) for name in ("gate", "up")):
            return "low-rank remainders in feed-forward blocks"
        others = list(thresholds_of(self.block)[1])
        return f"a mask on {others[0]} by comparing neurons, or on up" if others else ""

    def _low_rank(self, name: str, expert: int = 0) -> tuple[torch.Tensor, torch.Tensor] | None:
        return low_rank_of(own_part(self.block, name), expert)

    @property
    def ranks_by_proxy(self) -> bool:
        """Whether int4 copies of gate and up choose neurons. Bundles of older versions have none."""
        return getattr(self.block, "by_proxy", False)

    @property
    def is_routed(self) -> bool:
        """Whether a router chooses groups of neurons. Bundles of older versions have none."""
        return getattr(self.block, "group_router", None) is not None

    @property
    def copied_bytes(self) -> int:
        """Memory of the copies made so far."""
        return sum(kept.num_bytes for kept, _ in self._copied(0)) if self.ranks_by_proxy else 0

    def copies(self, index: int) -> Copies | None:
        """The model's own copies of the block, or of an expert, which rank neurons; None where none do."""
        if not self.ranks_by_proxy:
            return None
        return copies_of(self.block, index, self._copied(index))

    def _copied(self, index: int) -> list[tuple[KeptBlocks, torch.Tensor]]:
        """Where the block keeps copies, and of which weights: gate and up, or both in one, of the block or of an expert."""
        raise NotImplementedError

    def _held(self, name: str, weight: nn.Parameter) -> torch.Tensor:
        """A projection's weight, or its transpose: its memory is reordered only if the kernels read it directly."""
        by_columns = self._is_by_columns(name)
        if self.kept is None:
            return columns_first(weight) if by_columns else rows_first(weight)
        return weight.detach().mT if by_columns else weight.detach()

    def _is_by_columns(self, name: str) -> bool:
        return name == "down" or name in self.by_columns

    def activation(self) -> Activation:
        own = self.block.ffn_activation
        return ACTIVATIONS[own.name].with_threshold(getattr(own, "gate_threshold", 0.0))

    def _constants(self, expert: int | None = None) -> dict[str, Any]:
        """What is added to the outputs of the projections, or to those of one expert."""
        found = {f"{name}_constant": constant_of(own_part(self.block, name)) for name in ("gate", "up", "down")}
        if expert is None:
            return found
        return {name: values if values is None else values[expert] for name, values in found.items()}

    def _masked(self, x: torch.Tensor) -> torch.Tensor:
        """The block's input after the mask that its projections share."""
        mask = own_mask(self.block)
        return x if mask is None else self._apply(mask, x)

    def _apply(self, mask: Any, x: torch.Tensor) -> torch.Tensor:
        """A mask that is not of single experts, applied to x."""
        few = x.numel() <= self.most_tokens(x) * x.shape[-1]
        return masked_by_triton(mask, x) if few and self.kept is None and triton_can(x) else mask(x)

    def _inputs(self, x: torch.Tensor, expert: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """What gate and up read, given the input that they share; the same tensor if no mask is of one of them alone."""
        masks = [own_mask(own_part(self.block, name)) for name in ("gate", "up")]
        apply = self._apply if self.count() == 1 else lambda mask, x: mask(x, expert)
        gate_x, up_x = (x if mask is None else apply(mask, x) for mask in masks)
        return gate_x, up_x

    def _predictor(self, index: int, x: torch.Tensor) -> Predictor | None:
        """The predictor in x's dtype and on its device, as it follows a model that was moved or cast, or in blocks."""
        if self.options.predictors is None:
            return None
        one = self.options.predictors[index]
        like = one.like(x, in_blocks=self.options.blocks is not None)
        if like is not one:
            self.options.predictors = [
                like if place == index else other for place, other in enumerate(self.options.predictors)
            ]
        return like

    def _read(
        self, x: torch.Tensor, weights: FfnWeights, predictor_input: torch.Tensor | None, expert: int = 0
    ) -> torch.Tensor:
        gate_x, up_x = self._inputs(x, expert)
        out, rows = sparse_ffn(
            gate_x,
            weights,
            self.activation(),
            up_input=None if up_x is gate_x else up_x,
            predictor_input=predictor_input,
            dense=self.options.dense,
            threads=self.options.threads,
            counts=self.counts,
        )
        self._add(rows, weights)
        return out

    def _count_call(self, tokens: int) -> None:
        if self.counts is None:  # otherwise the step counts them
            self._tokens += tokens
            self.count_rotations(1)

    def _add(self, rows: RowsRead, weights: FfnWeights) -> None:
        """Adds the rows read, grouped by their bytes: a model may be cast between two steps."""
        if self.counts is not None:
            return
        sizes = weights.read_bytes
        self._read_of.setdefault(sizes, RowsRead())
        self._read_of[sizes] += rows


class MlpForward(BlockForward):
    """Forward of a dense block with gate_proj, up_proj and down_proj."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Maps hidden states [batch, tokens, hidden] to the same shape."""
        if not self._can(x):
            return self._dense(x)
        weights = self.weights(0, x)
        # Predictors take the input before its mask.
        seen = x if self._norm_input is None else self._norm_input
        seen = seen if weights.reads_before_masks else None
        self._count_call(x.shape[:-1].numel())
        return self._read(self._masked(x), weights, seen)

    def _from_blocks(self, *arguments: torch.Tensor) -> torch.Tensor:
        return self._products(arguments[0], self._masked(arguments[0]))

    def _stored(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        block = self.block
        gate, up = self._held("gate", block.gate_proj.weight), self._held("up", block.up_proj.weight)
        return gate, up, self._held("down", block.down_proj.weight)

    def _copied(self, index: int) -> list[tuple[KeptBlocks, torch.Tensor]]:
        return [(one.proxies, one.weight) for one in (self.block.gate_proj, self.block.up_proj)]


class ExpertsForward(BlockForward):
    """Forward of fused experts: reads only experts that a token is routed to, and only the rows needed."""

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Maps [tokens, hidden] to the same shape; see SparseExperts."""
        if not self._can(hidden_states):
            return self._dense(hidden_states, top_k_index, top_k_weights)
        self._count_call(len(hidden_states))
        seen = hidden_states if self._norm_input is None else self._norm_input
        hidden_states = self._masked(hidden_states)
        backend = backend_of(hidden_states, in_blocks=self.kept is not None)
        if backend == "triton" and self._alike():
            return self._on_device(hidden_states, seen, Routing(top_k_index, top_k_weights))
        output = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            token, slot = torch.where(top_k_index == expert)
            weights = self.weights(expert, hidden_states)
            chosen = None
            if weights.reads_before_masks:
                chosen = seen.reshape(hidden_states.shape)[token]
            expert_output = self._read(hidden_states[token], weights, chosen, expert)
            share = top_k_weights[token, slot, None]
            output.index_add_(0, token, (expert_output * share).to(output.dtype))
        return output

    def _on_device(self, x: torch.Tensor, seen: torch.Tensor, routing: Routing) -> torch.Tensor:
        """All experts at once: only the device knows which are used, and a synchronisation takes time."""
        gate, up = self._gate_and_up()
        masks = [own_mask(own_part(self.block, name)) for name in ("gate", "up")]
        gate_x, up_x = (x if mask is None else masked_by_triton(mask, x) for mask in masks)
        thresholds, _ = thresholds_of(self.block)
        weights = FfnWeights(
            gate,
            up,
            self._held("down", self.block.down_proj),
            **thresholds,
            **self._constants(),
            predictor=self._stacked(x),
            by_columns=self.by_columns,
            copies=None,  # no kernel for a GPU reads them, nor routers
        )
        out, rows = sparse_experts(
            gate_x,
            weights,
            self.activation(),
            routing,
            up_input=up_x,
            predictor_input=seen if weights.predictor is not None else None,
            counts=self.counts,
        )
        self._add(rows, weights)
        return out

    def _alike(self) -> bool:
        """Whether there are no masks but thresholds, and all predictors have the same rank, so that the experts can be stacked."""
        if thresholds_of(self.block)[1]:
            return False
        return len({one.a.shape for one in self.options.predictors or ()}) <= 1

    def _stacked(self, x: torch.Tensor) -> Predictor | None:
        """All predictors stacked, experts first, in x's dtype and on its device. The single ones become views of the stack."""
        if self.options.predictors is None:
            return None
        if self._stack is None or self._stack.like(x, in_blocks=False) is not self._stack:
            single = self.options.predictors
            a, b = (torch.stack([getattr(one, part).to(x) for one in single]) for part in "ab")
            self._stack = Predictor(a, b, single[0].threshold)
            self.options.predictors = [replace(one, a=a[index], b=b[index]) for index, one in enumerate(single)]
        return self._stack

    def _from_blocks(self, *arguments: torch.Tensor) -> torch.Tensor:
        seen, top_k_index, top_k_weights = arguments
        hidden_states = self._masked(seen)
        output = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            token, slot = torch.where(top_k_index == expert)
            share = top_k_weights[token, slot, None]
            expert_output = self._products(seen[token], hidden_states[token], expert)
            output.index_add_(0, token, (expert_output * share).to(output.dtype))
        return output

    def count(self) -> int:
        return len(self.block.gate_up_proj)

    def _copied(self, index: int) -> list[tuple[KeptBlocks, torch.Tensor]]:
        return [(self.block.proxies, self.block.gate_up_proj[index])]

    def _stored(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate, up = self._gate_and_up()
        return gate[index], up[index], self._held("down", self.block.down_proj)[index]

    def _gate_and_up(self) -> list[torch.Tensor]:
        """Of all experts, each as `FfnWeights` holds it."""
        weight = self.block.gate_up_proj
        neurons = weight.shape[1] // 2
        halves = []
        for name, part in (("gate", slice(neurons)), ("up", slice(neurons, None))):
            held = self._held(name, weight)
            halves.append(held[..., part] if name in self.by_columns else held[:, part])
        return halves
