"""Export for PowerInfer: sparse GGUF with predictors, activation statistics, and GPU split."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from sparsify.conversion.source import locate
from sparsify.errors import ExportError
from sparsify.export.powerinfer.gguf import Facts, rope_theta, write_gguf
from sparsify.export.powerinfer.gpu_split import write_activations, write_split
from sparsify.export.powerinfer.rules import check_holdable, notes
from sparsify.export.powerinfer.vocabulary import PIECES_FILE, Vocabulary, read_vocabulary
from sparsify.export.weight_shards import write_sums
from sparsify.files import atomic_folder, write_json, write_text
from sparsify.models import SparseMistralForCausalLM, SparseModel
from sparsify.predictors import BlockPredictor, Predictors
from sparsify.predictors.format import folded
from sparsify.runs.load import Loaded
from sparsify.sparsity.probe import SparsityProbe

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PowerInferSettings:
    """Settings of the export.

    Attributes:
        name: Name of the model and of its file.
        ffn_type: Type of the feed-forward weights, `f16` or `q4_0`.
        context_tokens: Maximum context; None for the model's.
        vram_bytes: GPU memory for hot neurons; None to write no split.
        layout: `powerinfer` for the GGUF, `powerinfer_hf` for the folders that PowerInfer's converter reads.
    """

    name: str
    ffn_type: str = "f16"
    context_tokens: int | None = None
    vram_bytes: int | None = None
    layout: str = "powerinfer"


@dataclass(frozen=True)
class Written:
    """The written folder, with notes for the user."""

    folder: Path
    model_file: str
    size_bytes: int
    notes: list[str]


def check(loaded: Loaded, predictors: Predictors, settings: PowerInferSettings) -> None:
    """Checks that the engine supports the model, before anything is measured or written.

    Raises:
        ExportError: With the reasons, if it does not.
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
        loaded: A dReLU model with Mistral's architecture.
        predictors: Predictors of the model.
        batches: Text to count firing neurons on: input_ids and position_ids, [batch, tokens] each.
        to: Output folder; must not exist.
        settings: Settings of the export.

    Raises:
        ExportError: If the engine does not support the model, or `to` exists.
        ModelError: If the predictors belong to another model.
        StorageError: If writing fails.
    """
    if to.exists():
        raise ExportError(
            f"{to} already exists; an export never overwrites.",
            next_step="Choose another folder with --to, or remove this one.",
        )
    check(loaded, predictors, settings)
    model = loaded.model
    assert isinstance(model, SparseMistralForCausalLM)
    tokenizer_folder = loaded.trained.run.initial if loaded.trained else locate(loaded.name)
    vocabulary = read_vocabulary(tokenizer_folder, loaded.tokenizer, model.config.vocab_size)
    matrices = engine_predictors(model, predictors)
    facts = _facts(loaded, settings, predictors.facts.threshold)
    messages = [*notes(model.config), *vocabulary.notes]
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
            messages.append(f"Neurons on the GPU, layer by layer: {', '.join(map(str, hot))}.")
        _write_facts(partial, loaded, predictors, facts, vocabulary, messages)
        files = write_sums(partial)
        size_bytes = sum(file.stat().st_size for file in files)
    return Written(to, name, size_bytes, messages)


def engine_predictors(model: SparseModel, predictors: Predictors) -> list[BlockPredictor]:
    """The predictors of every layer for the engine, whose input is the residual before the norm.

    Raises:
        ExportError: If they take the normed input and their threshold is not 0: then the norm cannot be folded in exactly.
    """
    blocks = [predictors.blocks[key] for key in sorted(predictors.blocks)]
    if predictors.facts.input == "residual":
        return blocks
    if predictors.facts.threshold != 0:
        raise ExportError(
            f"These predictors take the normed input and have the threshold {predictors.facts.threshold:g}. PowerInfer's input is "
            "the residual before the norm, for which the equivalent threshold differs from token to token.",
            allowed="Predictors of the residual, or predictors of the normed input with threshold 0.",
            next_step="`sparsify predictors train CHECKPOINT --input residual`, then evaluate them again.",
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
    messages: list[str],
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
            "notes": messages,
        },
    )
    lines = [
        f"# {facts.name} for PowerInfer",
        "",
        "Build PowerInfer as described in its README, then run:",
        "",
        "```",
        f"build/bin/main -m {facts.name}.powerinfer.gguf -t 8 -n 64 -p 'Once upon a time'",
        "```",
        "",
        f"Sparse threshold {facts.threshold:g}: {known.threshold_reason}",
        "",
        "Do not run PowerInfer's `quantize` on the file: it quantises the predictors too, and the engine misreads types other "
        "than F16 and Q4_0.",
        *(f"\n{note}" for note in messages),
    ]
    write_text(folder / "README.md", "\n".join(lines) + "\n")


SHARD_BYTES = "5GB"


def write_layout(
    folder: Path,
    model: SparseMistralForCausalLM,
    predictors: list[BlockPredictor],
    vocabulary: Vocabulary,
    facts: Facts,
    tokenizer_folder: Path,
) -> None:
    """Writes `model/` and `predictor/` into a folder, the layout that PowerInfer's convert.py reads.

    convert.py refuses unknown tensors, so the predictors are in a separate folder. It selects the architecture by `model_type`
    and reads rope_theta at the top level of the config, where current versions of transformers do not write it.

    Args:
        folder: Output folder.
        model: The model.
        predictors: Predictors of every layer, for the residual.
        vocabulary: A token for every row of the embedding.
        facts: Metadata, as for the GGUF.
        tokenizer_folder: Folder with tokenizer.model.
    """
    (folder / "model").mkdir(parents=True)
    weights = {
        name: parameter.detach().to(torch.float16).contiguous().clone()
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    save_torch_state_dict(weights, folder / "model", max_shard_size=SHARD_BYTES)
    write_json(folder / "model" / "config.json", _layout_config(model, facts))
    shutil.copyfile(tokenizer_folder / PIECES_FILE, folder / "model" / PIECES_FILE)
    if vocabulary.added:
        write_json(folder / "model" / "added_tokens.json", vocabulary.added)
    (folder / "predictor").mkdir()
    for index, predictor in enumerate(predictors):
        # Contiguous copies: convert.py's pickle reader does not support views.
        matrices = {
            "fc1.weight": predictor.A.half().contiguous().clone(),
            "fc2.weight": predictor.B.half().contiguous().clone(),
        }
        torch.save(matrices, folder / "predictor" / f"model_{index}.pt")
    write_json(folder / "predictor" / "config.json", {"sparse_threshold": facts.threshold})


def _layout_config(model: SparseMistralForCausalLM, facts: Facts) -> dict[str, object]:
    config = model.config
    return {
        "model_type": "bamboo",
        "architectures": ["BambooForCausalLM"],
        "hidden_act": "relu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": facts.context_tokens,
        "rope_theta": rope_theta(model),
        "tie_word_embeddings": False,
        "bos_token_id": facts.bos,
        "eos_token_id": facts.eos,
        "torch_dtype": "float16",
    }
