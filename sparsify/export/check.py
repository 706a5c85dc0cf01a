"""A bundle is accepted only when a fresh offline process gives the trained model's logits.

What a bundle records about the model at its export, so that it can be held against it later.

Checks a bundle that came from somewhere: is it whole, unedited, and what it says it is?
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from sparsify.conversion.architecture import sparse_config, tensor_shapes
from sparsify.conversion.source import check_tensors, read_checkpoint
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import ExportError, UserError
from sparsify.export import fresh_process
from sparsify.export.shards import SUMS, read_sums, sha256
from sparsify.models.activations import STOCK_ACTIVATION
from sparsify.predictors import read_predictors
from sparsify.sparsity.report import read_report

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


ZEROS_TOLERANCE = 0.01
"""Rounding on another machine may move a value across zero; another activation moves far more."""
REPORT_TOLERANCE = 0.15
"""The report's text is another one than the few reference tokens."""
MOST_NAMES = 5


@dataclass(frozen=True)
class Check:
    """One question, and what was found."""

    name: str
    holds: bool
    found: str


def verify(bundle: Path, on_progress: Callable[[str], object] = lambda _: None) -> list[Check]:
    """Checks a bundle from its bytes to its logits; later checks run even where earlier ones fail, as far as they can.

    Hashes find damage and edits. Whoever edits a file and writes its hash anew is found by the logits, which are held against
    those of the live model, and by the zeros.

    Args:
        bundle: Folder that `export` wrote.
        on_progress: Told what begins.

    Raises:
        ExportError: If the folder is no bundle at all.
    """
    if not (bundle / "config.json").is_file() or not (bundle / "training").is_dir():
        raise ExportError(
            f"{bundle} is no bundle: it has no {'training folder' if (bundle / 'config.json').is_file() else 'config.json'}.",
            allowed="A folder that `sparsify export RUN --to DIR` wrote.",
        )
    on_progress("Hashing")
    checks = [_hashes(bundle)]
    tensors = _tensors(bundle)
    checks.append(tensors)
    try:
        recorded = read_recorded(bundle)
    except ExportError as error:
        return [*checks, Check("logits", False, str(error))]
    if not tensors.holds:
        return [*checks, Check("logits", False, "not computed: the tensors do not fit")]
    on_progress("Loading it in a fresh process")
    checks += _loaded(bundle, recorded)
    if (bundle / "predictors").is_dir():
        checks.append(_predictors(bundle))
    return checks


def refuse_broken(bundle: Path, checks: list[Check]) -> None:
    """Ends with what does not hold.

    Raises:
        ExportError: If any check does not hold.
    """
    broken = [check for check in checks if not check.holds]
    if broken:
        raise ExportError(
            f"{bundle} is not what was exported: "
            + "; ".join(f"{check.name}: {check.found}" for check in broken),
            next_step="Copy or download it again, or export the run again.",
        )


def _hashes(bundle: Path) -> Check:
    sums = read_sums(bundle)
    if not sums:
        return Check("hashes", False, f"there is no {SUMS}")
    files = {
        path.relative_to(bundle).as_posix()
        for path in bundle.rglob("*")
        if path.is_file() and path.name != SUMS and not _hub_file(path.relative_to(bundle))
    }
    groups = {
        "missing": sorted(sums.keys() - files),
        "added": sorted(files - sums.keys()),
        "changed": sorted(
            name for name in sums.keys() & files if sha256(bundle / name) != sums[name]
        ),
    }
    found = "; ".join(f"{kind} {_names(names)}" for kind, names in groups.items() if names)
    return Check("hashes", not found, found or f"{len(sums)} files as they were exported")


def _hub_file(path: Path) -> bool:
    """Whether the Hub or its client put the file beside a download."""
    return path.name == ".gitattributes" or path.parts[0] in (".cache", ".git")


def _names(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _tensors(bundle: Path) -> Check:
    try:
        checkpoint = read_checkpoint(bundle)
        kept = checkpoint.config.get("ffn_activation", STOCK_ACTIVATION)
        check_tensors(
            checkpoint, tensor_shapes(sparse_config(checkpoint.config, kept, str(bundle)))
        )
    except UserError as error:
        return Check("tensors", False, error.given)
    return Check("tensors", True, f"{len(checkpoint.shapes)} of the names and shapes of its config")


def _loaded(bundle: Path, recorded: Recorded) -> list[Check]:
    """What a fresh process answers, against what was recorded and what the report says."""
    try:
        answer = accept(
            bundle,
            recorded.ffn_activation,
            [recorded.precision, recorded.dtype],
            bundle / "training" / REFERENCE_FILE,
        )
    except ExportError as error:
        return [Check("logits", False, error.given)]
    return [Check("logits", True, answer.sentence()), _zeros(bundle, recorded, answer)]


def _zeros(bundle: Path, recorded: Recorded, answer: Acceptance) -> Check:
    assert answer.zeros is not None
    on_tokens = f"{answer.zeros:.1%} zeros on {answer.reference_tokens} tokens"
    if recorded.zeros is not None and abs(answer.zeros - recorded.zeros) > ZEROS_TOLERANCE:
        return Check("sparsity", False, f"{on_tokens}, {recorded.zeros:.1%} when it was exported")
    if not (bundle / "sparsity").is_dir():
        before = "as when it was exported" if recorded.zeros is not None else "measured only now"
        return Check("sparsity", True, f"{on_tokens}, {before}")
    try:
        report = read_report(bundle / "sparsity")
    except UserError as error:
        return Check("sparsity", False, error.given)
    holds = abs(report.product_zeros - answer.zeros) <= REPORT_TOLERANCE
    if report.ffn_activation != recorded.ffn_activation:
        return Check("sparsity", False, f"its report is one of {report.ffn_activation}")
    return Check("sparsity", holds, f"{on_tokens}; its report says {report.product_zeros:.1%}")


def _predictors(bundle: Path) -> Check:
    try:
        predictors = read_predictors(bundle / "predictors")
        predictors.check_model(load_sparse(bundle), "predictors/")
    except UserError as error:
        return Check("predictors", False, error.given)
    return Check("predictors", True, f"of this model, threshold {predictors.facts.threshold:g}")
