"""Writes what PowerInfer runs: the sparse GGUF with predictors, activation statistics, and the split for a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsify.conversion.source import locate
from sparsify.errors import ExportError
from sparsify.export.powerinfer.folder import write_layout
from sparsify.export.powerinfer.gguf import Facts, write_gguf
from sparsify.export.powerinfer.gpu_split import write_activations, write_split
from sparsify.export.powerinfer.rules import check_holdable, notes
from sparsify.export.powerinfer.vocabulary import Vocabulary, read_vocabulary
from sparsify.export.shards import write_sums
from sparsify.files import atomic_folder, write_json, write_text
from sparsify.models import SparseMistralForCausalLM, SparseModel
from sparsify.predictors import BlockPredictor, Predictors
from sparsify.predictors.format import folded
from sparsify.runs.load import Loaded
from sparsify.sparsity.probe import SparsityProbe

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PowerInferSettings:
    """How the file is written.

    Attributes:
        name: Of the model and of its file.
        ffn_type: `f16` or `q4_0`.
        context_tokens: Longest context; the model's own if None.
        vram_bytes: GPU memory for hot neurons; no split is written if None.
        layout: `powerinfer` for the GGUF, `powerinfer_hf` for the folders that PowerInfer's own converter takes.
    """

    name: str
    ffn_type: str = "f16"
    context_tokens: int | None = None
    vram_bytes: int | None = None
    layout: str = "powerinfer"


@dataclass(frozen=True)
class Written:
    """What was written: the folder, and what the user should know about it."""

    folder: Path
    model_file: str
    size_bytes: int
    notes: list[str]


def check(loaded: Loaded, predictors: Predictors, settings: PowerInferSettings) -> None:
    """Refuses what the engine cannot hold, before anything is measured or written.

    Raises:
        ExportError: With the reason.
        ModelError: If the predictors belong to another model.
    """
    check_holdable(loaded.model.config, settings.ffn_type, settings.context_tokens)
    predictors.check_model(loaded.model, "The folder of predictors")
    engine_predictors(loaded.model, predictors)


def export_powerinfer(
    loaded: Loaded,
    predictors: Predictors,
    batches: Iterable[Batch],
    to: Path,
    settings: PowerInferSettings,
) -> Written:
    """Writes a folder for PowerInfer.

    Args:
        loaded: A dReLU model of Mistral's shape.
        predictors: Trained for it.
        batches: Text to count firing neurons on: input_ids and position_ids.
        to: Folder to write; must not exist.
        settings: How.

    Raises:
        ExportError: If the engine cannot hold the model, or `to` exists.
        ModelError: If the predictors belong to another model.
        StorageError: If the disk refuses.
    """
    if to.exists():
        raise ExportError(
            f"{to} exists already; an export never overwrites.",
            next_step="Choose another folder with --to, or remove this one.",
        )
    check(loaded, predictors, settings)
    model = loaded.model
    assert isinstance(model, SparseMistralForCausalLM)
    tokenizer_folder = loaded.trained.run.initial if loaded.trained else locate(loaded.name)
    vocabulary = read_vocabulary(tokenizer_folder, loaded.tokenizer, model.config.vocab_size)
    matrices = engine_predictors(model, predictors)
    facts = _facts(loaded, settings, predictors.facts.threshold)
    told = [*notes(model.config), *vocabulary.notes]
    with atomic_folder(to) as partial:
        if settings.layout == "powerinfer_hf":
            name = "model"
            write_layout(partial, model, matrices, vocabulary, facts, tokenizer_folder)
        else:
            name = f"{settings.name}.powerinfer.gguf"
            write_gguf(partial / name, model, matrices, vocabulary, facts)
        counts = _firing_counts(model, batches)
        write_activations(counts, partial / "activation")
        if settings.vram_bytes is not None:
            hot = write_split(
                partial / f"{name}.generated.gpuidx",
                counts,
                hidden=model.config.hidden_size,
                ffn_type=settings.ffn_type,
                vram_bytes=settings.vram_bytes,
            )
            told.append(f"Neurons on the GPU, layer by layer: {', '.join(map(str, hot))}.")
        _write_facts(partial, loaded, predictors, facts, vocabulary, told)
        files = write_sums(partial)
        size_bytes = sum(file.stat().st_size for file in files)
    return Written(to, name, size_bytes, told)


def engine_predictors(model: SparseModel, predictors: Predictors) -> list[BlockPredictor]:
    """The predictors of every layer as the engine feeds them: with the residual.

    Raises:
        ExportError: If they take the normed input and their threshold is not 0, since then no folding is exact.
    """
    blocks = [predictors.blocks[key] for key in sorted(predictors.blocks)]
    if predictors.facts.input == "residual":
        return blocks
    if predictors.facts.threshold != 0:
        raise ExportError(
            f"These predictors take the normed input and have the threshold {predictors.facts.threshold:g}. PowerInfer feeds the "
            "residual before the norm, where the same threshold would mean something else for every token.",
            allowed="Predictors of the residual; or of the normed input with the threshold 0, which fold exactly.",
            next_step="`sparsify predictors train CHECKPOINT --input residual`, then judge them again.",
        )
    norms = [layer.post_attention_layernorm for layer in model.model.layers]
    return [folded(block, norm, 1.0) for block, norm in zip(blocks, norms, strict=True)]  # pyright: ignore[reportArgumentType]


def _facts(loaded: Loaded, settings: PowerInferSettings, threshold: float) -> Facts:
    config, tokenizer = loaded.model.config, loaded.tokenizer

    def known(number: object, fallback: object) -> int | None:
        chosen = fallback if number is None else number
        return chosen if isinstance(chosen, int) else None

    return Facts(
        name=settings.name,
        ffn_type=settings.ffn_type,
        context_tokens=settings.context_tokens or config.max_position_embeddings,
        threshold=threshold,
        bos=known(tokenizer.bos_token_id, config.bos_token_id),
        eos=known(tokenizer.eos_token_id, config.eos_token_id),
        unk=known(tokenizer.unk_token_id, None),
    )


@torch.no_grad()
def _firing_counts(model: SparseMistralForCausalLM, batches: Iterable[Batch]) -> torch.Tensor:
    with SparsityProbe(model) as probe:
        for batch in batches:
            model.model(
                input_ids=batch["input_ids"].to(model.device),
                position_ids=batch["position_ids"].to(model.device),
                use_cache=False,
            )
    return probe.statistics().product_fired[:, 0]


def _write_facts(
    folder: Path,
    loaded: Loaded,
    predictors: Predictors,
    facts: Facts,
    vocabulary: Vocabulary,
    told: list[str],
) -> None:
    known = predictors.facts
    write_json(
        folder / "export.json",
        {
            "model": loaded.name,
            "ffn_type": facts.ffn_type,
            "context_tokens": facts.context_tokens,
            "threshold": facts.threshold,
            "threshold_reason": known.threshold_reason,
            "predictor_rank": list(known.rank.values()),
            "added_tokens": len(vocabulary.added),
            "notes": told,
        },
    )
    lines = [
        f"# {facts.name} for PowerInfer",
        "",
        "Build PowerInfer as its own README says, then:",
        "",
        "```",
        f"build/bin/main -m {facts.name}.powerinfer.gguf -t 8 -n 64 -p 'Once upon a time'",
        "```",
        "",
        f"Sparse threshold {facts.threshold:g}: {known.threshold_reason}",
        "",
        "Do not run PowerInfer's `quantize` over the file: it quantises the predictors too, and types other than F16 and Q4_0 "
        "are misread.",
        *(f"\n{note}" for note in told),
    ]
    write_text(folder / "README.md", "\n".join(lines) + "\n")
