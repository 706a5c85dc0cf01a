"""The bundle of a quantised model, which has no run: the converted folder, its reference logits, and a card of measured values."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import jinja2
import torch
from safetensors.torch import save_file

from sparsify.conversion.manifest import MANIFEST
from sparsify.conversion.source_checkpoint import locate, read_checkpoint
from sparsify.conversion.sparse_folder import load_sparse, write_config
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import ExportError, ModelError
from sparsify.export.check import RECORDED_FILE, REFERENCE_FILE, Acceptance, Recorded, accept
from sparsify.export.weight_shards import write_sums
from sparsify.files import atomic_folder, write_json
from sparsify.methods.calibrated_checkpoint import RECORD, read_calibration
from sparsify.models import SparseModel
from sparsify.models.integer_linear import quantisation
from sparsify.reporting.tables import markdown_text
from sparsify.sparsity.integer_weights import projection_bytes

TEMPLATE = Path(__file__).with_name("quantised_card.md.j2")
PRECISION = "bf16"
"""Decides how much logits may differ: a sum that another machine rounds otherwise can become another integer."""
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
REFERENCE_TEXT = (
    "A projection of integer weights rounds what it reads, so that a product is one of small integers. What a model says to these "
    "words is recorded when it is exported, and compared when a copy of it is verified."
)
REFERENCE_TOKENS = 32


def is_quantised_folder(folder: Path) -> bool:
    """Whether a folder is a converted model of integers. Raises ModelError if its files are damaged."""
    return (folder / "config.json").is_file() and bool(read_checkpoint(folder).config.get("quantisation"))


def write_quantised(
    source: str, to: Path, *, prompts: Sequence[str], sample_tokens: int, license: str | None, checked: bool
) -> tuple[Acceptance | None, int, int]:
    """Writes and checks the bundle of a converted folder; it appears in place once it is accepted.

    Returns:
        What the check found, None if it is not `checked`; number of files; bytes.

    Raises:
        ExportError: If a fresh process computes other logits.
        ModelError: If the folder is damaged.
    """
    folder = locate(source)
    calibration = read_calibration(folder)
    if calibration is None:
        raise ModelError(f"{folder} has no {RECORD}, which `sparsify convert` writes.", next_step="Convert it again.")
    model = load_sparse(folder)
    stored = quantisation(model.config)
    assert stored is not None, "checked by is_quantised_folder"
    dtype = NAMES[model.dtype]
    with atomic_folder(to) as partial:
        (partial / "training").mkdir()
        for file in folder.iterdir():
            if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
                raise ExportError(
                    f"{file} is a link to {file.resolve()}, which is not in the model's folder and would be published.",
                    next_step="If that file belongs to the model, replace the link by a copy.",
                )
            if file.is_file() and file.name not in (MANIFEST, RECORD):
                shutil.copyfile(file, partial / file.name)
        write_config(model.config, partial, model.dtype)  # and the modeling files of this version
        shutil.copyfile(folder / RECORD, partial / "training" / RECORD)
        reference = partial / "training" / REFERENCE_FILE
        save_file(_reference(model, folder), reference)
        activation = model.config.ffn_activation
        acceptance = accept(partial, activation, [PRECISION], reference, prompts, sample_tokens) if checked else None
        recorded = Recorded(
            checkpoint=folder.name,
            ffn_activation=activation,
            precision=PRECISION,
            dtype=dtype,
            logits_difference=acceptance.logits_difference if acceptance else None,
            zeros=acceptance.zeros if acceptance else None,
            reference_tokens=acceptance.reference_tokens if acceptance else 0,
        )
        write_json(partial / "training" / RECORDED_FILE, recorded.model_dump())
        own, dense = projection_bytes(model)
        environment = jinja2.Environment(
            undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["text"] = markdown_text
        card = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
            name=folder.name,
            config=model.config,
            stored=stored,
            calibration=calibration,
            acceptance=acceptance,
            own_bytes=own,
            dense_bytes=dense,
            dtype=dtype,
            license=license,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        files = write_sums(partial)
        size_bytes = sum(file.stat().st_size for file in files)
    return acceptance, len(files), size_bytes


def _reference(model: SparseModel, folder: Path) -> dict[str, torch.Tensor]:
    ids = load_tokenizer(folder)(REFERENCE_TEXT, return_tensors="pt")["input_ids"][:, :REFERENCE_TOKENS]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    return {"input_ids": ids.contiguous(), "logits": logits.float().contiguous()}
