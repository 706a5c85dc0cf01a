"""Writes what a tuning found: tune.json, two PNG pictures, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from sparsify.files import storage_errors, write_text
from sparsify.sparsity.themes import DARK, LIGHT
from sparsify.tuning.figures import (
    Draw,
    loss_against_share,
    observed_against_predicted,
    render,
    shown_domains,
)
from sparsify.tuning.record import RECORD_FILE, TuneRecord

PAGE_FILE = "index.html"
TEMPLATE_FILE = "page.html.j2"
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
            path.write_bytes(render(draw, record, LIGHT, "png"))
    write_text(folder / PAGE_FILE, render_page(record))


def render_page(record: TuneRecord) -> str:
    """The page as text: pictures inside as data, on light and on dark paper."""
    template = (resources.files("sparsify.tuning") / TEMPLATE_FILE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    captions: dict[Draw, str] = {
        loss_against_share: _share_caption(record),
        observed_against_predicted: "Each trial's loss against what the regression says of it when it has not seen "
        "it. Points on the line are predicted; an R² of 0 or less says that the mean of the other trials does as well.",
    }
    return environment.from_string(template).render(
        record=record,
        figures=[
            {
                "title": title,
                "caption": captions[draw],
                "light": _data_uri(draw, record, "light"),
                "dark": _data_uri(draw, record, "dark"),
            }
            for draw, title in PICTURES.items()
        ],
    )


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


def _data_uri(draw: Draw, record: TuneRecord, theme: str) -> str:
    svg = render(draw, record, DARK if theme == "dark" else LIGHT, "svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
