"""The tensors of a checkpoint: by one set of names, whatever layout they are stored in, and what they must be."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sparsify.errors import ModelError
from sparsify.models import Family
from sparsify.models.integer_linear import CODES

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
"""Not needed when the embeddings are tied, though some checkpoints store it."""
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Those whose numbers are the values. Integers and float8 need scales, which no checkpoint in full precision has."""
INTEGERS = {"I8": torch.int8, "U8": torch.uint8}
"""Those of the codes of projections that `config.quantisation` says are integers."""
CHUNK_ROWS = 4096
_DERIVED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Stored by old Llama checkpoints, computed here."""
_BASE = re.compile(r"(layers|embed_tokens|norm)\.")
"""Begins a name in a checkpoint of the model without its head, which transformers writes without `model.`."""
_EXPERTS = re.compile(r"(model\.layers\.\d+\.)mlp\.((?:experts|gate)\..*)")
"""Names in memory of what a family may call otherwise on disk."""
_PART = re.compile(r"(?:model\.)?(?:(language_model)\.(?:model\.)?|vision_tower\.|multi_modal_projector\.)(.*)")
"""Of a checkpoint that holds a language model and others: what a tensor belongs to, and its name there."""
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.*)\.weight")
_FUSED = re.compile(r"(.*\.experts\.)(gate_up_proj|down_proj)")


@dataclass(frozen=True)
class SourceTensor:
    """A tensor, or a part of one, in a safetensors file.

    Attributes:
        stored: Its name in the file.
        dtype: As safetensors writes it, e.g. BF16.
        part: Which of the stored tensor's elements it is: expert, if it holds several, and rows; None for the whole tensor.
    """

    shard: Path
    stored: str
    shape: tuple[int, ...]
    dtype: str
    part: tuple[int | None, slice] | None = None

    def read(self) -> torch.Tensor:
        with safe_open(self.shard, framework="pt") as tensors:
            stored = tensors.get_slice(self.stored)
            if self.part is None:
                return tensors.get_tensor(self.stored)
            expert, rows = self.part
            if expert is None:
                return stored[rows].contiguous()
            return stored[expert : expert + 1, rows][0].contiguous()

    def chunks(self) -> Iterable[torch.Tensor]:
        """The tensor, some rows at a time."""
        if self.part is not None or not self.shape:
            yield self.read()
            return
        with safe_open(self.shard, framework="pt") as tensors:
            stored = tensors.get_slice(self.stored)
            for start in range(0, self.shape[0], CHUNK_ROWS):
                yield stored[start : start + CHUNK_ROWS]

    def equals(self, other: SourceTensor) -> bool:
        if self.shape != other.shape:
            return False
        return all(
            torch.equal(mine.float(), theirs.float())
            for mine, theirs in zip(self.chunks(), other.chunks(), strict=True)
        )


def read_header(shard: Path) -> dict[str, SourceTensor]:
    """A safetensors file's tensors by their names in it; the file's length is checked against its header.

    Raises:
        ModelError: If the file is truncated or corrupt.
    """
    try:
        with safe_open(shard, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            return {
                key: SourceTensor(shard, key, tuple(stored.get_shape()), str(stored.get_dtype()))
                for key, stored in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{shard} is truncated or corrupt: {error}",
            next_step="Download or copy this file again; compare its size with the original's.",
        ) from error


def read_shapes(shard: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors. Raises ModelError if it is truncated or corrupt."""
    return {name: tensor.shape for name, tensor in read_header(shard).items()}


def stock_tensors(
    stored: Mapping[str, SourceTensor], family: Family | None = None, rows: Mapping[str, int] = {}
) -> dict[str, SourceTensor]:
    """Tensors by their names in the layout of a family, from any layout that transformers reads.

    Those are: experts one by one or fused in one tensor, named as on disk or as in memory; checkpoints of the
    model without its head; and buffers that old versions stored and new ones compute, which are ignored. Projections that
    the family's stock checkpoints store as one tensor are taken apart, given the rows of each.
    """
    tensors: dict[str, SourceTensor] = {}
    for key, tensor in stored.items():
        if _DERIVED.search(key):
            continue
        name = key
        if family is not None and family.holders and (match := _PART.fullmatch(key)):
            if not match[1]:
                continue  # of another model in the same checkpoint
            name = match[2]
        name = f"model.{name}" if _BASE.match(name) else name
        if family is not None and (match := _EXPERTS.fullmatch(name)):
            name = f"{match[1]}{family.blocks_on_disk}.{match[2]}"
        match = _FUSED.fullmatch(name)
        if family is not None and match and len(tensor.shape) == 3:
            tensors |= _experts(match[1], match[2], tensor, family.expert_projections)
        elif family is not None and (match := _LAYER.fullmatch(name)) and match[2] in family.fused:
            tensors |= _apart(match[1], match[2], tensor, {one: rows[one] for one in family.fused[match[2]]})
        else:
            tensors[name] = tensor
    return tensors


def _experts(prefix: str, name: str, fused: SourceTensor, names: Mapping[str, str]) -> dict[str, SourceTensor]:
    experts, rows, columns = fused.shape
    gate, up = slice(0, rows // 2), slice(rows // 2, rows)  # in gate_up_proj, one above the other
    parts = {"down_proj": slice(0, rows)} if name == "down_proj" else {"gate_proj": gate, "up_proj": up}
    return {
        f"{prefix}{expert}.{names[matrix]}.weight": replace(
            fused, shape=(part.stop - part.start, columns), part=(expert, part)
        )
        for expert in range(experts)
        for matrix, part in parts.items()
    }


def _apart(prefix: str, name: str, fused: SourceTensor, rows: Mapping[str, int]) -> dict[str, SourceTensor]:
    home, first, parts = name.rpartition(".")[0], 0, dict[str, SourceTensor]()
    if fused.shape[0] != sum(rows.values()):
        return {f"{prefix}{name}.weight": fused}
    for projection, count in rows.items():
        part = None, slice(first, first + count)
        shape = count, *fused.shape[1:]
        parts[f"{prefix}{home}.{projection}.weight"] = replace(fused, shape=shape, part=part)
        first += count
    return parts


def check_dtypes(folder: Path, tensors: Mapping[str, SourceTensor], *, has_codes: bool = False) -> None:
    """Refuses numbers that are not the values of weights, whatever config.json says of them; codes of integers where it `has_codes`.

    Raises:
        ModelError: Naming the first such tensor.
    """
    other = [
        tensor
        for name, tensor in sorted(tensors.items())
        if tensor.dtype not in (INTEGERS if has_codes and name.endswith(CODES) else DTYPES)
    ]
    if other:
        first, more = other[0], f", like {len(other) - 1:,} more tensors" if other[1:] else ""
        raise ModelError(
            f"{first.stored} of {first.shard} is stored as {first.dtype}{more}: these numbers are not its values.",
            allowed=f"Weights in full precision: {', '.join(DTYPES)}.",
            next_step=f"Give the checkpoint that {folder} was quantised from, or load it and save it in bfloat16.",
        )


def check_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a checkpoint with a missing tensor, one too many, or one of another shape.

    Raises:
        ModelError: Naming the first few of each kind.
    """
    missing = sorted(expected.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - expected.keys())
    other = sorted(
        f"{key} {list(shapes[key])} instead of {list(expected[key])}"
        for key in expected.keys() & shapes.keys()
        if shapes[key] != expected[key]
    )
    problems = Counter({"missing": len(missing), "unexpected": len(unexpected), "of another shape": len(other)})
    if not any(problems.values()):
        return
    counts = ", ".join(f"{count} {kind}" for kind, count in problems.items() if count)
    examples = "; ".join((missing[:3] + unexpected[:3] + other[:3])[:5])
    raise ModelError(
        f"The tensors of {folder} do not fit its config.json: {counts} ({examples}).",
        allowed="Every tensor of the architecture, and none besides.",
        next_step="Check that config.json belongs to these weights.",
    )


def check_finite(name: str, chunks: Iterable[torch.Tensor]) -> None:
    """Refuses a tensor with a number that is not finite: every loss that it takes part in would be NaN.

    Raises:
        ModelError: Naming the tensor, with its counts.
    """
    counts = Counter()
    for chunk in chunks:
        if torch.isfinite(chunk.sum(dtype=torch.float32)):
            continue  # NaN and infinity survive a sum, which is several times faster than a look at each element
        counts["NaN"] += int(chunk.isnan().sum())
        counts["infinite"] += int(chunk.isinf().sum())
    if counts.total():
        found = " and ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
        raise ModelError(
            f"{name} of the source holds {found}: its loss would be NaN before anything is changed.",
            next_step="Download or copy the checkpoint again; if it was merged or trained, take an earlier state of it.",
        )


def check_base_loss(loss: float | None, source: str) -> None:
    """Refuses a model whose loss is not finite before anything was changed, though all of its weights are.

    Raises:
        ModelError: With the loss.
    """
    if loss is not None and not math.isfinite(loss):
        raise ModelError(
            f"The loss of {source} is {loss} before anything is changed. Its weights are finite, so numbers inside it "
            "exceed its dtype, or its config.json does not belong to it.",
            next_step="Check that stock transformers gives a finite loss with it; compare config.json with the original's.",
        )
