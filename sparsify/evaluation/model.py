"""The model that is evaluated: what identifies it and its predictors, and how many parameters a token needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from transformers import PreTrainedTokenizerFast

from sparsify.evaluation.counting import Counts
from sparsify.evaluation.results import ActiveCount, PredictorMasks, Provenance
from sparsify.models import SparseModel
from sparsify.predictors import Predictors
from sparsify.sparsity.active_parameters import FFN_PARTS, active_parameters, parameters_by_part


@dataclass(frozen=True)
class Subject:
    """The model that is measured, and what is known of it.

    Attributes:
        model: In the mode that it was in before and after.
        tokenizer: Its tokenizer.
        name: What the user calls it.
        provenance: Of its training.
        predictors: Folder and predictors that mask it; None to compute every neuron.
    """

    model: SparseModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    provenance: Provenance | None = None
    predictors: tuple[str, Predictors] | None = None

    @property
    def masks(self) -> PredictorMasks | None:
        """What results say of the predictors."""
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
    """Hash of a model's weights and activation: the same for the same function, wherever it was loaded from."""
    digest = xxhash.xxh3_128(model.config.ffn_activation.encode())
    if model.config.ffn_gate_threshold:
        digest.update(repr(model.config.ffn_gate_threshold).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def predictors_hash(predictors: Predictors) -> str:
    """Hash of all that decides which neurons predictors switch on: their matrices, input and threshold."""
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
    """The fields of a TaskResult that come from what was counted."""
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
    """Parameters that one token needs at the zeros that were counted, and at what predictors switched on."""
    model = subject.model
    gate, product = counts.zero_shares
    config = model.config
    share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_local_experts", 1)
    parts = parameters_by_part(model)
    account = active_parameters(
        parts, expert_share=share, gate_zeros=gate or 0.0, product_zeros=product or 0.0
    )
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
