"""What a bundle records about the model at its export, so that it can be held against it later."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ValidationError

from sparsify.errors import ExportError

REFERENCE_FILE = "reference.safetensors"
RECORDED_FILE = "recorded.json"


class Recorded(BaseModel):
    """Measured by a fresh process that loaded the bundle when it was written; without figures if none did.

    Attributes:
        checkpoint: Name of the checkpoint in its run.
        ffn_activation: The activation that it was trained with.
        precision: Of training, bf16 or fp32.
        dtype: Of the bundle's weights.
        logits_difference: Largest difference from the live model's logits, as a share of the largest logit.
        zeros: Share of exact zeros of the activations on the reference tokens.
        reference_tokens: How many these are.
    """

    checkpoint: str
    ffn_activation: str
    precision: str
    dtype: str
    logits_difference: float | None
    zeros: float | None
    reference_tokens: int


def read_recorded(bundle: Path) -> Recorded:
    """Reads what was recorded.

    Raises:
        ExportError: If it is not there or damaged.
    """
    path = bundle / "training" / RECORDED_FILE
    try:
        return Recorded.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError, ValidationError) as error:
        raise ExportError(
            f"{path} cannot be read: {str(error).splitlines()[0]}",
            next_step="Export the run again, or copy the bundle again.",
        ) from error
