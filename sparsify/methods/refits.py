"""Activation blending in steps: at each the down projections are refitted, so that block outputs stay as they were before it.

The share of the sparse activation rises in `blending.refit_milestones` equal steps, the first before training step 1. At each, layer
by layer in order, the block with the new share is fitted by ridge regression to its own outputs with the old share
(`sparsify.methods.calibrated_replacement`, without its correction of the residual stream). Before the first, signs are flipped
where that preserves more of a neuron: with the dense activation it changes nothing.

It happens between two training steps, inside the running engine. A refit is a pure function of the weights, so a run that is killed
during one repeats it; the objective's state says how many the weights have gone through.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist

from sparsify.methods.blending import (
    Blending,
    activation_at,
    blend,
    blend_tokens,
    blended_share,
    set_share,
)
from sparsify.methods.calibrated_replacement import (
    HELD_OUT_EVERY,
    CalibratedLayer,
    ExpertResult,
    LayerCalibration,
)
from sparsify.methods.layer_expert import Expert, Routes
from sparsify.methods.layerwise import CHUNK_TOKENS, Inputs
from sparsify.methods.live_model import Engine, evaluating, full_weight, set_full_weight
from sparsify.methods.objective import TrainingRun, objective
from sparsify.mixture.sequences.reader import NO_LOSS, SequenceReader
from sparsify.models import ACTIVATIONS, FfnActivation, SparseConfig
from sparsify.models.group_router import GroupRouter
from sparsify.models.masking import READERS, is_fused
from sparsify.models.projection_masks import MaskedLinear, ProjectionMask
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.sparsification import ConversionSection
from sparsify.runs.data import wait_for_sequences

ROUNDING = 1e-9
"""Of a milestone: so that one that lies at a step's beginning by arithmetic is met there."""


@dataclass(frozen=True)
class RefitRecord:
    """What came of one milestone.

    Attributes:
        blended_share: How much of the sparse activation is in force from here on.
        error_before: Error of a block's output on held-out tokens, relative to its output before the milestone; with the new
            share and the old weights. Mean over layers and experts; None where no held-out tokens reached them.
        error_after: The same with the weights that it has now.
        num_flipped: Neurons whose sign was flipped.
        kept: Layers whose down projection stays, and why; of fused experts, which one.
    """

    blended_share: float
    error_before: float | None
    error_after: float | None
    num_flipped: int
    kept: list[dict[str, Any]]

    def sentence(self) -> str:
        before, after = (
            "unknown" if error is None else f"{error:.3f}" for error in (self.error_before, self.error_after)
        )
        line = f"refit at blended share {self.blended_share:.2f}: relative error {before} before, {after} after"
        line += f"; {self.num_flipped:,} signs flipped" if self.num_flipped else ""
        for one in self.kept:
            expert = "" if one["expert"] is None else f", expert {one['expert']}"
            line += f"; layer {one['layer']}{expert} keeps its weights: {one['because']}"
        return line


@objective
class RefittedBlending(Blending):
    """The blending of a run in steps, with a refit at each; its state is how many refits the weights have gone through."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self._refits = 0

    @classmethod
    def of(cls, run: TrainingRun) -> Self | None:
        return cls(run) if run.recipe.blending.refit_milestones else None

    def blend(self) -> float:
        run = self._run
        return blend(run.engine.module, run.recipe, run.state.seen_tokens, self._refits)

    def between_steps(self) -> bool:
        """Refits the live model where a milestone lies before the next step.

        Runs to its end once begun: a half-refitted model could not be saved.
        """
        run, recipe, state = self._run, self._run.recipe, self._run.state
        due = refits_due(recipe, state.seen_tokens)
        if due <= self._refits:
            return True
        first, count = refit_sequences(recipe, state.step)
        is_here = wait_for_sequences(run.reader, first, count, run.stop_requested)
        stopping = torch.tensor(run.stop_requested() or not is_here, device=run.engine.device).int()
        dist.all_reduce(stopping)
        if stopping:
            return False
        started = time.monotonic()
        shares = self.blend(), blended_share(recipe, state.seen_tokens, due)
        record = refit(run.engine, recipe, run.reader, (first, count), shares)
        self._refits = due
        run.model_changed()
        seconds = time.monotonic() - started
        run.record(
            "refit",
            f"{record.sentence()} ({seconds:.1f} s)",
            # The step that it precedes: a run resumed from before it records it once.
            step=state.step + 1,
            **asdict(record),
            seconds=round(seconds, 3),
        )
        return True

    def state(self) -> dict[str, Any]:
        return {"refits": self._refits} if self._refits else {}

    def load_state(self, state: dict[str, Any]) -> None:
        self._refits = state.get("refits", 0)


def refits_due(recipe: Recipe, seen_tokens: int) -> int:
    """How many refits must be done before the step that begins after so many tokens."""
    milestones = recipe.blending.refit_milestones
    if not milestones:
        return 0
    passed = seen_tokens * milestones / blend_tokens(recipe)
    return min(milestones, int(passed + ROUNDING) + 1)


def refit_sequences(recipe: Recipe, step: int) -> tuple[int, int]:
    """Number of the first sequence that a refit rests on, and how many they are: those to be trained on next, or the run's last."""
    count = recipe.blending.refit_tokens // recipe.training.sequence_length
    global_batch_size = recipe.training.global_batch_size
    return min(step * global_batch_size, recipe.num_steps * global_batch_size - count), count


@torch.no_grad()
def refit(
    engine: Engine,
    recipe: Recipe,
    reader: SequenceReader,
    sequences: tuple[int, int],
    shares: tuple[float, float],
) -> RefitRecord:
    """Moves every block between two shares of the sparse activation (before, after), and refits it on `sequences` (first, count)."""
    config = engine.module.config
    results: list[list[ExpertResult]] = []
    inputs = _LayerInputs(engine, reader, sequences, recipe.training.micro_batch_size)
    for block in engine.module.ffn_blocks():
        found = _refit_block(recipe, config, block, inputs.next_layer(), shares)
        _put(block, found)
        set_share(block.ffn_activation, config, shares[1])
        results.append(found.results)
    return _record(results, shares[1])


class _LayerInputs:
    """This rank's share of the sequences on its way through the model, a layer further at each call.

    A pass begins where the one before it ended: only the layer refitted since then and the next one run. They run inside the
    whole model, without the other layers, so that masks are made and weights are gathered as in training. All ranks make the
    same number of passes, which ZeRO-3 needs.
    """

    def __init__(
        self,
        engine: Engine,
        reader: SequenceReader,
        sequences: tuple[int, int],
        micro_batch_size: int,
    ) -> None:
        self._engine, self._layer = engine, -1
        self._batches: list[dict[str, torch.Tensor]] = []
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._hidden: list[torch.Tensor] = []
        (first, count), size = sequences, micro_batch_size
        rank, world = dist.get_rank(), dist.get_world_size()
        for index in range(-(-count // (world * size))):
            start = (index * world + rank) * size
            mine = range(start, min(start + size, count))
            batch = reader.batch(first + start if len(mine) else first, max(len(mine), 1)).tensors
            self._batches.append({key: value.to(engine.device) for key, value in batch.items()})
            if len(mine):
                held_out = [number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for number in mine]
                held_out_here = torch.tensor(held_out, device=engine.device)
                self._parts.append(_parts(self._batches[-1], held_out_here))

    def next_layer(self) -> list[_Seen]:
        self._layer += 1
        decoder = self._engine.module.model
        layer, layers = decoder.layers[self._layer], decoder.layers
        block = self._engine.module.ffn_blocks()[self._layer]
        before: list[torch.Tensor] = []
        seen: list[tuple[torch.Tensor, Routes]] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0])),
            block.register_forward_pre_hook(lambda _, inputs: seen.append(_take(*inputs))),
        ]
        try:
            with evaluating(self._engine):
                decoder.layers = layers[max(self._layer - 1, 0) : self._layer + 1]
                for number, batch in enumerate(self._batches):
                    start = (
                        {"inputs_embeds": self._hidden[number]} if self._hidden else {"input_ids": batch["input_ids"]}
                    )
                    self._engine(
                        **start,
                        position_ids=batch["position_ids"],
                        use_cache=False,
                        logits_to_keep=1,
                    )
        finally:
            decoder.layers = layers
            for hook in hooks:
                hook.remove()
        self._hidden = before
        # A rank without sequences of its own in the last pass only went along.
        return [_Seen(*each, *parts) for each, parts in zip(seen, self._parts, strict=False)]


@dataclass(frozen=True)
class _Seen:
    """What a block saw of one micro-batch: its inputs [tokens, hidden] and their experts, and which tokens are for fitting and which are held out."""

    x: torch.Tensor
    routes: Routes
    fit: torch.Tensor
    held_out: torch.Tensor


def _take(hidden: torch.Tensor, *routed: torch.Tensor) -> tuple[torch.Tensor, Routes]:
    """A block's inputs, [tokens, hidden], and their experts, from what it is called with."""
    x = hidden.detach().flatten(0, -2)
    if routed:
        return x, Routes(*(each.detach() for each in routed))
    experts = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
    return x, Routes(experts, torch.ones_like(experts, dtype=torch.float32))


def _parts(batch: dict[str, torch.Tensor], held_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are for fitting, and which are held out. Bool [tokens] each; `held_out` [sequences]"""
    # What packing could not fill is at position 0 and has no label.
    is_text = (batch["labels"] != NO_LOSS) | (batch["position_ids"] > 0)
    return (is_text & ~held_out[:, None]).flatten(), (is_text & held_out[:, None]).flatten()


def _chunks(seen: list[_Seen]) -> Iterator[Inputs]:
    for one in seen:
        for start in range(0, len(one.x), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            x = one.x[part].float()
            routes = Routes(one.routes.experts[part], one.routes.weights[part].float())
            nothing = x.new_zeros(1).expand_as(x)
            yield Inputs(x, routes, nothing, one.fit[part], one.held_out[part])


def _refit_block(
    recipe: Recipe, config: SparseConfig, block: Any, seen: list[_Seen], shares: tuple[float, float]
) -> CalibratedLayer:
    """Refits one block from the old share to the new one; its live weights stay as they are."""
    old, new = shares
    flip_for = None
    if old == 0 and ACTIVATIONS[config.ffn_activation].up == "relu":
        flip_for = FfnActivation(config.ffn_activation, config.ffn_gate_threshold)
    dense = _experts(block, config, old)
    replaced = [
        replace(expert, activation=_activation(block, config, new, number)) for number, expert in enumerate(dense)
    ]
    return LayerCalibration(
        dense,
        replaced,
        ConversionSection(ridge=recipe.conversion.ridge),
        torch.float32,
        partial(_chunks, seen),
        flip_for,
        dist.all_reduce,
    ).run()


def _experts(block: Any, config: SparseConfig, share: float) -> list[Expert]:
    if is_fused(block):
        gates, ups = full_weight(block.gate_up_proj).chunk(2, dim=1)
        weights = list(zip(gates, ups, full_weight(block.down_proj), strict=True))
    else:
        gate, up = full_weight(block.gate_proj.weight), full_weight(block.up_proj.weight)
        weights = [(gate, up, full_weight(block.down_proj.weight))]
    router = block.group_router
    if router is not None:
        whole = {name: full_weight(values) for name, values in router.named_parameters()}
        router = GroupRouter.holding(router.rule, whole | dict(router.named_buffers()))
    return [
        Expert(
            *(gate, up, down, _activation(block, config, share, number)),
            input_mask=block.input_mask,
            projections=_projection_masks(block, number),
            group_router=None if router is None else router.of_expert(number),
        )
        for number, (gate, up, down) in enumerate(weights)
    ]


def _projection_masks(block: Any, number: int) -> dict[str, ProjectionMask]:
    names = READERS["ffn_in"] + READERS["inter"]
    if is_fused(block):
        masks = {name: getattr(block, f"{name}_mask") for name in names}
        return {name: mask.of_expert(number) for name, mask in masks.items() if mask is not None}
    linears = {name: getattr(block, name) for name in names}
    return {name: ProjectionMask.of(linear) for name, linear in linears.items() if isinstance(linear, MaskedLinear)}


def _activation(block: Any, config: SparseConfig, share: float, number: int) -> FfnActivation:
    expert = number if is_fused(block) else None
    return activation_at(block.ffn_activation, config, share, expert)


def _put(block: Any, found: CalibratedLayer) -> None:
    """Writes what was found into the live block; the same decisions on every rank."""
    experts, flipped = found.stages["refit"], bool(found.flips.any())
    if flipped:
        if is_fused(block):
            gate_ups = torch.stack([torch.cat([each.gate, each.up]) for each in experts])
            set_full_weight(block.gate_up_proj, gate_ups)
        else:
            set_full_weight(block.up_proj.weight, experts[0].up)
    if flipped or any(result.kept_because is None for result in found.results):
        if is_fused(block):
            set_full_weight(block.down_proj, torch.stack([each.down for each in experts]))
        else:
            set_full_weight(block.down_proj.weight, experts[0].down)


def _record(results: list[list[ExpertResult]], share: float) -> RefitRecord:
    every = [result for layer in results for result in layer]
    measured = [one for one in every if one.error_bare is not None]
    before = [one.error_bare for one in measured]
    after = [one.error_before if one.kept_because else one.error_refitted for one in measured]
    return RefitRecord(
        share,
        _mean(before),
        _mean(after),
        sum(result.num_flipped for result in every),
        [
            {
                "layer": layer,
                "expert": expert if len(experts) > 1 else None,
                "because": result.kept_because,
            }
            for layer, experts in enumerate(results)
            for expert, result in enumerate(experts)
            if result.kept_because is not None
        ],
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
