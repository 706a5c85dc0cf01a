"""The result of `sparsify bench proof` as tables, figures and files."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from sparsify.bench.proof import GapFit, Proof
from sparsify.bench.recovery import DENSE, RecoveryVariant
from sparsify.bench.recovery_report import recovery_table, write_recovery
from sparsify.compare.evaluations import TaskDifference
from sparsify.files import write_text
from sparsify.reporting.tables import Table

RESULT_FILE = "proof.json"


def write_proof(proof: Proof, folder: Path) -> None:
    """Writes proof.json, and recovery.json with its figures."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULT_FILE, proof.model_dump_json(indent=1) + "\n")
    if len(proof.recovery.variants) > 1:
        write_recovery(proof.recovery, folder)


def proof_table(proof: Proof) -> RenderableType:
    parts = [recovery_table(proof.recovery), sources_table(proof), _scores(proof), _speeds(proof), _fits(proof)]
    return Group(*(part for part in parts if part is not None))


def sources_table(proof: Proof) -> Table:
    """Held-out loss of each source at the end of the first seed, and its difference to the dense baseline's."""
    dense = proof.recovery.dense.runs[0].last.sources
    table = Table("Held-out loss by source after training, first seed: nats per token", ["variant", *dense])
    for variant in proof.recovery.variants:
        table.add(variant.name, *(_loss(variant, source, loss) for source, loss in dense.items()))
    return table


def _loss(variant: RecoveryVariant, source: str, dense: float | None) -> str:
    loss = variant.runs[0].last.sources.get(source)
    if loss is None or dense is None:
        return "–"
    return f"{loss:.3f}" if variant.name == DENSE else f"{loss:.3f} ({loss - dense:+.3f})"


def _scores(proof: Proof) -> Table | None:
    if not proof.scores:
        return None
    tasks = dict.fromkeys((one.task, one.metric) for one in proof.scores)
    title = "Suite, first seed: score [95% interval of the paired difference to the dense baseline; of a perplexity, in nats]"
    table = Table(title, ["variant", "tokens", *(f"{task}\n{metric}" for task, metric in tasks)])
    found = {(one.variant, one.tokens, one.task): one for one in proof.scores}
    for variant, tokens in dict.fromkeys((one.variant, one.tokens) for one in proof.scores):
        row = (found.get((variant, tokens, task)) for task, _ in tasks)
        cells = ("–" if one is None else f"{one.value:.3f}{_interval(one.difference)}" for one in row)
        table.add(variant, f"{tokens:,}", *cells)
    return table


def _interval(paired: TaskDifference | None) -> str:
    if paired is None or paired.difference.low is None:
        return ""
    return f"\n[{paired.difference.low:+.3f}, {paired.difference.high:+.3f}]"


def _speeds(proof: Proof) -> Table | None:
    if not proof.speeds:
        return None
    threads = next(iter(proof.speeds.values())).threads
    header = ["variant", "dense, torch", "dense, our kernels", "exact", "speed-up over torch", "MB read", "of dense MB"]
    table = Table(f"Decoding of the exports on this machine, {threads} thread(s), tokens/s", header)
    for name, point in proof.speeds.items():
        speeds = (f"{1 / point.decode_seconds[way].median:.1f}" for way in ("torch", "dense", "exact"))
        read = (f"{point.bytes_read[way] / 1e6:,.0f}" for way in ("exact", "torch"))
        table.add(name, *speeds, str(point.ratio("exact")), *read)
    return table


def _fits(proof: Proof) -> RenderableType | None:
    if not proof.fits:
        return None
    times = [point.tokens for point in proof.fits[0].fit.predicted]
    table = Table(
        "Loss gap to the dense baseline, fitted: gap(D) = c / D^alpha + limit",
        ["variant", "points", "alpha", "limit", f"at {times[0]:,}", *(f"at {tokens:,}*" for tokens in times[1:])],
    )
    for one in proof.fits:
        fit = one.fit
        table.add(one.variant, str(fit.num_points), f"{fit.alpha:.2f}", f"{1 - fit.limit:+.3f}", *_predicted(one))
    note = "*: extrapolation beyond the trained tokens. Intervals: 95% of the law, from the spread of its points alone."
    return Group(table, Text(note))


def _predicted(one: GapFit) -> list[str]:
    return [f"{1 - p.active:+.3f}\n[{1 - p.high:+.3f}, {1 - p.low:+.3f}]" for p in one.fit.predicted]
