"""A calibration of each kind of model, run once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.methods.calibrate import Calibration
from sparsify.methods.calibrated_checkpoint import convert_calibrated
from sparsify.mixture.sequences.held_out import ValidationSequences, mixture_calibration
from sparsify.mixture.sequences.reader import NO_LOSS, PackedSequence, collate
from sparsify.mixture.tokens.encoder import Tokenizer
from sparsify.models import SparseConfig, SparseModel
from sparsify.recipe.compose import load_mixture
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection, ConversionSection
from sparsify.sparsity.probe import SparsityProbe
from sparsify.training.validation import sequence_losses

SEQUENCE_TOKENS = 64


@dataclass(frozen=True)
class Calibrated:
    """A finished calibration, and the sequences that watched it."""

    folder: Path
    calibration: Calibration
    watched: ValidationSequences


class Calibrate:
    """Converts a stock checkpoint, by its kind, or any other, by its path, with a method.

    Args:
        mixture: Of calibration text, by name or path.
        stock: Checkpoints by kind.
        cache: For the mixture's tokens.
        sequence_tokens: Length of each sequence.
        watched_sequences: Held-out sequences of each source.
    """

    def __init__(
        self,
        mixture: Path | str,
        stock: dict[str, Path],
        cache: Path,
        sequence_tokens: int = SEQUENCE_TOKENS,
        watched_sequences: int = 2,
    ) -> None:
        self._mixture, self._stock, self._cache = load_mixture(str(mixture)), stock, cache
        self._sequence_tokens, self._watched_sequences = sequence_tokens, watched_sequences

    def __call__(
        self,
        kind: str,
        activation: str,
        to: Path,
        *,
        tokens: int = 3072,
        measure: bool = True,
        **settings: Any,
    ) -> Calibrated:
        watched: ValidationSequences = {}

        def sequences_for(
            tokenizer: Tokenizer, config: SparseConfig
        ) -> tuple[list[PackedSequence], ValidationSequences]:
            sequences, held_out = mixture_calibration(
                self._mixture,
                tokenizer,
                num_tokens=tokens,
                validation_sequences=self._watched_sequences,
                sequence_length=self._sequence_tokens,
                seed=1,
                cache_dir=self._cache,
            )
            watched.update(held_out)
            return sequences, held_out

        _, calibration = convert_calibrated(
            ModelSection(source=str(self._stock.get(kind, kind))),
            ActivationSection(activation),
            ConversionSection(calibration_tokens=tokens, **settings),
            to,
            sequences_for,
            seed=1,
            dtype=torch.float32,
            measure=measure,
        )
        assert calibration is not None
        return Calibrated(to, calibration, watched)


def measured(model: SparseModel, found: Calibrated) -> tuple[float, float]:
    """Loss and zeros of a whole model on the sequences that watched the calibration."""
    total, labels = 0.0, 0
    with torch.no_grad(), SparsityProbe(model) as probe:
        for sequences in found.watched.values():
            batch = collate(sequences)
            inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
            logits = model(**inputs, use_cache=False).logits
            total += float(sequence_losses(logits, batch["labels"]).sum())
            labels += int((batch["labels"] != NO_LOSS).sum())
    return total / labels, probe.statistics().zero_share("product")


@contextmanager
def killed_after(line: str) -> Iterator[None]:
    """Interrupts the block as soon as it has logged a line that begins so."""

    class Interrupt(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith(line):
                raise KeyboardInterrupt

    logger, handler = logging.getLogger("sparsify"), Interrupt()
    logger.addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        logger.removeHandler(handler)


@pytest.fixture(scope="session")
def calibrate(mixture_file: Path, stock: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Calibrate:
    return Calibrate(mixture_file, stock, tmp_path_factory.mktemp("calibration-cache"))
