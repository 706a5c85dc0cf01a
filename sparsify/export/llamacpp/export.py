"""Export for stock llama.cpp: one GGUF file of a model that it computes exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from sparsify.conversion.architecture import sparse_config, stored_activation
from sparsify.conversion.layout import tensor_shapes
from sparsify.conversion.source_checkpoint import locate, read_checkpoint
from sparsify.conversion.source_tensors import DTYPES, HEAD, check_tensors
from sparsify.conversion.tokenizer import check_tokenizer, load_tokenizer
from sparsify.errors import ExportError
from sparsify.export.bundle import check_links, trained_config
from sparsify.export.gguf_tokens import Tokens, read_tokens
from sparsify.export.llamacpp.model_file import Facts, Read, write_gguf
from sparsify.export.llamacpp.rules import SMALLTHINKER, architecture, check_holdable
from sparsify.export.weight_shards import DTYPES as OWN_DTYPES
from sparsify.export.weight_shards import stock_reader, write_sums
from sparsify.files import atomic_folder, write_json, write_text
from sparsify.metadata import read_json, user_path
from sparsify.mixture.lock import read_lock
from sparsify.models import SparseConfig
from sparsify.runs.load import Trained, find_trained
from sparsify.runs.state import consolidated_weights

ENGINE = "llama.cpp"
SPEED_NOTE = "llama.cpp multiplies zeros like other numbers: this file is as fast as the dense model, not faster."


@dataclass(frozen=True)
class Source:
    """A model on the disk, whose tensors are read one by one.

    Attributes:
        folder: Where its tokenizer and generation settings are.
        dtype: A key of weight_shards.DTYPES: that of the stored weights, or of a run's training.
        open_weights: Checks the files with the weights, and gives the function that reads a tensor.
    """

    name: str
    folder: Path
    config: SparseConfig
    tokenizer: PreTrainedTokenizerFast
    dtype: str
    chat_template: str | None
    open_weights: Callable[[], Read]


@dataclass(frozen=True)
class Written:
    """The written folder, with notes for the user."""

    folder: Path
    model_file: str
    size_bytes: int
    notes: list[str]


def find_source(model_or_run: str) -> Source:
    """Finds a model folder, a Hub id, a run or one checkpoint of a run.

    Raises:
        ModelError: If it is none of these, or damaged.
        RunError: If it is a run without a checkpoint.
        ExportError: If the run has links out of its folder.
    """
    trained = find_trained(user_path(model_or_run))
    if trained is not None:
        return _trained_source(model_or_run, trained)
    folder = locate(model_or_run)
    checkpoint = read_checkpoint(folder)
    kept = stored_activation(checkpoint.config)
    config = sparse_config(checkpoint.config, kept, model_or_run)
    tensors = dict(checkpoint.tensors)
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    check_tensors(folder, {name: tensor.shape for name, tensor in tensors.items()}, tensor_shapes(config))
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, config, model_or_run)
    stored = {DTYPES.get(tensor.dtype) for tensor in tensors.values() if len(tensor.shape) > 1}
    dtype = next((name for name, own in OWN_DTYPES.items() if stored == {own}), "fp32")
    template = _default_template(tokenizer)
    return Source(model_or_run, folder, config, tokenizer, dtype, template, lambda: lambda name: tensors[name].read())


def _trained_source(name: str, trained: Trained) -> Source:
    check_links(trained)
    config, initial = trained_config(trained), trained.run.initial
    tokenizer = load_tokenizer(initial)
    template = read_lock(trained.run.mixture_lock).chat_template or _default_template(tokenizer)
    precision = trained.run.load_recipe().training.precision

    def open_weights() -> Read:
        return stock_reader(consolidated_weights(trained.checkpoint), config, OWN_DTYPES[precision])

    return Source(name, initial, config, tokenizer, precision, template, open_weights)


def _default_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def export_llamacpp(
    model_or_run: str,
    to: Path,
    dtype: str | None = None,
    context_tokens: int | None = None,
    on_progress: Callable[[str], object] = lambda line: None,
) -> Written:
    """Writes a folder with the GGUF file of a model, after everything that can be refused was checked.

    Args:
        model_or_run: See `find_source`.
        to: Folder; must not exist.
        dtype: Type of the weights, a key of rules.TYPES; None for the model's own.
        context_tokens: Maximum context; None for the model's own.
        on_progress: Gets a line about what is being done.

    Raises:
        ExportError: If llama.cpp would compute another function, or has no such tokenizer, or `to` exists.
    """
    if to.exists():
        raise ExportError(
            f"{to} already exists; an export never overwrites.",
            next_step="Choose another folder with --to, or remove this one.",
        )
    source = find_source(model_or_run)
    dtype = dtype or source.dtype
    check_holdable(source.config, dtype, context_tokens)
    tokens = read_tokens(source.tokenizer, source.config.vocab_size, ENGINE)
    facts = _facts(source, to.name, dtype, context_tokens)
    notes = [SPEED_NOTE] if architecture(source.config) == SMALLTHINKER else []
    notes += tokens.notes
    read = source.open_weights()
    with atomic_folder(to) as partial:
        name = f"{facts.name}.gguf"

        def on_tensor(done: int, total: int) -> None:
            on_progress(f"Writing {name}: {done:,} of {total:,} tensors")

        write_gguf(partial / name, source.config, read, tokens, facts, on_tensor)
        on_progress("Hashing")
        _write_facts(partial, source, facts, tokens, notes)
        files = write_sums(partial)
        size_bytes = sum(file.stat().st_size for file in files)
    return Written(to, name, size_bytes, notes)


def _facts(source: Source, name: str, dtype: str, context_tokens: int | None) -> Facts:
    config, unk = source.config, source.tokenizer.unk_token_id
    ends = _end_tokens(source)
    if not ends:
        raise ExportError(
            f"{source.name} has no end token, without which llama.cpp takes another model's.",
            next_step="Set eos_token in tokenizer_config.json.",
        )
    return Facts(
        name=name,
        dtype=dtype,
        context_tokens=context_tokens or config.max_position_embeddings,
        eos=ends[0],
        unk=unk if isinstance(unk, int) else None,
        end_of_turn=next(iter(ends[1:]), None),
        chat_template=source.chat_template,
    )


def _end_tokens(source: Source) -> list[int]:
    """Ids that end a text: the tokenizer's first, then those that only the generation settings have."""
    path = source.folder / "generation_config.json"
    stored = read_json(path, ExportError).get("eos_token_id") if path.is_file() else None
    listed = stored if isinstance(stored, list) else [stored, source.config.eos_token_id]
    ids = [source.tokenizer.eos_token_id, *listed]
    return list(dict.fromkeys(number for number in ids if isinstance(number, int)))


def _write_facts(folder: Path, source: Source, facts: Facts, tokens: Tokens, notes: list[str]) -> None:
    write_json(
        folder / "export.json",
        {
            "model": source.name,
            "architecture": architecture(source.config),
            "ffn_activation": source.config.ffn_activation,
            "dtype": facts.dtype,
            "context_tokens": facts.context_tokens,
            "tokenizer": tokens.model,
            "pre_tokenizer": tokens.pre,
            "adds_bos": tokens.adds_bos,
            "notes": notes,
        },
    )
    name = f"{facts.name}.gguf"
    lines = [
        f"# {facts.name} for llama.cpp",
        "",
        f"Architecture `{architecture(source.config)}`, weights {facts.dtype}, up to {facts.context_tokens:,} tokens of context.",
        "",
        "Complete a text:",
        "",
        "```",
        f"llama-completion -m {name} -c {facts.context_tokens} -n 128 --temp 0 -no-cnv -p {json.dumps('Once upon a time')}",
        "```",
        *(
            ["", "Chat:", "", "```", f"llama-cli -m {name} -c {facts.context_tokens}", "```"]
            if facts.chat_template
            else []
        ),
        "",
        "In Python (`pip install llama-cpp-python`):",
        "",
        "```python",
        "from llama_cpp import Llama",
        "",
        f'model = Llama("{name}", n_ctx={facts.context_tokens})',
        'print(model("Once upon a time", max_tokens=128, temperature=0)["choices"][0]["text"])',
        "```",
        "",
        "`sha256sum --check SHA256SUMS` finds damage.",
        *(f"\n{note}" for note in notes),
    ]
    write_text(folder / "README.md", "\n".join(lines) + "\n")
