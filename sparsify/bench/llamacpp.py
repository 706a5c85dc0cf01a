"""llama.cpp as the baseline of decoding: the dense model of the same weights, in a file of the same bits."""

from __future__ import annotations

import copy
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gguf import TokenType

from sparsify.errors import ExportError, RunError
from sparsify.export.gguf_tokens import Tokens
from sparsify.export.llamacpp.model_file import Facts, write_gguf
from sparsify.export.llamacpp.rules import check_holdable
from sparsify.export.weight_shards import stock_reader
from sparsify.models.masking import experts_per_token, num_experts

FILE_TYPES = {
    ("stored", torch.float32): "fp32",
    ("stored", torch.bfloat16): "fp16",
    ("stored", torch.float16): "fp16",
    ("int8", None): "q8_0",
    ("int4", None): "q4_0",
}
"""Type of llama.cpp's weights for a format of ours: of as many bits. Its F16 kernels are faster than those for bf16."""


def missing(model: Any, weights: str) -> str | None:
    """Why llama.cpp cannot be measured; None if it can."""
    if find_spec("llama_cpp") is None:
        return "it is not installed (pip install 'sparsify-lm[llamacpp]')"
    try:
        check_holdable(_dense(model.config), file_type(weights, next(model.parameters()).dtype), None)
    except ExportError as error:
        return str(error)
    return None


def _dense(config: Any) -> Any:
    """The configuration of the dense model of the same shape."""
    config = copy.deepcopy(config)
    config.ffn_activation, config.sparsification = "swiglu", None
    return config


def file_type(weights: str, dtype: torch.dtype) -> str:
    """llama.cpp's type for weights that we read in a format."""
    return FILE_TYPES[weights, dtype if weights == "stored" else None]


class LlamaCpp:
    """A model in llama.cpp, with silu in place of its activation: every row counts, so the time is that of any dense model.

    Args:
        model: A Sparse Mistral or Mixtral.
        weights: How our kernels read its weights: stored, int8 or int4.
        threads: Threads of llama.cpp.
        context_tokens: Room of its cache.
        folder: Where the file is written; the caller removes it.

    Raises:
        RunError: If llama.cpp does not load the file.

    Attributes:
        bytes_read: Bytes that a token reads: the file without the input embedding, and without experts that it is not routed to.
    """

    def __init__(self, model: Any, weights: str, threads: int, context_tokens: int, folder: Path) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]  (an extra)

        dtype = next(model.parameters()).dtype
        config = _dense(model.config)
        path = folder / "dense.gguf"
        facts = Facts("dense baseline", file_type(weights, dtype), context_tokens, 2, None, None, None)
        read = stock_reader(dict(model.named_parameters()), config, dtype)
        write_gguf(path, config, read, _tokens(config.vocab_size), facts)
        try:
            self._engine = llama_cpp.Llama(
                str(path), n_ctx=context_tokens, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
            )
        except ValueError as error:
            raise RunError(f"llama.cpp does not load the dense baseline: {error}") from None
        embedding = model.get_input_embeddings().weight
        tied = model.get_output_embeddings().weight is embedding
        bits = {"fp32": 32, "fp16": 16, "q8_0": 8.5, "q4_0": 4.5}[facts.dtype]
        experts = num_experts(config)
        unread = 1 - experts_per_token(config) / experts
        values = sum(one.numel() for block in model.ffn_blocks() for one in block.parameters()) * unread
        self.bytes_read = path.stat().st_size - (values + (0 if tied else embedding.numel())) * bits / 8

    def close(self) -> None:
        """Frees the engine's memory."""
        self._engine.close()

    def decode(self, ids: torch.Tensor, decode_tokens: int, warm_up: int) -> tuple[float, float]:
        """Seconds for the prompt, and for one of the last tokens of `ids` [1, tokens], fed one by one after `warm_up`."""
        tokens = ids[0].tolist()
        self._engine.reset()
        start = time.perf_counter()
        self._engine.eval(tokens[:-decode_tokens])
        prompt_seconds = time.perf_counter() - start
        for token in tokens[-decode_tokens:][:warm_up]:
            self._engine.eval([token])
        start = time.perf_counter()
        rest = tokens[-decode_tokens:][warm_up:]
        for token in rest:
            self._engine.eval([token])
        return prompt_seconds, (time.perf_counter() - start) / len(rest)


def _tokens(count: int) -> Tokens:
    """A vocabulary of so many tokens: the benchmark feeds ids."""
    return Tokens(
        model="llama",
        pre=None,
        texts=[f"<{index}>" for index in range(count)],
        scores=[-float(index) for index in range(count)],
        types=[int(TokenType.NORMAL)] * count,
        merges=[],
        adds_space=False,
        bos=None,
        adds_bos=False,
        notes=[],
    )
