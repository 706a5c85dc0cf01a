"""The calibrated replacement of one layer: signs, a mask, reconstruction, and whether each reconstruction is kept.

A gated neuron adds f(gate) · up · down to the stream. Negating its row of the up projection together with its column of the
down projection changes nothing as long as up is not rectified: SwiGLU and ReGLU stay what they are. dReLU keeps only up > 0,
so the sign decides what survives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from pydantic import Field

from sparsify.methods.attention_refit import AttentionLayer, refit_output
from sparsify.methods.base import LayerRewrite, Mask, MethodSettings, Rewritten, WeightMethod, register
from sparsify.methods.layer_expert import Expert
from sparsify.methods.layerwise import LEAST_ROWS, Inputs, InputsOf, Layer
from sparsify.methods.reconstruction import Errors, Gram, Reduce, nothing_to_reduce
from sparsify.methods.sites import ATTENTION_SITES, Parts, fit_block, rows_of
from sparsify.methods.thresholds import OutputNormThresholds, ThresholdSettings
from sparsify.models import ACTIVATIONS, FfnActivation
from sparsify.recipe.sparsification import REFIT_TARGETS, ConversionSection


class SignEnergies:
    """Per neuron, the energy that survives with its present sign and with the other, over rows of inputs."""

    def __init__(self, num_neurons: int, device: torch.device) -> None:
        self.kept = torch.zeros(2, num_neurons, dtype=torch.float64, device=device)

    def add(self, expert: Expert, x: torch.Tensor) -> None:
        """Adds inputs [rows, hidden] of an expert that has the new activation."""
        gate, up = x @ expert.gate.T, x @ expert.up.T
        for sign, kept in zip((1, -1), self.kept, strict=True):
            kept += expert.activation(gate, sign * up).square().sum(0)

    def flips(self) -> torch.Tensor:
        """Which neurons keep more with the other sign. Bool [neurons]"""
        return self.kept[1] > self.kept[0]


def flip(expert: Expert, flips: torch.Tensor) -> Expert:
    """The expert with up row and down column of the chosen neurons (bool [neurons]) negated."""
    sign = 1 - 2 * flips.to(expert.up.dtype)
    return replace(expert, up=expert.up * sign[:, None], down=expert.down * sign)


HELD_OUT_EVERY = 8
"""Every eighth calibration sequence is held out to evaluate the refits."""
BARE = "bare replacement"
"""Name of the stage with the new activation alone."""
RECONSTRUCTED = "refit"
"""Name of the stage after the reconstruction."""


@dataclass(frozen=True)
class ExpertResult:
    """Result for one expert. Errors are relative, on held-out tokens; None without such tokens.

    Attributes:
        num_tokens: Calibration tokens that were routed to it and that the refit rests on.
        num_flipped: Neurons whose sign was flipped.
        error_bare: With the bare replacement.
        error_before: With signs and a mask, and the old down projection.
        error_refitted: With the refitted one; None without reconstruction.
        kept_because: Why the old down projection is kept; None where the refitted one replaces it, or without reconstruction.
    """

    num_tokens: int
    num_flipped: int
    error_bare: float | None
    error_before: float | None
    error_refitted: float | None
    kept_because: str | None


@dataclass(frozen=True)
class CalibratedLayer:
    """A layer's experts at each stage, and what was found.

    Attributes:
        stages: Experts by stage: `dense`, `bare replacement`, then what was done to them, the last being the result.
        flips: Neurons with flipped signs, bool [experts, neurons].
        mask_record: What the mask says of itself.
        masks: What is stored of the mask.
    """

    stages: dict[str, list[Expert]]
    flips: torch.Tensor
    results: list[ExpertResult]
    mask_record: dict[str, Any] = field(default_factory=dict)
    masks: Parts = field(default_factory=dict)


class LayerCalibration:
    """Calibrates one layer.

    Args:
        dense: Its experts with the activation that they were trained with.
        replaced: The same with the new one.
        dtype: Dtype on disk: what is fitted is rounded to it before it is evaluated.
        inputs: Gives all calibration tokens, again on each call.
        flip_for: Activation, one that rectifies up, whose surviving half decides a neuron's sign; None flips none.
        reduce: Sums over ranks, where `inputs` gives only this one's part of the tokens. The result is the same on all.
        mask: Fitted before the reconstruction; None for none. On one rank only.
        reconstruct: Whether to solve for the down projection.
        measure: Whether errors are wanted without a reconstruction, too.
    """

    def __init__(
        self,
        dense: list[Expert],
        replaced: list[Expert],
        settings: ConversionSection,
        dtype: torch.dtype,
        inputs: InputsOf,
        flip_for: FfnActivation | None,
        reduce: Reduce = nothing_to_reduce,
        mask: Mask | None = None,
        reconstruct: bool = True,
        measure: bool = True,
    ) -> None:
        self._dense, self._replaced = dense, replaced
        self._settings, self._dtype, self._inputs = settings, dtype, inputs
        self._flip_for, self._reduce = flip_for, reduce
        self._mask, self._reconstruct, self._measure = mask, reconstruct, measure

    def run(self) -> CalibratedLayer:
        """Signs, mask, reconstruction; each rests on the one before."""
        stages = {"dense": self._dense, BARE: self._replaced}
        flips = self._flips()
        experts = [flip(expert, each) for expert, each in zip(self._replaced, flips, strict=True)]
        if self._flip_for is not None:
            stages["signs"] = experts
        mask_record, masks = {}, {}
        if self._mask is not None:
            experts, masks, mask_record = fit_block(self._mask, experts, self._inputs, self._dtype)
            stages[self._mask.name] = experts
        if not (self._reconstruct or self._measure):
            return CalibratedLayer(stages, flips, [], mask_record, masks)
        refitted, results = [], []
        for number, expert in enumerate(experts):
            new, result = self._refit(number, expert, int(flips[number].sum()))
            refitted.append(new)
            results.append(result)
        if self._reconstruct:
            stages[RECONSTRUCTED] = refitted
        return CalibratedLayer(stages, flips, results, mask_record, masks)

    def _flips(self) -> torch.Tensor:
        shape = len(self._replaced), len(self._replaced[0].up)
        flips = torch.zeros(shape, dtype=torch.bool, device=self._replaced[0].up.device)
        if self._flip_for is None:
            return flips
        for number, expert in enumerate(self._replaced):
            energies = SignEnergies(shape[1], flips.device)
            expert = replace(expert, activation=self._flip_for)
            for chunk, token, _ in self._rows(number, "fit"):
                energies.add(expert, chunk.x[token])
            self._reduce(energies.kept)
            flips[number] = energies.flips()
        return flips

    def _refit(self, number: int, expert: Expert, num_flipped: int) -> tuple[Expert, ExpertResult]:
        hidden_size, num_neurons = expert.down.shape
        gram = Gram(num_neurons, hidden_size, expert.up.device)
        for chunk, token, weight in self._rows(number, "fit"):
            x = chunk.x[token]
            if not self._reconstruct:
                gram.num_rows += len(token)
                continue
            wanted = self._wanted(number, chunk, token) - expert.constant
            gram.add(expert.neurons(x) * weight[:, None], wanted * weight[:, None])
        gram.reduce(self._reduce)
        few = gram.num_rows < LEAST_ROWS
        down = expert.down if few or not self._reconstruct else gram.solve(expert.down, self._settings.ridge)
        candidate = replace(expert, down=down.to(self._dtype).float())
        errors = Errors(("bare", "before", "refitted"), expert.up.device)
        for chunk, token, weight in self._rows(number, "held_out"):
            x, weight = chunk.x[token], weight[:, None]
            h = expert.neurons(x)
            errors.add(
                self._wanted(number, chunk, token) * weight,
                bare=self._replaced[number].output(x) * weight,
                before=expert.project("down_proj", h) * weight,
                refitted=candidate.project("down_proj", h) * weight,
            )
        errors.reduce(self._reduce)
        bare, before = errors.relative("bare"), errors.relative("before")
        if not self._reconstruct:
            return expert, ExpertResult(gram.num_rows, num_flipped, bare, before, None, None)
        after, reason = errors.relative("refitted"), None
        if few:
            reason = f"only {gram.num_rows} calibration tokens were routed to it"
        elif before is None or after is None:
            reason = "no held-out token to evaluate the refit on"
        elif not after < before:
            reason = "the refit was worse on held-out tokens"
        result = ExpertResult(gram.num_rows, num_flipped, bare, before, after, reason)
        return (expert if reason else candidate), result

    def _wanted(self, number: int, chunk: Inputs, token: torch.Tensor) -> torch.Tensor:
        dense, x = self._dense[number], chunk.x[token]
        return dense.output(x) + chunk.gap[token]

    def _rows(self, number: int, part: str) -> Iterator[tuple[Inputs, torch.Tensor, torch.Tensor]]:
        for chunk in self._inputs():
            token, weight = rows_of(chunk, number, part)
            if len(token):
                yield chunk, token, weight


class CalibratedSettings(MethodSettings):
    target_zeros: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of exact zeros that thresholds give every layer, such as 0.9; null sets no thresholds.",
    )


@register
class CalibratedReplacement(WeightMethod):
    """Replaces the activation: sign alignment, output-norm thresholds where zeros are wanted, and reconstruction."""

    name = "calibrated_replacement"
    paper = "none: ours"
    Settings = CalibratedSettings
    needs_new_activation = True
    revives_zeros = True

    def __init__(self, settings: CalibratedSettings) -> None:
        self.mask: Mask | None = None
        if settings.target_zeros is not None:
            self.mask = OutputNormThresholds(ThresholdSettings(target_zeros=settings.target_zeros))
        self.last_stage = RECONSTRUCTED

    def rewrite(self, layer: Layer, conversion: ConversionSection) -> Rewritten:
        activation = layer.replaced[0].activation
        flip_for = activation if ACTIVATIONS[activation.name].up == "relu" else None
        return _rewritten(
            LayerCalibration(
                layer.dense,
                layer.replaced,
                conversion,
                layer.dtype,
                layer.inputs,
                flip_for,
                mask=self.mask,
            ).run()
        )


class MaskedWeights(LayerRewrite):
    """A mask as a rewrite of weights: the activation as it is, the mask, and the reconstruction where it is wanted."""

    def __init__(self, mask: Mask, refit: bool | None) -> None:
        self.mask: Mask | None = mask
        self._fitted = mask
        self._reconstruct = mask.reconstructs if refit is None else refit
        self.last_stage = RECONSTRUCTED if self._reconstruct else mask.name
        self.revives_zeros = self._reconstruct or any(rule.rotated for rule in mask.sites.values())

    def rewrite_attention(self, attention: AttentionLayer, conversion: ConversionSection) -> tuple[dict[str, Any], str]:
        """Reconstructs the output projection, where its inputs are masked."""
        if not (self._reconstruct and any(site in ATTENTION_SITES for site in self._fitted.sites)):
            return {}, ""
        repaired = REFIT_TARGETS[conversion.refit_target]
        found = refit_output(attention, ridge=conversion.ridge, repaired=repaired)
        kept = found["kept_because"]
        return {"attention": found}, f"the attention keeps its output projection: {kept}" if kept else ""

    def rewrite(self, layer: Layer, conversion: ConversionSection) -> Rewritten:
        found = LayerCalibration(
            layer.dense,
            layer.replaced,
            conversion,
            layer.dtype,
            layer.inputs,
            None,
            mask=self.mask,
            reconstruct=self._reconstruct,
            measure=layer.measure,
        ).run()
        if repr(layer.dense[0].activation) == repr(layer.replaced[0].activation):
            del found.stages[BARE]
        # Masks of the attention are applied before the block is measured, with and without what is done to it.
        in_block = any(site not in ATTENTION_SITES for site in self._fitted.sites)
        return _rewritten(found, in_block=in_block)


def _rewritten(found: CalibratedLayer, *, in_block: bool = True) -> Rewritten:
    record = {
        **found.mask_record,
        "experts": [asdict(result) for result in found.results],
    }
    return Rewritten(found.stages, record, _sentence(found, in_block=in_block), found.masks)


def _sentence(found: CalibratedLayer, *, in_block: bool) -> str:
    if not found.results:
        return "masked"
    columns = {
        "bare": "error_bare",
        "before the refit": "error_before",
        "after": "error_refitted",
    }
    if RECONSTRUCTED not in found.stages:
        columns = {"before the mask": "error_bare", "with it": "error_before"}
        columns = columns if in_block else {"with the mask": "error_before"}
    means = []
    for said, name in columns.items():
        values: list[Any] = [getattr(result, name) for result in found.results]
        values = [value for value in values if value is not None]
        means.append(f"{sum(values) / len(values):.3f} {said}" if values else f"unknown {said}")
    sentence = f"relative error {', '.join(means)}"
    for number, result in enumerate(found.results):
        if result.kept_because is not None:
            where = f"expert {number}" if len(found.results) > 1 else "it"
            sentence += f"; {where} keeps its down projection: {result.kept_because}"
    if pooled := found.mask_record.get("pooled_experts"):
        few = ", ".join(map(str, pooled))
        sentence += f"; fewer than {LEAST_ROWS} calibration tokens, hence the layer's mean in the mask: experts {few}"
    return sentence
