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
from importlib.metadata import version as package_version
from pathlib import Path

from pydantic import BaseModel

from sparsify import models
from sparsify.conversion.architecture import sparse_config, stored_activation
from sparsify.conversion.layout import tensor_shapes
from sparsify.conversion.source_checkpoint import read_checkpoint
from sparsify.conversion.source_tensors import check_tensors
from sparsify.conversion.sparse_folder import auto_map, load_sparse
from sparsify.conversion.weight_zeros import TensorReader, count_zeros, weight_sparsity
from sparsify.errors import ExportError, UserError
from sparsify.export import fresh_process
from sparsify.export.weight_shards import SUMS, read_sums, sha256
from sparsify.launch import lifeline
from sparsify.metadata import read_json, read_record
from sparsify.models import FAMILIES
from sparsify.predictors import read_predictors
from sparsify.sparsity.report import read_report
from sparsify.trust import code_is_trusted, without_secrets

TOLERANCES = {"bf16": 2e-2, "fp16": 5e-3, "fp32": 1e-4}
"""Largest allowed logit difference, as a share of the largest logit, by the coarser of the training dtype and the stored
dtype. On the machine that trained the model it is 0; other devices, thread counts and dtypes round differently."""


@dataclass(frozen=True)
class Acceptance:
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
    """Loads a bundle in a fresh process and compares it with the trained model's `reference`; None skips the logits.
    The coarser of the precisions decides the tolerance. Raises ExportError if it does not load, or its activation or
    logits differ.
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
    inherited = without_secrets(os.environ)
    environment = {key: value for key, value in inherited.items() if not key.startswith("PYTHON")} | {
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(scratch / "modules"),  # no cached code of an older bundle
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.run(
        [
            sys.executable,
            "-I",
            lifeline.__file__,
            str(os.getpid()),
            fresh_process.__file__,
            str(request_path),
            str(result_path),
        ],
        cwd=scratch,
        env=environment,
        stdin=subprocess.DEVNULL,
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
        precision: Training dtype, bf16 or fp32.
        logits_difference: Largest difference from the live model's logits, as a share of the largest logit.
        zeros: Share of exact zeros of the activations on the reference tokens.
        zero_weights: Weights of the projections that are zero; None for dense weights.
    """

    checkpoint: str
    ffn_activation: str
    precision: str
    dtype: str
    logits_difference: float | None
    zeros: float | None
    reference_tokens: int
    zero_weights: int | None = None


def read_recorded(bundle: Path) -> Recorded:
    """Raises ExportError if it is missing or damaged."""
    again = "Export the run again, or copy the bundle again."
    return read_record(bundle / "training" / RECORDED_FILE, Recorded, "what an export measured", ExportError, again)


ZEROS_TOLERANCE = 0.01
"""Largest allowed difference of zeros: rounding on another machine changes few of them, a different activation many."""
REPORT_TOLERANCE = 0.15
"""Largest allowed difference from the report's zeros, which are on a different text than the few reference tokens."""
MOST_NAMES = 5
CODE_SUFFIXES = (".py", ".pyc", ".pyd", ".so", ".pth", ".bin", ".pt", ".pkl", ".pickle", ".ckpt")
"""Files that Python imports or unpickles."""


@dataclass(frozen=True)
class Check:
    name: str
    holds: bool
    found: str


def verify(bundle: Path, on_progress: Callable[[str], object] = lambda _: None) -> list[Check]:
    """Checks a bundle from its bytes to its logits. Where possible, later checks run even if earlier ones fail.

    Hashes find damage. They are in the bundle, so whoever edits it can write them again: that is found by the logits, which are
    compared with those of the live model, and by the zeros. Code that is not this package's own is not run without the user's
    word.

    Raises:
        ExportError: If the folder is not a bundle.
    """
    if not (bundle / "config.json").is_file() or not (bundle / "training").is_dir():
        raise ExportError(
            f"{bundle} is not a bundle: it has no {'training folder' if (bundle / 'config.json').is_file() else 'config.json'}.",
            allowed="A folder that `sparsify export RUN --to DIR` wrote.",
        )
    on_progress("Hashing")
    code = _code(bundle)
    checks = [check_hashes(bundle), code]
    tensors = _tensors(bundle)
    checks.append(tensors)
    try:
        recorded = read_recorded(bundle)
    except ExportError as error:
        return [*checks, Check("logits", False, str(error))]
    if not tensors.holds:
        return [*checks, Check("logits", False, "not computed, since the tensors do not match")]
    checks += _zero_weights(bundle, recorded)
    if not code.holds:
        return [*checks, Check("logits", False, "not computed, since that would run this code")]
    on_progress("Loading it in a fresh process")
    checks += _loaded(bundle, recorded)
    if (bundle / "predictors").is_dir():
        checks.append(_predictors(bundle))
    return checks


def refuse_broken(bundle: Path, checks: list[Check]) -> None:
    """Raises ExportError with the failed checks, if any."""
    broken = [check for check in checks if not check.holds]
    if broken:
        raise ExportError(
            f"{bundle} differs from what was exported: "
            + "; ".join(f"{check.name}: {check.found}" for check in broken),
            next_step="Copy or download it again, or export the run again.",
        )


def check_hashes(bundle: Path) -> Check:
    """Compares the files of a bundle with its SHA256SUMS."""
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


def _code(bundle: Path) -> Check:
    """Whether loading the bundle runs only code of this version of this package."""
    foreign, version = foreign_code(bundle), package_version("sparsify-lm")
    if not foreign:
        return Check("code", True, f"its Python files are those of sparsify {version}, which checks it, byte for byte")
    found = f"not those of sparsify {version}, which checks it and knows no other version: {_names(foreign)}"
    if code_is_trusted():
        return Check("code", True, f"{found}; run because of --trust-code")
    return Check(
        "code", False, f"{found}. Read it; --trust-code runs it, as does from_pretrained(trust_remote_code=True)"
    )


def foreign_code(bundle: Path) -> list[str]:
    """What transformers would run, or fetch from elsewhere and run, besides the files that an export writes."""
    own = {path.name: path.read_bytes() for path in Path(models.__file__).parent.glob("*.py")}
    found = [
        str(path.relative_to(bundle))
        for path in sorted(bundle.rglob("*"))
        if path.suffix in CODE_SUFFIXES
        and not _hub_file(path.relative_to(bundle))
        and (path.parent != bundle or not _equals(path, own.get(path.name)))
    ]
    for name in ("adapter_config.json", "custom_generate"):
        if (bundle / name).exists():
            found.append(name)
    config = read_json(bundle / "config.json", ExportError)
    kind = config.get("model_type")
    known = auto_map(FAMILIES[kind]) if isinstance(kind, str) and kind in FAMILIES else {}
    given = config.get("auto_map", {})
    if not isinstance(given, dict) or any(known.get(name) != place for name, place in given.items()):
        found.append("auto_map in config.json")
    for field in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in str(config.get(field)):
            found.append(f"{field} in config.json")
    tokenizer = bundle / "tokenizer_config.json"
    if tokenizer.is_file() and "auto_map" in read_json(tokenizer, ExportError):
        found.append("auto_map in tokenizer_config.json")
    return found


def _equals(path: Path, content: bytes | None) -> bool:
    return content is not None and path.is_file() and not path.is_symlink() and path.read_bytes() == content


def _hub_file(path: Path) -> bool:
    """Whether the Hub or its client added the file to a download."""
    return path.name == ".gitattributes" or path.parts[0] in (".cache", ".git")


def _names(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _tensors(bundle: Path) -> Check:
    try:
        checkpoint = read_checkpoint(bundle)
        kept = stored_activation(checkpoint.config)
        check_tensors(bundle, checkpoint.shapes, tensor_shapes(sparse_config(checkpoint.config, kept, str(bundle))))
    except UserError as error:
        return Check("tensors", False, error.given)
    return Check("tensors", True, f"{len(checkpoint.shapes)} with the names and shapes of the config")


def _zero_weights(bundle: Path, recorded: Recorded) -> list[Check]:
    checkpoint = read_checkpoint(bundle)
    stored = weight_sparsity(checkpoint.config)
    if stored is None and recorded.zero_weights is None:
        return []
    config = sparse_config(checkpoint.config, stored_activation(checkpoint.config), str(bundle))
    matrices = list(count_zeros(config, TensorReader(bundle)))
    zeros, weights = sum(one.zeros for one in matrices), sum(one.weights for one in matrices)
    found = f"{zeros:,} of {weights:,} weights of the projections are zero ({zeros / weights:.1%})"
    if stored is None:
        return [Check("weight zeros", False, f"{found}; config.json no longer says that they are sparse")]
    if recorded.zero_weights is None:
        return [Check("weight zeros", False, f"{found}; config.json says {stored.words}, the export recorded none")]
    same = zeros == recorded.zero_weights
    said = f"{found}, as at export" if same else f"{found}, {recorded.zero_weights:,} at export"
    return [Check("weight zeros", same, said)]


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
