"""`sparsify generate`: continues a prompt by sparse decoding, and measures the bytes read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, TextStreamer

from sparsify.errors import RunError
from sparsify.predictors import read_predictors
from sparsify.runs.load import load
from sparsify.runtime import Acceleration, accelerate
from sparsify.runtime.accelerate import ModelBytes, block_format, model_bytes

Write = Callable[[str], None]


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
) -> Generated:
    """Continues a prompt, and calls `write` with each piece of the text; temperature 0 takes the most likely token.
    Raises ModelError if the model has nothing to skip, RunError if a number is out of range.
    """
    _check(num_tokens, temperature, threads)
    _check_dense(dense, weights, predictors)
    loaded = load(model_or_run)
    if threads is not None:
        torch.set_num_threads(threads)
    model: Any = loaded.model
    own = None
    if predictors is not None:
        own = read_predictors(predictors).for_decoding(model, str(predictors))
    acceleration = None if dense else accelerate(model, weights=weights, predictors=own, keep_weights=False)
    streamer = _Streamer(loaded.tokenizer, acceleration, write)
    inputs = loaded.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
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
        pad_token_id=loaded.tokenizer.eos_token_id,
        streamer=streamer,
    )
    decoded = output.shape[1] - prompt_tokens - 1
    seconds = streamer.last_seconds - streamer.first_seconds
    return Generated(
        model=loaded.name,
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
