"""Checks a bundle that came from somewhere: is it whole, unedited, and what it says it is?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparsify.conversion.architecture import sparse_config, tensor_shapes
from sparsify.conversion.folder import load_sparse
from sparsify.conversion.source import check_tensors, read_checkpoint
from sparsify.errors import ExportError, UserError
from sparsify.export.acceptance import Acceptance, accept
from sparsify.export.recorded import REFERENCE_FILE, Recorded, read_recorded
from sparsify.export.sums import SUMS, read_sums, sha256
from sparsify.predictors import read_predictors
from sparsify.sparsity.report import read_report

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


def verify(bundle: Path, say: Callable[[str], None] = lambda _: None) -> list[Check]:
    """Checks a bundle from its bytes to its logits; later checks run even where earlier ones fail, as far as they can.

    Hashes find damage and edits. Whoever edits a file and writes its hash anew is found by the logits, which are held against
    those of the live model, and by the zeros.

    Args:
        bundle: Folder that `export` wrote.
        say: Told what begins.

    Raises:
        ExportError: If the folder is no bundle at all.
    """
    if not (bundle / "config.json").is_file() or not (bundle / "training").is_dir():
        raise ExportError(
            f"{bundle} is no bundle: it has no {'training folder' if (bundle / 'config.json').is_file() else 'config.json'}.",
            allowed="A folder that `sparsify export RUN --to DIR` wrote.",
        )
    say("Hashing")
    checks = [_hashes(bundle)]
    tensors = _tensors(bundle)
    checks.append(tensors)
    try:
        recorded = read_recorded(bundle)
    except ExportError as error:
        return [*checks, Check("logits", False, str(error))]
    if not tensors.holds:
        return [*checks, Check("logits", False, "not computed: the tensors do not fit")]
    say("Loading it in a fresh process")
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
        kept = checkpoint.config.get("ffn_activation", "swiglu")
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
