"""Predictors that no one trained, for tests that need some."""

from __future__ import annotations

import torch

from sparsify.models import SparseModel
from sparsify.models.masking import num_experts
from sparsify.predictors import BlockPredictor, PredictorFacts, Predictors
from sparsify.predictors.format import PredictorInput, all_blocks, fingerprint, prefix


def random_predictors(
    model: SparseModel, threshold: float, input: PredictorInput = "normed", rank: int = 4
) -> Predictors:
    """They know nothing, but switch some neurons off."""
    generator = torch.Generator().manual_seed(1)
    config, experts = model.config, num_experts(model.config)
    blocks = {
        key: BlockPredictor(
            torch.randn(rank, config.hidden_size, generator=generator),
            torch.randn(config.intermediate_size, rank, generator=generator),
        )
        for key in all_blocks(len(model.model.layers), experts)
    }
    facts = PredictorFacts(
        input=input,
        threshold=threshold,
        rank={prefix(key, experts): rank for key in blocks},
        num_layers=len(model.model.layers),
        num_experts=experts,
        hidden=config.hidden_size,
        neurons=config.intermediate_size,
        fingerprint=fingerprint(model),
        text="none",
        sequence_length=32,
        trained_tokens=0,
        passes=1,
        wanted_recall=0.9,
        blocks={},
        threshold_reason="a test's",
    )
    return Predictors(facts, blocks)
