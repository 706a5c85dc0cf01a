"""The blended swap in steps: at each the down projections are refitted, so that blocks answer as they did before the step.

The share of the sparse activation rises in `blending.refit_milestones` equal steps, the first before training step 1. At each, layer
by layer in order, what the block with the new share makes of its inputs is fitted by ridge regression to what it answered with
the old share (`sparsify.methods.calibrated_replacement`, with nothing to mend in the stream). Before the first, signs are turned where
that saves more of a neuron: with the dense activation it changes nothing.

It happens between two training steps, inside the running engine. A refit is a pure function of the weights, so a run that is killed
meanwhile does it again; `TrainingState.refits` says how many the weights have gone through.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from sparsify.methods.blending import (
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
from sparsify.methods.layerwise import CHUNK_TOKENS, Expert, Inputs, Routes
from sparsify.methods.live_model import Engine, evaluating, full_weight, set_full_weight
from sparsify.mixture.sequences.reader import NO_LOSS, SequenceReader
from sparsify.models import ACTIVATIONS, FfnActivation, SparseConfig
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.sparsification import ConversionSection
from sparsify.runs.data import wait_for_sequences
from sparsify.training.session import Session

ROUNDING = 1e-9
"""Of a milestone: so that one that lies at a step's beginning by arithmetic is met there."""


@dataclass(frozen=True)
class RefitRecord:
    """What came of one milestone.

    Attributes:
        blended_share: How much of the sparse activation is in force from here on.
        error_before: Error of a block's answer on held-out tokens, relative to what it answered before the milestone; with the new
            share and the old weights. Mean over layers and experts; None where nothing judged them.
        error_after: The same with the weights that it has now.
        num_flipped: Neurons whose sign was turned.
        kept: Layers whose down projection stays, and why; of fused experts, which one.
    """

    blended_share: float
    error_before: float | None
    error_after: float | None
    num_flipped: int
    kept: list[dict[str, Any]]

    def sentence(self) -> str:
        """The same for the log."""
        before, after = (
            "unknown" if error is None else f"{error:.3f}"
            for error in (self.error_before, self.error_after)
        )
        line = f"refit at blended share {self.blended_share:.2f}: relative error {before} before, {after} after"
        line += f"; {self.num_flipped:,} signs flipped" if self.num_flipped else ""
        for one in self.kept:
            expert = "" if one["expert"] is None else f", expert {one['expert']}"
            line += f"; layer {one['layer']}{expert} keeps its weights: {one['because']}"
        return line


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


def refit_if_due(session: Session) -> bool:
    """Refits the live model where a milestone lies before the next step; every rank calls it.

    Returns:
        False when a rank was asked to stop before it began. Once begun it is brought to its end: a model of which half is refitted
        could not be saved.
    """
    recipe, state = session.recipe, session.state
    due = refits_due(recipe, state.seen_tokens)
    if due <= state.refits:
        return True
    first, count = refit_sequences(recipe, state.step)
    here = wait_for_sequences(session.reader, first, count, session.stop_requested)
    stopping = torch.tensor(session.stop_requested() or not here, device=session.engine.device)
    stopping = stopping.int()
    dist.all_reduce(stopping)
    if stopping:
        return False
    started = time.monotonic()
    shares = (
        blend(session.engine.module, recipe, state.seen_tokens, state.refits),
        blended_share(recipe, state.seen_tokens, due),
    )
    record = refit(session.engine, recipe, session.reader, (first, count), shares)
    # What losses were before says nothing about those to come.
    session.state = replace(state, refits=due, recent_losses=[])
    seconds = time.monotonic() - started
    session.telemetry.record(
        "refit",
        state.step
        + 1,  # the step that it precedes, so that what is trained again from before it is recorded once
        state.seen_tokens,
        f"{record.sentence()} ({seconds:.1f} s)",
        **asdict(record),
        seconds=round(seconds, 3),
    )
    return True


@torch.no_grad()
def refit(
    engine: Engine,
    recipe: Recipe,
    reader: SequenceReader,
    sequences: tuple[int, int],
    shares: tuple[float, float],
) -> RefitRecord:
    """Takes every block from one share of the sparse activation to another, and refits it.

    Args:
        engine: The DeepSpeed engine.
        recipe: The run's recipe.
        reader: Gives the sequences.
        sequences: Number of the first, and how many.
        shares: The share that every block has, and the one to come.
    """
    config = engine.module.config
    results: list[list[ExpertResult]] = []
    stream = _Stream(engine, reader, sequences, recipe.training.micro_batch_size)
    for block in engine.module.ffn_blocks():
        found = _refit_block(recipe, config, block, stream.next_inputs(), shares)
        _put(block, found)
        set_share(block.ffn_activation, config, shares[1])
        results.append(found.results)
    return _record(results, shares[1])


class _Stream:
    """This rank's share of the sequences on its way through the model, a layer further at each call.

    A pass begins where the one before it stood: only the layer that was refitted meanwhile and the next one run. They run inside the
    whole model, with the other layers left out, so that masks are made and weights are gathered as in training. All ranks make the
    same number of passes, which ZeRO-3 needs.

    Args:
        engine: The DeepSpeed engine.
        reader: Gives the sequences.
        sequences: Number of the first, and how many.
        micro_batch_size: Sequences of one pass.
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
                judges = [number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for number in mine]
                judging = torch.tensor(judges, device=engine.device)
                self._parts.append(_parts(self._batches[-1], judging))

    def next_inputs(self) -> list[_Seen]:
        """What the feed-forward block of the next layer sees."""
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
                        {"inputs_embeds": self._hidden[number]}
                        if self._hidden
                        else {"input_ids": batch["input_ids"]}
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
    """What a block saw of one micro-batch: its inputs [tokens, hidden] and their experts, and which tokens fit and judge."""

    x: torch.Tensor
    routes: Routes
    fit: torch.Tensor
    judge: torch.Tensor


def _take(hidden: torch.Tensor, *routed: torch.Tensor) -> tuple[torch.Tensor, Routes]:
    """A block's inputs, [tokens, hidden], and their experts, from what it is called with."""
    x = hidden.detach().flatten(0, -2)
    if routed:
        return x, Routes(*(each.detach() for each in routed))
    experts = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
    return x, Routes(experts, torch.ones_like(experts, dtype=torch.float32))


def _parts(
    batch: dict[str, torch.Tensor], judges: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens fit, and which judge. Bool [tokens] each; `judges` [sequences]"""
    # What packing could not fill stands at position 0 and has no label.
    is_text = (batch["labels"] != NO_LOSS) | (batch["position_ids"] > 0)
    return (is_text & ~judges[:, None]).flatten(), (is_text & judges[:, None]).flatten()


def _chunks(seen: list[_Seen]) -> Iterator[Inputs]:
    for one in seen:
        for start in range(0, len(one.x), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            x = one.x[part].float()
            routes = Routes(one.routes.experts[part], one.routes.weights[part].float())
            nothing = x.new_zeros(1).expand_as(x)
            yield Inputs(x, routes, nothing, one.fit[part], one.judge[part])


def _refit_block(
    recipe: Recipe, config: SparseConfig, block: Any, seen: list[_Seen], shares: tuple[float, float]
) -> CalibratedLayer:
    """Refits one block from the old share to the new one; its live weights stay as they are."""
    old, new = shares
    turn_for = None
    if old == 0 and ACTIVATIONS[config.ffn_activation].up == "relu":
        turn_for = FfnActivation(config.ffn_activation, config.ffn_gate_threshold)
    dense = _experts(block, config, old)
    swapped = [
        replace(expert, activation=_activation(block, config, new, number))
        for number, expert in enumerate(dense)
    ]
    return LayerCalibration(
        dense,
        swapped,
        ConversionSection(ridge=recipe.conversion.ridge),
        torch.float32,
        partial(_chunks, seen),
        turn_for,
        dist.all_reduce,
    ).run()


def _experts(block: Any, config: SparseConfig, share: float) -> list[Expert]:
    """A block's experts in fp32, each with its activation."""
    if _is_fused(block):
        gates, ups = full_weight(block.gate_up_proj).chunk(2, dim=1)
        weights = list(zip(gates, ups, full_weight(block.down_proj), strict=True))
    else:
        gate, up = full_weight(block.gate_proj.weight), full_weight(block.up_proj.weight)
        weights = [(gate, up, full_weight(block.down_proj.weight))]
    return [
        Expert(gate, up, down, _activation(block, config, share, number))
        for number, (gate, up, down) in enumerate(weights)
    ]


def _activation(block: Any, config: SparseConfig, share: float, number: int) -> FfnActivation:
    expert = number if _is_fused(block) else None
    return activation_at(block.ffn_activation, config, share, expert)


def _is_fused(block: Any) -> bool:
    """Whether a block holds several experts in one parameter."""
    return hasattr(block, "gate_up_proj")


def _put(block: Any, found: CalibratedLayer) -> None:
    """Writes what was found into the live block; the same decisions on every rank."""
    experts, turned = found.stages["refit"], bool(found.flips.any())
    if turned:
        if _is_fused(block):
            gate_ups = torch.stack([torch.cat([each.gate, each.up]) for each in experts])
            set_full_weight(block.gate_up_proj, gate_ups)
        else:
            set_full_weight(block.up_proj.weight, experts[0].up)
    if turned or any(result.kept_because is None for result in found.results):
        if _is_fused(block):
            set_full_weight(block.down_proj, torch.stack([each.down for each in experts]))
        else:
            set_full_weight(block.down_proj.weight, experts[0].down)


def _record(results: list[list[ExpertResult]], share: float) -> RefitRecord:
    every = [result for layer in results for result in layer]
    judged = [one for one in every if one.error_bare is not None]
    before = [one.error_bare for one in judged]
    after = [one.error_before if one.kept_because else one.error_refitted for one in judged]
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
