"""A bundle is accepted only when a fresh offline process gives the trained model's logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsify.errors import ExportError
from sparsify.export import fresh_process

TOLERANCES = {"bf16": 2e-2, "fp16": 5e-3, "fp32": 1e-4}
"""Largest allowed logit difference, as a share of the largest logit, in the coarser of the dtypes that trained and that are
stored. On the machine that trained it is 0; another device, thread count or dtype rounds differently."""


@dataclass(frozen=True)
class Acceptance:
    """What the fresh process answered."""

    samples: list[str]
    logits_difference: float | None
    model_class: str
    zeros: float | None = None
    """Share of exact zeros on the reference tokens."""
    reference_tokens: int = 0

    def sentence(self) -> str:
        """What was checked, in one line."""
        logits = (
            "no reference logits were at hand"
            if self.logits_difference is None
            else "its logits equal the trained model's"
            if self.logits_difference == 0
            else f"its logits differ from the trained model's by {self.logits_difference:.1e} of the largest"
        )
        return f"loads offline in a fresh process with transformers alone, no key missing or unexpected; {logits}"


def accept(
    bundle: Path,
    ffn_activation: str,
    precisions: Sequence[str],
    reference: Path | None,
    prompts: Sequence[str] = (),
    sample_tokens: int = 48,
) -> Acceptance:
    """Loads a bundle in a fresh process and holds it against the trained model.

    Args:
        bundle: Folder to check.
        ffn_activation: The activation that it must have.
        precisions: Of the training and of the stored weights: keys of TOLERANCES, of which the coarser one decides.
        reference: reference.safetensors of the checkpoint it was made from.
        prompts: Prompts to continue.
        sample_tokens: Length of each continuation.

    Raises:
        ExportError: If it does not load, or answers differently.
    """
    with tempfile.TemporaryDirectory() as scratch:
        request = {
            "bundle": str(bundle.resolve()),
            "reference": str(reference.resolve()) if reference else None,
            "prompts": list(prompts),
            "sample_tokens": sample_tokens,
        }
        answer = _ask(request, Path(scratch))
    if any(answer["loading"].values()) or answer["foreign_modules"]:
        raise ExportError(
            f"{bundle} did not load whole: {answer['loading']}, {answer['foreign_modules']}"
        )
    if answer["ffn_activation"] != ffn_activation:
        raise ExportError(
            f"{bundle} loads with {answer['ffn_activation']}; it was trained with {ffn_activation}."
        )
    difference = None
    if reference is not None:
        difference = answer["logits_difference"] / max(answer["logits_largest"], 1e-30)
        precision = max(precisions, key=TOLERANCES.__getitem__)
        if not difference <= TOLERANCES[precision]:
            raise ExportError(
                f"{bundle} gives other logits than the trained model: off by {difference:.1%} of the largest logit.",
                allowed=f"At most {TOLERANCES[precision]:.2%} in {precision}.",
            )
    return Acceptance(
        answer["samples"],
        difference,
        answer["model_class"],
        answer.get("zeros"),
        answer.get("reference_tokens", 0),
    )


def _ask(request: dict[str, object], scratch: Path) -> dict:
    request_path, answer_path = scratch / "request.json", scratch / "answer.json"
    request_path.write_text(json.dumps(request))
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("PYTHON")
    } | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(scratch / "modules"),  # never code of an older bundle of this name
        "TOKENIZERS_PARALLELISM": "false",
    }
    result = subprocess.run(
        [sys.executable, "-I", fresh_process.__file__, str(request_path), str(answer_path)],
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise ExportError(
            f"{request['bundle']} does not load in a fresh process:\n{result.stderr[-2000:].strip()}"
        )
    return json.loads(answer_path.read_text())
