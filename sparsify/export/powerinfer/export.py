"""Export for PowerInfer: sparse GGUF with predictors, activation statistics, and GPU split."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from sparsify.conversion.source_checkpoint import locate
from sparsify.errors import ExportError
from sparsify.export.powerinfer.bpe import other_share
from sparsify.export.powerinfer.gguf import Facts, Sizes, rope_theta, write_gguf
from sparsify.export.powerinfer.gpu_split import check_split, write_activations, write_split
from sparsify.export.powerinfer.rules import check_holdable, check_largest_product, stored_thresholds
from sparsify.export.powerinfer.vocabulary import PIECES_FILE, Vocabulary, read_vocabulary
from sparsify.export.weight_shards import write_sums
from sparsify.files import atomic_folder, write_json, write_text
from sparsify.models import SparseModel
from sparsify.predictors import BlockPredictor, Predictors
from sparsify.predictors.engines import ENGINES, POWERINFER, WithoutThresholds, as_held
from sparsify.predictors.inputs import BlockInputs
from sparsify.predictors.predictor_mask import PredictorMask
from sparsify.runs.load import Loaded
from sparsify.sparsity.probe import SparsityProbe

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PowerInferSettings:
    """Settings of the export.

    Attributes:
        ffn_type: Type of the feed-forward weights, `f16` or `q4_0`.
        rest_type: Type of attention, embedding and head: `f16`, `q8_0` or `q4_0`; None for the feed-forward weights' type.
        context_tokens: Maximum context; None for the model's.
        vram_bytes: GPU memory for hot neurons; None to write no split.
        layout: `powerinfer` for the GGUF, `powerinfer_hf` for the folders that PowerInfer's converter reads.
    """

    name: str
    ffn_type: str = "f16"
    rest_type: str | None = None
    context_tokens: int | None = None
    vram_bytes: int | None = None
    layout: str = "powerinfer"

    @property
    def chosen_rest_type(self) -> str:
        return self.rest_type or self.ffn_type


@dataclass(frozen=True)
class Written:
    """The written folder, with notes for the user."""

    folder: Path
    model_file: str
    size_bytes: int
    notes: list[str]


def check_model(
    loaded: Loaded,
    ffn_type: str,
    context_tokens: int | None,
    rest_type: str = "f16",
    layout: str = "powerinfer",
) -> Vocabulary:
    """The vocabulary that the engine gets. Raises ExportError, with the reasons, if it does not support the model or its
    tokenizer.
    """
    check_holdable(loaded.model.config, ffn_type, context_tokens, rest_type)
    vocabulary = read_vocabulary(_tokenizer_folder(loaded), loaded.tokenizer, loaded.model.config.vocab_size)
    if layout == "powerinfer_hf" and vocabulary.model != "llama":
        raise ExportError(
            "--format powerinfer_hf needs a SentencePiece tokenizer; this model's is byte-level BPE.",
            next_step="Use --format powerinfer, which writes the file without PowerInfer's converter.",
        )
    return vocabulary


def _tokenizer_folder(loaded: Loaded) -> Path:
    return loaded.trained.run.initial if loaded.trained else locate(loaded.name)


def check_predictors(loaded: Loaded, predictors: Predictors, settings: PowerInferSettings) -> None:
    """Raises ExportError, with the reason, if the engine does not support these predictors, or a split of the model; ModelError
    if they are another's.
    """
    if settings.vram_bytes is not None:
        check_split(loaded.model.config)
    predictors.check_model(loaded.model, "The folder of predictors")
    _check_threshold(predictors, evaluated_threshold(loaded, predictors)[0])


def export_powerinfer(
    loaded: Loaded,
    predictors: Predictors,
    batches: Iterable[Batch],
    to: Path,
    settings: PowerInferSettings,
    vocabulary: Vocabulary | None = None,
) -> Written:
    """Writes a folder for PowerInfer from a dReLU model with Mistral's architecture; counts firing neurons on the
    batches. `vocabulary` is what `check_model` gave for these settings. Raises ExportError if the engine does not support
    the model.
    """
    if to.exists():
        raise ExportError(
            f"{to} already exists; an export never overwrites.",
            next_step="Choose another folder with --to, or remove this one.",
        )
    if vocabulary is None:
        chosen = settings.ffn_type, settings.context_tokens, settings.chosen_rest_type, settings.layout
        vocabulary = check_model(loaded, *chosen)
    check_predictors(loaded, predictors, settings)
    model = loaded.model
    tokenizer_folder = _tokenizer_folder(loaded)
    threshold, reason = evaluated_threshold(loaded, predictors)
    held = as_held(predictors, model, POWERINFER)
    matrices = [block for _, block in sorted(held.blocks.items())]
    facts = _facts(loaded, settings, threshold)
    batches = list(batches)
    messages = vocabulary.notes + text_notes(vocabulary, loaded, batches) + evaluation_notes(loaded, predictors)
    counts, largest = _firing_counts(model, held, threshold, batches)
    messages += check_largest_product(largest, settings.ffn_type)
    with atomic_folder(to) as partial:
        write_activations(counts, partial / "activation")
        if settings.layout == "powerinfer_hf":
            name = "model"
            write_layout(partial, model, matrices, vocabulary, facts, tokenizer_folder)
        else:
            name = f"{settings.name}.powerinfer.gguf"
            sizes = write_gguf(partial / name, model, matrices, vocabulary, facts)
            messages.append(_size_note(facts, sizes))
            if settings.vram_bytes is not None:
                split = partial / f"{name}.generated.gpuidx"
                messages += write_split(split, counts, model.config, sizes, facts, settings.vram_bytes)
        _write_facts(partial, loaded, predictors, reason, facts, vocabulary, messages)
        files = write_sums(partial)
        size_bytes = sum(file.stat().st_size for file in files)
    return Written(to, name, size_bytes, messages)


def evaluated_threshold(loaded: Loaded, predictors: Predictors) -> tuple[float, str]:
    """The threshold of the predictors in the engine's arithmetic, and why it is that one.

    Raises:
        ExportError: If their evaluation for the engine found none; or if there was none, and the model stores thresholds, which
            the engine does not apply: the loss of the file would then be unknown.
    """
    facts, command = predictors.facts, _evaluation_command(loaded)
    evaluation = facts.evaluations.get(POWERINFER)
    if evaluation is None:
        if stored := stored_thresholds(loaded.model.config):
            raise ExportError(
                f"The model stores {stored}, which PowerInfer does not apply: the predictors alone decide there. What that costs "
                "was not measured, since the predictors were not evaluated for PowerInfer.",
                next_step=f"`{command}`",
            )
        return facts.threshold, facts.threshold_reason
    if evaluation.threshold is None:
        raise ExportError(
            f"The evaluation of these predictors for PowerInfer refused every threshold: {evaluation.verdict}",
            next_step=f"Train better predictors and evaluate them, or accept a higher loss: `{command} --max-loss-rise NATS`.",
        )
    return evaluation.threshold, evaluation.verdict


def _evaluation_command(loaded: Loaded) -> str:
    folder = "" if loaded.trained else " --predictors DIR"
    return f"sparsify predictors evaluate {loaded.name}{folder} --engine {POWERINFER}"


def evaluation_notes(loaded: Loaded, predictors: Predictors) -> list[str]:
    """What the user must know about the predictors' evaluation for the engine."""
    evaluation = predictors.facts.evaluations.get(POWERINFER)
    if evaluation is None:
        return [
            "The predictors were not evaluated for PowerInfer: how much higher the loss of this file is than the model's is not "
            f"known. `{_evaluation_command(loaded)}` measures it and chooses the threshold."
        ]
    note = (
        f"With predicted masks the loss is {evaluation.loss + (evaluation.loss_rise or 0.0):.4f} nats per token, "
        f"{evaluation.loss_rise or 0.0:+.4f} against {evaluation.loss:.4f} of the model as trained, on {evaluation.num_tokens:,} "
        f"tokens: {evaluation.text}."
    )
    if not evaluation.dropped_thresholds:
        return [note]
    stored = stored_thresholds(loaded.model.config)
    return [f"PowerInfer does not apply the {stored} that the model stores, so they were dropped. {note}"]


def text_notes(vocabulary: Vocabulary, loaded: Loaded, batches: Sequence[Batch]) -> list[str]:
    """How much of some text the engine reads as other tokens, if its words are not the tokenizer's."""
    if vocabulary.engine is None:
        return []
    texts = [str(loaded.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)) for batch in batches]
    share = other_share(vocabulary.engine, loaded.tokenizer, texts)
    return [
        f"PowerInfer's tokenizer gives other ids than the model's for {share:.2%} of the tokens of the text that firing neurons were "
        "counted on: after a run of spaces or newlines, where no letter or digit follows."
    ]


def _check_threshold(predictors: Predictors, threshold: float) -> None:
    """Refuses predictors of the normed input with a threshold other than 0: then the norm cannot be folded in exactly."""
    if predictors.facts.input == "normed" and threshold != 0:
        raise ExportError(
            f"These predictors take the normed input and have the threshold {threshold:g}. PowerInfer's input is the residual "
            "before the norm, for which the equivalent threshold differs from token to token.",
            allowed="Predictors of the residual, or predictors of the normed input with threshold 0.",
            next_step=f"`sparsify predictors evaluate CHECKPOINT --engine {POWERINFER}`, which tries 0, or `sparsify predictors train "
            "CHECKPOINT --input residual`.",
        )


def _facts(loaded: Loaded, settings: PowerInferSettings, threshold: float) -> Facts:
    config, tokenizer = loaded.model.config, loaded.tokenizer

    def known(number: object, fallback: object) -> int | None:
        chosen = fallback if number is None else number
        return chosen if isinstance(chosen, int) else None

    return Facts(
        name=settings.name,
        ffn_type=settings.ffn_type,
        rest_type=settings.chosen_rest_type,
        context_tokens=settings.context_tokens or config.max_position_embeddings,
        threshold=threshold,
        bos=known(tokenizer.bos_token_id, config.bos_token_id),
        eos=known(tokenizer.eos_token_id, config.eos_token_id),
        unk=known(tokenizer.unk_token_id, None),
    )


def _size_note(facts: Facts, sizes: Sizes) -> str:
    def mb(num_bytes: int) -> str:
        return f"{num_bytes / 1e6:,.1f} MB"

    return (
        f"Feed-forward weights {mb(sizes.ffn)} ({facts.ffn_type}), attention and head {mb(sizes.rest)} and embedding "
        f"{mb(sizes.embedding)} ({facts.rest_type}), predictors {mb(sizes.predictors)} (f16)."
    )


@torch.no_grad()
def _firing_counts(
    model: SparseModel, predictors: Predictors, threshold: float, batches: Iterable[Batch]
) -> tuple[torch.Tensor, float]:
    """How often each neuron is not zero in the engine's arithmetic, [layers, neurons], and the largest product."""
    with WithoutThresholds(model), BlockInputs(model, predictors.facts.input) as inputs:
        mask = PredictorMask(
            predictors.to(model.device), inputs, threshold, at_threshold=ENGINES[POWERINFER].at_threshold
        )
        probe = SparsityProbe(model, mask=mask)
        with probe:
            _run(model, batches)
    return probe.statistics().product_fired[:, 0], mask.largest


def _run(model: SparseModel, batches: Iterable[Batch]) -> None:
    for batch in batches:
        model.model(
            input_ids=batch["input_ids"].to(model.device),
            position_ids=batch["position_ids"].to(model.device),
            use_cache=False,
        )


def _write_facts(
    folder: Path,
    loaded: Loaded,
    predictors: Predictors,
    reason: str,
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
            "rest_type": facts.rest_type,
            "context_tokens": facts.context_tokens,
            "threshold": facts.threshold,
            "threshold_reason": reason,
            "predictor_rank": list(known.rank.values()),
            "added_tokens": len(vocabulary.added),
            "notes": messages,
        },
    )
    model_file = f"{facts.name}.powerinfer.gguf"
    run = [f"build/bin/main -m {model_file} -t 8 -n 64 -p '{vocabulary.prefix}Once upon a time'"]
    if not (folder / model_file).is_file():
        run.insert(0, f"python convert.py --outtype f16 --outfile {model_file} model predictor   # numpy below 2")
    lines = [
        f"# {facts.name} for PowerInfer",
        "",
        "Build PowerInfer as described in its README, then run:",
        "",
        "```",
        *run,
        "```",
        "",
        f"Sparse threshold {facts.threshold:g}: {reason}",
        "",
        "Do not run PowerInfer's `quantize` on the file: it quantises the predictors too, and the engine misreads types other "
        "than F16 and Q4_0.",
        *(f"\n{note}" for note in messages),
    ]
    write_text(folder / "README.md", "\n".join(lines) + "\n")


SHARD_BYTES = "5GB"


def write_layout(
    folder: Path,
    model: SparseModel,
    predictors: list[BlockPredictor],
    vocabulary: Vocabulary,
    facts: Facts,
    tokenizer_folder: Path,
) -> None:
    """Writes `model/` and `predictor/` into a folder, the layout that PowerInfer's convert.py reads.

    convert.py refuses unknown tensors, so the predictors are in a separate folder. It selects the architecture by `model_type`
    and reads rope_theta at the top level of the config, where current versions of transformers do not write it.
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


def _layout_config(model: SparseModel, facts: Facts) -> dict[str, object]:
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
