"""The evaluated model: hashes of model and predictors, zeros and tokens counted while it runs, active parameters."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import xxhash
from transformers import PreTrainedTokenizerFast

from sparsify.evaluation.results import ActiveCount, PredictorMasks, Provenance
from sparsify.models import SparseModel
from sparsify.models.masking import experts_per_token, hidden_share, num_experts
from sparsify.predictors import Predictors
from sparsify.predictors.inputs import BlockInputs
from sparsify.predictors.predictor_mask import PredictorMask
from sparsify.sparsity.active_parameters import FFN_PARTS, active_parameters, parameters_by_part
from sparsify.sparsity.probe import SparsityProbe


class Counts(NamedTuple):
    """Counts over some forward passes, without padding."""

    totals: list[int]
    """Number of values, and of non-zero values of gate, up and product."""
    masked: list[int]
    """Neurons that fire; those of them that are on; neurons that are on; all neurons. 0 without predictors."""
    tokens: int
    seconds: float

    @property
    def zero_shares(self) -> tuple[float | None, float | None]:
        """Shares of exact zeros of gate and product; None if nothing was computed."""
        values, gate, _, product = self.totals
        return (1 - gate / values, 1 - product / values) if values else (None, None)

    @property
    def predicted_on(self) -> float | None:
        """Share of the neurons that the predictors switch on; None without predictors."""
        _, _, on, values = self.masked
        return on / values if values else None

    @property
    def predicted_recall(self) -> float | None:
        """Share of the neurons that fire in the masked model which are on; None without predictors."""
        fired, hit, _, _ = self.masked
        return hit / fired if fired else None


def sum_counts(counts: Iterable[Counts]) -> Counts:
    sums = Counts([0] * 4, [0] * 4, 0, 0.0)
    for one in counts:
        sums = Counts(
            [a + b for a, b in zip(sums.totals, one.totals, strict=True)],
            [a + b for a, b in zip(sums.masked, one.masked, strict=True)],
            sums.tokens + one.tokens,
            sums.seconds + one.seconds,
        )
    return sums


class Counter:
    """Context manager that counts zeros in every forward pass of a model, and masks it by predictors if there are any."""

    def __init__(self, model: SparseModel, predictors: Predictors | None = None) -> None:
        self._inputs = self._mask = None
        if predictors is not None:
            self._inputs = BlockInputs(model, predictors.facts.input)
            self._mask = PredictorMask(predictors.to(model.device), self._inputs)
        observers = [] if self._mask is None else [self._mask]
        self._probe = SparsityProbe(model, *observers, mask=self._mask)
        self._begun = self._now()

    def __enter__(self) -> Self:
        if self._inputs is not None:
            self._inputs.__enter__()
        self._probe.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._probe.__exit__()
        if self._inputs is not None:
            self._inputs.__exit__()

    def count(self, token_mask: torch.Tensor | None) -> None:
        """Sets which tokens of the next forward pass count, bool [batch, tokens]; without a call all of them count."""
        self._probe.count(token_mask)

    def begin(self) -> None:
        self._begun = self._now()

    def taken(self) -> Counts:
        begun, now = self._begun, self._now()
        return Counts(
            [a - b for a, b in zip(now.totals, begun.totals, strict=True)],
            [a - b for a, b in zip(now.masked, begun.masked, strict=True)],
            now.tokens - begun.tokens,
            now.seconds - begun.seconds,
        )

    def _now(self) -> Counts:
        masked = torch.zeros(4, dtype=torch.int64)
        if self._mask is not None and self._mask.counts:
            masked = torch.stack(list(self._mask.counts.values())).sum(0)
        totals = self._probe.layer_totals().sum(0).tolist()
        return Counts(totals, masked.tolist(), self._probe.num_tokens, time.perf_counter())


@dataclass(frozen=True)
class Subject:
    """The model under evaluation.

    Attributes:
        name: Folder or Hub id that the user gave.
        provenance: How it was trained; None if unknown.
        predictors: Folder and predictors that mask it; None to compute every neuron.
    """

    model: SparseModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    provenance: Provenance | None = None
    predictors: tuple[str, Predictors] | None = None

    @property
    def masks(self) -> PredictorMasks | None:
        if self.predictors is None:
            return None
        folder, predictors = self.predictors
        return PredictorMasks(
            folder=folder,
            hash=predictors_hash(predictors),
            input=predictors.facts.input,
            threshold=predictors.facts.threshold,
            parameters=predictors.num_parameters,
        )


def model_hash(model: SparseModel) -> str:
    """xxh3-128 of a model's weights and activation: equal for equal functions, wherever they were loaded from."""
    digest = xxhash.xxh3_128(model.config.ffn_activation.encode())
    if model.config.ffn_gate_threshold:
        digest.update(repr(model.config.ffn_gate_threshold).encode())
    if model.config.quantisation:
        digest.update(repr(sorted(model.config.quantisation.items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def predictors_hash(predictors: Predictors) -> str:
    """xxh3-128 of what decides which neurons predictors switch on: their matrices, input and threshold."""
    facts = predictors.facts
    digest = xxhash.xxh3_128(f"{facts.input} {facts.threshold!r}".encode())
    for key, block in sorted(predictors.blocks.items()):
        for matrix in block:
            digest.update(f"{key} {matrix.dtype} {tuple(matrix.shape)}".encode())
            digest.update(_bytes(matrix))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    raw = tensor.detach().cpu().contiguous().view(torch.uint8)
    return raw.numpy().data if raw.dim() else raw.reshape(1).numpy().data


def counted_fields(subject: Subject, counts: Counts) -> dict[str, Any]:
    gate_zeros, product_zeros = counts.zero_shares
    return {
        "gate_zeros": gate_zeros,
        "product_zeros": product_zeros,
        "predicted_on": counts.predicted_on,
        "predicted_recall": counts.predicted_recall,
        "tokens": counts.tokens,
        "seconds": round(counts.seconds, 3),
        "active_parameters": _active_count(subject, counts),
    }


def _active_count(subject: Subject, counts: Counts) -> ActiveCount:
    """Parameters that one token needs at the counted zeros, and with the neurons that predictors switched on."""
    model = subject.model
    gate, product = counts.zero_shares
    config = model.config
    share = experts_per_token(config) / num_experts(config)
    parts = parameters_by_part(model)
    zeros = {"gate_zeros": gate or 0.0, "product_zeros": product or 0.0}
    account = active_parameters(parts, expert_share=share, hidden_share=hidden_share(config), **zeros)
    total = sum(parts.values())
    predicted = None
    if subject.predictors is not None and counts.predicted_on is not None:
        ffn = sum(parts[part] for part in FFN_PARTS)
        own = subject.predictors[1].num_parameters
        computed = share * (ffn * counts.predicted_on + own)
        predicted = round(total - ffn + computed)
    return ActiveCount(
        total=total,
        perfect_predictor=account.perfect_predictor,
        gate_first=account.gate_first,
        predicted=predicted,
    )
