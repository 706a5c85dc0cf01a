"""A calibration of each kind of model, run once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sparsify.methods.calibrate import Calibration
from sparsify.methods.calibrated_checkpoint import convert_calibrated
from sparsify.mixture.sequences.held_out import ValidationSequences, mixture_calibration
from sparsify.mixture.sequences.reader import PackedSequence
from sparsify.mixture.tokens.encoder import Tokenizer
from sparsify.models import SparseConfig
from sparsify.recipe.compose import load_mixture
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection, ConversionSection

SEQUENCE_TOKENS = 64


@dataclass(frozen=True)
class Calibrated:
    """A finished calibration, and the sequences that watched it."""

    folder: Path
    calibration: Calibration
    watched: ValidationSequences


class Calibrate:
    """Converts a stock checkpoint, by its kind, or any other, by its path, with the calibrated replacement."""

    def __init__(self, mixture: Path, stock: dict[str, Path], cache: Path) -> None:
        self._mixture, self._stock, self._cache = load_mixture(str(mixture)), stock, cache

    def __call__(
        self,
        kind: str,
        activation: str,
        to: Path,
        *,
        tokens: int = 3072,
        target_zeros: float | None = None,
    ) -> Calibrated:
        watched: ValidationSequences = {}

        def sequences_for(
            tokenizer: Tokenizer, config: SparseConfig
        ) -> tuple[list[PackedSequence], ValidationSequences]:
            sequences, held_out = mixture_calibration(
                self._mixture,
                tokenizer,
                num_tokens=tokens,
                validation_sequences=2,
                sequence_length=SEQUENCE_TOKENS,
                seed=1,
                cache_dir=self._cache,
            )
            watched.update(held_out)
            return sequences, held_out

        _, calibration = convert_calibrated(
            ModelSection(source=str(self._stock.get(kind, kind))),
            ActivationSection(activation),
            ConversionSection(calibration_tokens=tokens, target_zeros=target_zeros),
            to,
            sequences_for,
            seed=1,
            dtype=torch.float32,
        )
        assert calibration is not None
        return Calibrated(to, calibration, watched)


@pytest.fixture(scope="session")
def calibrate(
    mixture_file: Path, stock: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Calibrate:
    return Calibrate(mixture_file, stock, tmp_path_factory.mktemp("calibration-cache"))
