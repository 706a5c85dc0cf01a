"""The calibrated replacement of one layer: signs, thresholds, refit, and whether each refit is to be kept.

Which half of its inputs a neuron keeps under dReLU.

A gated neuron adds f(gate) · up · down to the stream. Negating its row of the up projection together with its column of the
down projection changes nothing as long as up is not rectified: SwiGLU and ReGLU stay what they are. dReLU keeps only up > 0,
so the sign decides what survives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from sparsify.methods.histogram import Histogram
from sparsify.methods.layerwise import Expert, Routes
from sparsify.methods.reconstruction import Errors, Gram, Reduce, nothing_to_reduce
from sparsify.methods.thresholds import OUTPUT_NORM_BINS, output_norms, with_thresholds
from sparsify.models import FfnActivation
from sparsify.recipe.sparsification import ConversionSection


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
    """The expert with up row and down column of the chosen neurons negated.

    Args:
        expert: Any.
        flips: Bool [neurons].
    """
    sign = 1 - 2 * flips.to(expert.up.dtype)
    return replace(expert, up=expert.up * sign[:, None], down=expert.down * sign)


HELD_OUT_EVERY = 8
"""Every eighth calibration sequence judges the refits and takes no part in them."""
LEAST_ROWS = 256
"""An expert that got fewer calibration tokens than this keeps its weights."""


@dataclass(frozen=True)
class Inputs:
    """What a layer's feed-forward block sees and what it should answer, a chunk of sequences at a time.

    Attributes:
        x: Its inputs, [tokens, hidden].
        routes: Their experts.
        gap: What every expert should answer beside what it answered when dense, [tokens, hidden].
        fit: Tokens that the refit rests on, bool [tokens].
        judge: Tokens that judge it, bool [tokens].
    """

    x: torch.Tensor
    routes: Routes
    gap: torch.Tensor
    fit: torch.Tensor
    judge: torch.Tensor


InputsOf = Callable[[], Iterator[Inputs]]


@dataclass(frozen=True)
class ExpertResult:
    """What became of one expert. Errors are relative, on the tokens that judge, None where there were none.

    Attributes:
        num_tokens: Calibration tokens that were routed to it and that the refit rests on.
        num_flipped: Neurons whose sign was turned.
        error_bare: With the bare replacement.
        error_before: With signs and thresholds, and the old down projection.
        error_refitted: With the refitted one.
        kept_because: Why the old down projection stays; None where the refitted one takes its place.
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
        flips: Which neurons' signs were turned, bool [experts, neurons].
        threshold_scale: T; None without thresholds.
        results: One for each expert.
    """

    stages: dict[str, list[Expert]]
    flips: torch.Tensor
    threshold_scale: float | None
    results: list[ExpertResult]


class LayerCalibration:
    """Calibrates one layer.

    Args:
        dense: Its experts with the activation that they were trained with.
        swapped: The same with the new one.
        settings: How.
        dtype: Dtype on disk: what is fitted is rounded to it before it is judged.
        inputs: Gives all calibration tokens, again on each call.
        turn_for: Activation whose surviving half decides about a neuron's sign, one that rectifies up; None turns none.
        reduce: Sums over ranks, where `inputs` gives only this one's part of the tokens. The result is the same on all.
    """

    def __init__(
        self,
        dense: list[Expert],
        swapped: list[Expert],
        settings: ConversionSection,
        dtype: torch.dtype,
        inputs: InputsOf,
        turn_for: FfnActivation | None,
        reduce: Reduce = nothing_to_reduce,
    ) -> None:
        self._dense, self._swapped = dense, swapped
        self._settings, self._dtype, self._inputs = settings, dtype, inputs
        self._turn_for, self._reduce = turn_for, reduce

    def run(self) -> CalibratedLayer:
        """Signs, thresholds, refit; each rests on the one before."""
        stages = {"dense": self._dense, "bare replacement": self._swapped}
        flips = self._flips()
        experts = [flip(expert, each) for expert, each in zip(self._swapped, flips, strict=True)]
        if self._turn_for is not None:
            stages["signs"] = experts
        scale = None
        if self._settings.target_zeros is not None:
            scale = self._threshold_scale(experts, self._settings.target_zeros)
            experts = [with_thresholds(expert, scale, self._dtype) for expert in experts]
            stages["thresholds"] = experts
        refitted, results = [], []
        for number, expert in enumerate(experts):
            new, result = self._refit(number, expert, int(flips[number].sum()))
            refitted.append(new)
            results.append(result)
        stages["refit"] = refitted
        return CalibratedLayer(stages, flips, scale, results)

    def _flips(self) -> torch.Tensor:
        shape = len(self._swapped), len(self._swapped[0].up)
        flips = torch.zeros(shape, dtype=torch.bool, device=self._swapped[0].up.device)
        if self._turn_for is None:
            return flips
        for number, expert in enumerate(self._swapped):
            energies = SignEnergies(shape[1], flips.device)
            expert = replace(expert, activation=self._turn_for)
            for chunk, token, _ in self._rows(number, "fit"):
                energies.add(expert, chunk.x[token])
            self._reduce(energies.kept)
            flips[number] = energies.flips()
        return flips

    def _threshold_scale(self, experts: Sequence[Expert], target_zeros: float) -> float:
        norms = Histogram(OUTPUT_NORM_BINS, device=experts[0].up.device)
        for number, expert in enumerate(experts):
            for chunk, token, _ in self._rows(number, "fit"):
                norms.add(output_norms(expert, chunk.x[token]))
        return norms.quantile(target_zeros)

    def _refit(self, number: int, expert: Expert, num_flipped: int) -> tuple[Expert, ExpertResult]:
        hidden_size, num_neurons = expert.down.shape
        gram = Gram(num_neurons, hidden_size, expert.up.device)
        for chunk, token, weight in self._rows(number, "fit"):
            x = chunk.x[token]
            wanted = self._wanted(number, chunk, token)
            gram.add(expert.neurons(x) * weight[:, None], wanted * weight[:, None])
        gram.reduce(self._reduce)
        few = gram.num_rows < LEAST_ROWS
        down = expert.down if few else gram.solve(expert.down, self._settings.ridge)
        candidate = replace(expert, down=down.to(self._dtype).float())
        errors = Errors(("bare", "before", "refitted"), expert.up.device)
        for chunk, token, weight in self._rows(number, "judge"):
            x, weight = chunk.x[token], weight[:, None]
            h = expert.neurons(x)
            bare = self._swapped[number]
            errors.add(
                self._wanted(number, chunk, token) * weight,
                bare=bare.neurons(x) @ bare.down.T * weight,
                before=h @ expert.down.T * weight,
                refitted=h @ candidate.down.T * weight,
            )
        errors.reduce(self._reduce)
        before, after = errors.relative("before"), errors.relative("refitted")
        reason = None
        if few:
            reason = f"only {gram.num_rows} calibration tokens came to it"
        elif before is None or after is None:
            reason = "no token was left to judge the refit by"
        elif not after < before:
            reason = "the refit was worse on held-out tokens"
        result = ExpertResult(
            gram.num_rows, num_flipped, errors.relative("bare"), before, after, reason
        )
        return (expert if reason else candidate), result

    def _wanted(self, number: int, chunk: Inputs, token: torch.Tensor) -> torch.Tensor:
        """What one expert should answer: what it did when dense, and its part of what is amiss in the stream."""
        dense, x = self._dense[number], chunk.x[token]
        return dense.neurons(x) @ dense.down.T + chunk.gap[token]

    def _rows(self, number: int, part: str) -> Iterator[tuple[Inputs, torch.Tensor, torch.Tensor]]:
        """Chunks with the tokens of one expert that belong to a part, and their router weights."""
        for chunk in self._inputs():
            token, weight = chunk.routes.of(number)
            counted = getattr(chunk, part)[token]
            if counted.any():
                yield chunk, token[counted], weight[counted]
