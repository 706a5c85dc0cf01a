"""`sparsify generate`: continues a prompt by sparse decoding, and measures the bytes read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, TextStreamer

from sparsify.conversion.source_checkpoint import locate
from sparsify.conversion.tokenizer import check_tokenizer, load_tokenizer
from sparsify.errors import RunError
from sparsify.metadata import user_path
from sparsify.predictors import read_predictors
from sparsify.predictors.format import fingerprinted
from sparsify.runs.load import find_trained, load
from sparsify.runtime import Acceleration, accelerate
from sparsify.runtime.accelerate import ModelBytes, block_format, model_bytes
from sparsify.runtime.offload import parse_memory, peak_rss_bytes
from sparsify.runtime.prefetch import Prefetch
from sparsify.runtime.stored_weights import StoredModel

Write = Callable[[str], None]


@dataclass(frozen=True)
class Offload:
    """What decoding within a limit on memory took; counts are of decoding alone, without the prompt.

    Attributes:
        memory_bytes: The limit.
        peak_bytes: Most memory that the process has had.
        neuron_file: Where the neurons are.
        direct: Whether reads went past the page cache.
        neuron_bytes: Memory of neurons: rows that are held for good, and slots.
        held_share: Share of the rows that every step reads which are held for good.
        slots: Units of neurons that memory has room for.
        hit_rate: Share of the neurons needed that were in memory.
        over_fetch: Neurons read ahead and not needed, for each one that was needed.
        read_bytes_per_token: Bytes read from the file.
        stall_bytes_per_token: Bytes of neurons that were not requested before they were needed.
        wait_ms_per_token: Milliseconds for which steps waited for reads.
        ms_per_token: Milliseconds of a step.
    """

    memory_bytes: int
    peak_bytes: int
    neuron_file: str
    direct: bool
    policy: str
    prefetch: str
    neuron_bytes: int
    held_share: float
    slots: int
    hit_rate: float
    over_fetch: float
    read_bytes_per_token: float
    stall_bytes_per_token: float
    wait_ms_per_token: float
    ms_per_token: float


@dataclass(frozen=True)
class Generated:
    """A continuation, and what decoding it took. Shares and bytes are of decoding alone, without the prompt.

    Attributes:
        weights: How decoding read the weights: stored, int8 or int4.
        kept_bytes: Memory of int8 or int4 blocks, which are held instead of the stored weights.
        fired_share: Share of the neurons whose product was kept for a token, over all layers; None if dense.
        touched_share: Share of the bytes of the three projections that were read; None if dense.
        ffn_bytes_per_token: Bytes read of the feed-forward weights, predictors included.
        other_bytes_per_token: Bytes of the other weights; the cache and the input embedding are not counted.
        dense_ffn_bytes_per_token: Bytes that the stored feed-forward blocks have.
        dense_other_bytes_per_token: Bytes of the other weights as stored.
        offload: What decoding within a limit on memory took; None without a limit.
    """

    model: str
    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    tokens_per_second: float | None
    weights: str
    backend: str
    kept_bytes: int
    fired_share: float | None
    touched_share: float | None
    ffn_bytes_per_token: float
    other_bytes_per_token: float
    dense_ffn_bytes_per_token: float
    dense_other_bytes_per_token: float
    offload: Offload | None = None


@dataclass(frozen=True)
class MemoryLimit:
    """How to decode within a limit on memory.

    Attributes:
        memory: The limit, such as "4GB".
        policy: Which neurons stay in memory.
        prefetch: Which are read before they are needed.
        tell: Gets a line of text while the file of neurons is written.
        gamma: Of masks that choose inputs; see `accelerate`.
    """

    memory: str
    policy: str = "lru"
    prefetch: Prefetch = "none"
    tell: Write = lambda _: None
    gamma: float = 1.0


def generate(
    model_or_run: str,
    prompt: str,
    *,
    num_tokens: int,
    temperature: float,
    seed: int,
    weights: str,
    predictors: Path | None,
    threads: int | None,
    dense: bool,
    write: Write,
    limit: MemoryLimit | None = None,
) -> Generated:
    """Continues a prompt, and calls `write` with each piece of the text; temperature 0 takes the most likely token.
    Raises ModelError if the model has nothing to skip, RunError if a number is out of range or the memory too small.
    """
    _check(num_tokens, temperature, threads)
    _check_dense(dense, "stored" if limit is not None else weights, predictors)  # rows in blocks can be read in full
    if threads is not None:
        torch.set_num_threads(threads)
    if limit is None:
        loaded = load(model_or_run)
        model: Any = loaded.model
        tokenizer = loaded.tokenizer
        own = None
        if predictors is not None:
            own = read_predictors(predictors).for_decoding(model, str(predictors))
        acceleration = None if dense else accelerate(model, weights=weights, predictors=own, keep_weights=False)
    else:
        tokenizer, acceleration = _within(
            limit, model_or_run, prompt, num_tokens, weights=weights, predictors=predictors, dense=dense
        )
        model = acceleration.model
    streamer = _Streamer(tokenizer, acceleration, write)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    prompt_tokens, context = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    if not prompt_tokens:
        raise RunError("The prompt has no tokens.", next_step="Give some text to continue.")
    if prompt_tokens >= context:
        raise RunError(
            f"The prompt has {prompt_tokens:,} tokens.",
            allowed=f"Fewer than the model's context, {context:,} tokens.",
            next_step="Give a shorter text to continue.",
        )
    torch.manual_seed(seed)
    start = time.perf_counter()
    output = model.generate(
        **inputs,
        max_new_tokens=min(num_tokens, context - prompt_tokens),
        do_sample=temperature > 0,
        **({"temperature": temperature} if temperature > 0 else {}),
        pad_token_id=tokenizer.eos_token_id,
        streamer=streamer,
    )
    decoded = output.shape[1] - prompt_tokens - 1
    seconds = streamer.last_seconds - streamer.first_seconds
    return Generated(
        model=model_or_run,
        prompt=prompt,
        text=streamer.text,
        prompt_tokens=prompt_tokens,
        new_tokens=decoded + 1,
        prompt_seconds=streamer.first_seconds - start,
        tokens_per_second=decoded / seconds if decoded and seconds else None,
        weights=weights,
        backend="dense" if acceleration is None else acceleration.backend,
        kept_bytes=0 if acceleration is None else acceleration.kept_bytes,
        **_reads(acceleration, model_bytes(model)),
        offload=None if limit is None or acceleration is None else _offload(limit, acceleration, decoded, seconds),
    )


def _within(
    limit: MemoryLimit, source: str, prompt: str, num_tokens: int, *, weights: str, predictors: Path | None, dense: bool
) -> tuple[PreTrainedTokenizerFast, Acceleration]:
    """The tokenizer of a folder, and its model within a limit on memory."""
    memory = parse_memory(limit.memory)
    if find_trained(user_path(source)) is not None:
        raise RunError(
            f"{source} is a run: its checkpoint is loaded whole, so --memory cannot keep a limit.",
            next_step=f"Export it first: sparsify export {source}",
        )
    folder = locate(source)
    tokenizer = load_tokenizer(folder)

    def made(model: Any, stored: StoredModel) -> Any:
        assert predictors is not None
        layers, block = range(model.config.num_hidden_layers), model.ffn_blocks()[0]
        chosen = fingerprinted(
            (block.gate_up_proj if hasattr(block, "gate_up_proj") else block.gate_proj.weight).numel()
        )
        values = (stored.gate_values(layer, chosen) for layer in layers)
        return read_predictors(predictors).for_decoding(model, str(predictors), values)

    tokens = len(tokenizer(prompt)["input_ids"])
    acceleration = accelerate(
        folder,
        weights=weights,
        predictors=None if predictors is None else made,
        dense=dense,
        memory=memory,
        policy=limit.policy,
        prefetch=limit.prefetch,
        gamma=limit.gamma,
        context_tokens=tokens + num_tokens,
        tell=limit.tell,
    )
    check_tokenizer(tokenizer, acceleration.model.config, source)
    return tokenizer, acceleration


def _offload(limit: MemoryLimit, acceleration: Acceleration, tokens: int, seconds: float) -> Offload:
    offloaded, reads = acceleration.offloaded, acceleration.neurons
    assert offloaded is not None
    assert reads is not None
    cache, steps = offloaded.cache, max(tokens, 1)
    return Offload(
        memory_bytes=offloaded.limits.memory_bytes,
        peak_bytes=peak_rss_bytes(),
        neuron_file=str(cache.file.path),
        direct=cache.file.direct,
        policy=limit.policy,
        prefetch=limit.prefetch,
        neuron_bytes=cache.neuron_bytes,
        held_share=cache.held_share,
        slots=cache.slots,
        hit_rate=reads.hit_rate,
        over_fetch=reads.over_fetched / max(reads.needed, 1),
        read_bytes_per_token=reads.bytes_read / steps,
        stall_bytes_per_token=reads.stall_bytes / steps,
        wait_ms_per_token=1e3 * reads.wait_seconds / steps,
        ms_per_token=1e3 * seconds / steps,
    )


def _check(num_tokens: int, temperature: float, threads: int | None) -> None:
    for option, value, least in (
        ("--tokens", num_tokens, 1),
        ("--temperature", temperature, 0),
        ("--threads", threads, 1),
    ):
        if value is not None and value < least:
            raise RunError(f"{option} is {value}.", allowed=f"{least} or more.")


def _check_dense(dense: bool, weights: str, predictors: Path | None) -> None:
    in_blocks = block_format(weights) is not None
    unused = [name for name, given in (("--predictors", predictors), ("--weights", in_blocks)) if given]
    if dense and unused:
        raise RunError(
            f"--dense reads everything as it is stored, so {' and '.join(unused)} would change nothing.",
            next_step="Omit --dense, or the others.",
        )


def _reads(acceleration: Acceleration | None, size: ModelBytes) -> dict[str, Any]:
    given = {
        "other_bytes_per_token": size.other if acceleration is None else acceleration.other_bytes,
        "dense_ffn_bytes_per_token": size.ffn_per_token,
        "dense_other_bytes_per_token": size.other,
    }
    reads = [] if acceleration is None else acceleration.reads
    tokens = reads[0].tokens if reads else 0
    if not tokens:
        return given | {
            "ffn_bytes_per_token": size.ffn_per_token,
            "fired_share": None,
            "touched_share": None,
        }
    offered = sum(one.offered for one in reads)
    return given | {
        "ffn_bytes_per_token": sum(one.bytes_read for one in reads) / tokens,
        "fired_share": sum(one.rows.down for one in reads) / offered,
        "touched_share": sum(one.touched_share * one.offered for one in reads) / offered,
    }


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerFast, acceleration: Acceleration | None, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
        self._acceleration, self._write = acceleration, write
        self._puts = 0
        self.text = ""
        self.first_seconds = self.last_seconds = 0.0

    def put(self, value: torch.Tensor) -> None:
        self._puts += 1
        self.last_seconds = time.perf_counter()
        if self._puts == 2:  # the first is the prompt, the second the token that it gave
            self.first_seconds = self.last_seconds
            if self._acceleration is not None:
                self._acceleration.reset()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self._write(text)
