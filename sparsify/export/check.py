"""Checks of a bundle.

At export (`accept`): a fresh offline process must reproduce the trained model's logits; the result is recorded in the bundle.
Later (`verify`): a copy must be complete and unedited, and must reproduce what was recorded.
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
from sparsify.export.weight_shards import SUMS, read_sums, sha256
from sparsify.models.activations import STOCK_ACTIVATION
from sparsify.predictors import read_predictors
from sparsify.sparsity.report import read_report

TOLERANCES = {"bf16": 2e-2, "fp16": 5e-3, "fp32": 1e-4}
"""Largest allowed logit difference, as a share of the largest logit, by the coarser of the training dtype and the stored
dtype. On the machine that trained the model it is 0; other devices, thread counts and dtypes round differently."""


@dataclass(frozen=True)
class Acceptance:
    """Result of the fresh process."""

    samples: list[str]
    logits_difference: float | None
    model_class: str
    zeros: float | None = None
    """Share of exact zeros on the reference tokens."""
    reference_tokens: int = 0

    def sentence(self) -> str:
        """Summary of the check, in one sentence without subject."""
        logits = (
            "there were no reference logits"
            if self.logits_difference is None
            else "its logits equal the trained model's"
            if self.logits_difference == 0
            else f"its logits differ from the trained model's by {self.logits_difference:.1e} of the largest"
        )
        return f"loads offline in a fresh process with transformers alone, without missing or unexpected keys; {logits}"


def accept(
    bundle: Path,
    ffn_activation: str,
    precisions: Sequence[str],
    reference: Path | None,
    prompts: Sequence[str] = (),
    sample_tokens: int = 48,
) -> Acceptance:
    """Loads a bundle in a fresh process and compares it with the trained model.

    Args:
        bundle: Folder to check.
        ffn_activation: The activation that it must have.
        precisions: Keys of TOLERANCES: dtypes of the training and of the stored weights. The coarser one decides.
        reference: reference.safetensors of the checkpoint; None to skip the comparison of logits.
        prompts: Prompts to continue.
        sample_tokens: Length of each continuation in tokens.

    Raises:
        ExportError: If it does not load, or its activation or logits differ.
    """
    with tempfile.TemporaryDirectory() as scratch:
        request = {
            "bundle": str(bundle.resolve()),
            "reference": str(reference.resolve()) if reference else None,
            "prompts": list(prompts),
            "sample_tokens": sample_tokens,
        }
        result = _run_fresh_process(request, Path(scratch))
    if any(result["loading"].values()) or result["foreign_modules"]:
        raise ExportError(f"{bundle} did not load completely: {result['loading']}, {result['foreign_modules']}")
    if result["ffn_activation"] != ffn_activation:
        raise ExportError(
            f"{bundle} loads with the activation {result['ffn_activation']}; it was trained with {ffn_activation}."
        )
    difference = None
    if reference is not None:
        difference = result["logits_difference"] / max(result["logits_largest"], 1e-30)
        precision = max(precisions, key=TOLERANCES.__getitem__)
        if not difference <= TOLERANCES[precision]:
            raise ExportError(
                f"{bundle} has other logits than the trained model: they differ by {difference:.1%} of the largest logit.",
                allowed=f"At most {TOLERANCES[precision]:.2%} in {precision}.",
            )
    return Acceptance(
        result["samples"],
        difference,
        result["model_class"],
        result.get("zeros"),
        result.get("reference_tokens", 0),
    )


def _run_fresh_process(request: dict[str, object], scratch: Path) -> dict:
    request_path, result_path = scratch / "request.json", scratch / "result.json"
    request_path.write_text(json.dumps(request))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(scratch / "modules"),  # no cached code of an older bundle
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.run(
        [sys.executable, "-I", fresh_process.__file__, str(request_path), str(result_path)],
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        raise ExportError(f"{request['bundle']} does not load in a fresh process:\n{process.stderr[-2000:].strip()}")
    return json.loads(result_path.read_text())


REFERENCE_FILE = "reference.safetensors"
RECORDED_FILE = "recorded.json"


class Recorded(BaseModel):
    """What the fresh process measured at export; the measured fields are None if the bundle was not checked.

    Attributes:
        checkpoint: Name of the checkpoint in its run.
        ffn_activation: The activation that the model was trained with.
        precision: Training dtype, bf16 or fp32.
        dtype: Dtype of the bundle's weights.
        logits_difference: Largest difference from the live model's logits, as a share of the largest logit.
        zeros: Share of exact zeros of the activations on the reference tokens.
        reference_tokens: Number of reference tokens.
    """

    checkpoint: str
    ffn_activation: str
    precision: str
    dtype: str
    logits_difference: float | None
    zeros: float | None
    reference_tokens: int


def read_recorded(bundle: Path) -> Recorded:
    """Reads the record of a bundle.

    Raises:
        ExportError: If it is missing or damaged.
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
"""Largest allowed difference of zeros: rounding on another machine changes few of them, a different activation many."""
REPORT_TOLERANCE = 0.15
"""Largest allowed difference from the report's zeros, which are on a different text than the few reference tokens."""
MOST_NAMES = 5


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    holds: bool
    found: str


def verify(bundle: Path, on_progress: Callable[[str], object] = lambda _: None) -> list[Check]:
    """Checks a bundle from its bytes to its logits. Where possible, later checks run even if earlier ones fail.

    Hashes find damage and edits. Edits with updated hashes are found by the logits, which are compared with those of the live
    model, and by the zeros.

    Args:
        bundle: Folder that `export` wrote.
        on_progress: Receives the name of each step.

    Raises:
        ExportError: If the folder is not a bundle.
    """
    if not (bundle / "config.json").is_file() or not (bundle / "training").is_dir():
        raise ExportError(
            f"{bundle} is not a bundle: it has no {'training folder' if (bundle / 'config.json').is_file() else 'config.json'}.",
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
        return [*checks, Check("logits", False, "not computed, since the tensors do not match")]
    on_progress("Loading it in a fresh process")
    checks += _loaded(bundle, recorded)
    if (bundle / "predictors").is_dir():
        checks.append(_predictors(bundle))
    return checks


def refuse_broken(bundle: Path, checks: list[Check]) -> None:
    """Raises the failed checks, if any.

    Raises:
        ExportError: If a check failed.
    """
    broken = [check for check in checks if not check.holds]
    if broken:
        raise ExportError(
            f"{bundle} differs from what was exported: "
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
        "changed": sorted(name for name in sums.keys() & files if sha256(bundle / name) != sums[name]),
    }
    found = "; ".join(f"{kind} {_names(names)}" for kind, names in groups.items() if names)
    return Check("hashes", not found, found or f"{len(sums)} files unchanged since the export")


def _hub_file(path: Path) -> bool:
    """Whether the Hub or its client added the file to a download."""
    return path.name == ".gitattributes" or path.parts[0] in (".cache", ".git")


def _names(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _tensors(bundle: Path) -> Check:
    try:
        checkpoint = read_checkpoint(bundle)
        kept = checkpoint.config.get("ffn_activation", STOCK_ACTIVATION)
        check_tensors(checkpoint, tensor_shapes(sparse_config(checkpoint.config, kept, str(bundle))))
    except UserError as error:
        return Check("tensors", False, error.given)
    return Check("tensors", True, f"{len(checkpoint.shapes)} with the names and shapes of the config")


def _loaded(bundle: Path, recorded: Recorded) -> list[Check]:
    """Compares a fresh process with the bundle's record and report."""
    try:
        acceptance = accept(
            bundle,
            recorded.ffn_activation,
            [recorded.precision, recorded.dtype],
            bundle / "training" / REFERENCE_FILE,
        )
    except ExportError as error:
        return [Check("logits", False, error.given)]
    return [Check("logits", True, acceptance.sentence()), _zeros(bundle, recorded, acceptance)]


def _zeros(bundle: Path, recorded: Recorded, acceptance: Acceptance) -> Check:
    assert acceptance.zeros is not None
    on_tokens = f"{acceptance.zeros:.1%} zeros on {acceptance.reference_tokens} tokens"
    if recorded.zeros is not None and abs(acceptance.zeros - recorded.zeros) > ZEROS_TOLERANCE:
        return Check("sparsity", False, f"{on_tokens}, {recorded.zeros:.1%} at export")
    if not (bundle / "sparsity").is_dir():
        before = "as at export" if recorded.zeros is not None else "not measured at export"
        return Check("sparsity", True, f"{on_tokens}, {before}")
    try:
        report = read_report(bundle / "sparsity")
    except UserError as error:
        return Check("sparsity", False, error.given)
    holds = abs(report.product_zeros - acceptance.zeros) <= REPORT_TOLERANCE
    if report.ffn_activation != recorded.ffn_activation:
        return Check("sparsity", False, f"the report is of a model with {report.ffn_activation}")
    return Check("sparsity", holds, f"{on_tokens}; {report.product_zeros:.1%} in the report")


def _predictors(bundle: Path) -> Check:
    try:
        predictors = read_predictors(bundle / "predictors")
        predictors.check_model(load_sparse(bundle), "predictors/")
    except UserError as error:
        return Check("predictors", False, error.given)
    return Check("predictors", True, f"match the model; threshold {predictors.facts.threshold:g}")
