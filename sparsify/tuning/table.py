"""What a tuning found, for a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from sparsify.terminal import figures_table
from sparsify.tuning.page import PAGE_FILE
from sparsify.tuning.record import TuneRecord

COLUMNS = ("domain", "weight", "token share", "loss", "error", "R²")


def tune_summary(record: TuneRecord, folder: Path, given: str) -> RenderableType:
    """Shares and predicted losses of both mixtures, the verdict, and what to type next.

    Args:
        record: What was found.
        folder: Where its page lies.
        given: Recipe name or path as the user gave it.
    """
    table = figures_table(
        f"{record.recipe}: predicted after {record.trial_tokens:,} tokens, from {len(record.trials)} trials",
        *COLUMNS,
    )
    for name, domain in record.domains.items():
        table.add_row(
            escape(name),
            f"{domain.weight:.1%}",
            f"{domain.default_share:.1%} → {domain.tuned_share:.1%}",
            f"{domain.default_loss:.4f} → {domain.tuned_loss:.4f}",
            f"{domain.left_out_error:.4f}",
            f"{domain.left_out_r2:.2f}",
        )
    table.add_section()
    losses = f"{record.default_loss:.4f} → {record.tuned_loss:.4f}"
    zeros = f"{record.default_zeros:.2%} → {record.tuned_zeros:.2%}"
    for name, values, quality, error in (
        ("weighted loss", losses, record.weighted, f"{record.weighted.left_out_error:.4f}"),
        ("exact zeros", zeros, record.zeros, f"{record.zeros.left_out_error:.2%}"),
    ):
        table.add_row(name, "", "", values, error, f"{quality.left_out_r2:.2f}")
    parts: list[RenderableType] = [
        "",
        table,
        "Default → predicted best. Error and R² are leave-one-out. The weighted loss is what is made small: a domain weighs "
        "its share in the recipe's mixture, times its --weight.",
    ]
    if record.confirmation is not None:
        parts += ["", _confirmation_table(record)]
    parts += ["", f"[bold]{escape(record.verdict)}[/bold]", *_places(record, folder, given)]
    return Group(*parts)


def _confirmation_table(record: TuneRecord) -> Table:
    found = record.confirmation
    assert found is not None
    table = figures_table(
        f"Confirmation: {found.num_tokens:,} tokens, seed {found.seed}, other held-out windows",
        "domain",
        "default loss",
        "tuned loss",
        "difference",
    )
    for name, loss in found.default_losses.items():
        tuned = found.tuned_losses[name]
        table.add_row(escape(name), f"{loss:.4f}", f"{tuned:.4f}", f"{tuned - loss:+.4f}")
    table.add_section()
    row = (found.default_loss, found.tuned_loss)
    table.add_row("weighted loss", *(f"{loss:.4f}" for loss in row), f"{found.difference:+.4f}")
    return table


def _places(record: TuneRecord, folder: Path, given: str) -> list[str]:
    lines = [f"[bold]Page[/bold]     {escape(str(folder / PAGE_FILE))}"]
    if record.mixture_file is None:
        lines.append("No mixture was written; --force writes the predicted one all the same.")
        return lines
    mixture = escape(record.mixture_file)
    lines.append(f"[bold]Mixture[/bold]  {mixture}")
    lines.append(f"Next: [cyan]sparsify plan {escape(given)} mixture={mixture}[/cyan]")
    return lines
