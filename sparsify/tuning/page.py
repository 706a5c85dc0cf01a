"""Writes what a tuning found: tune.json, two PNG pictures, and one HTML page that needs no other file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sparsify.files import storage_errors, write_text
from sparsify.sparsity.page import page_environment
from sparsify.sparsity.pictures import image, page_figure
from sparsify.sparsity.themes import LIGHT
from sparsify.tuning.figures import (
    Draw,
    loss_against_share,
    observed_against_predicted,
    shown_domains,
)
from sparsify.tuning.record import RECORD_FILE, TuneRecord

PAGE_FILE = "index.html"
PACKAGE, TEMPLATE_FILE = "sparsify.tuning", "tune.html.j2"
PICTURES: dict[Draw, str] = {
    loss_against_share: "Loss against share",
    observed_against_predicted: "Can the regression be trusted?",
}


def write_page(record: TuneRecord, folder: Path) -> None:
    """Writes the record, its pictures and its page.

    Raises:
        StorageError: If the disk or the folder refuses.
    """
    write_text(folder / RECORD_FILE, record.model_dump_json(indent=2) + "\n")
    for draw in PICTURES:
        path = folder / f"{draw.__name__}.png"
        with storage_errors(path):
            path.write_bytes(image(partial(draw, record), draw.__name__, LIGHT, "png"))
    write_text(folder / PAGE_FILE, render_page(record))


def render_page(record: TuneRecord) -> str:
    """The page as text: pictures inside as data, on light and on dark paper."""
    captions: dict[Draw, str] = {
        loss_against_share: _share_caption(record),
        observed_against_predicted: "Each trial's loss against what the regression says of it when it has not seen "
        "it. Points on the line are predicted; an R² of 0 or less says that the mean of the other trials does as well.",
    }
    figures = [
        page_figure(partial(draw, record), draw.__name__, title, captions[draw])
        for draw, title in PICTURES.items()
    ]
    template = page_environment(PACKAGE).get_template(TEMPLATE_FILE)
    return template.render(record=record, figures=figures)


def _share_caption(record: TuneRecord) -> str:
    moved = (
        "The other parts keep the default's proportions while one moves; each trial is drawn where the regression "
        "puts it on that path, plus what it leaves unexplained."
        if len(record.parts) > 2
        else "The dots are what the trials measured."
    )
    hidden = len(record.domains) + 1 - len(shown_domains(record))
    more = f" {hidden} domains of least weight are in {RECORD_FILE} only." if hidden else ""
    return f"Held-out loss after {record.trial_tokens:,} training tokens. {moved}{more}"
