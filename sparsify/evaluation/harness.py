"""A model as lm-evaluation-harness asks it, with its activations counted in the same pass.

The journal of a task that is being measured: what the model answered so far, so that nothing is asked twice.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

from sparsify.evaluation.model import Counter, Counts
from sparsify.files import write_text
from sparsify.models import SparseModel


class Chunk(NamedTuple):
    """Some requests, their answers, and what was counted while they were answered."""

    answers: list[Any]
    counts: Counts
    truncated_requests: int
    """Requests whose beginning did not fit into the context."""


class Journal:
    """Appends chunks to a file; a torn last line is read anew.

    Args:
        path: The file.
        identity: Of model and requests. A file of another identity is begun anew.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.chunks: list[Chunk] = []
        head = json.dumps({"identity": identity}) + "\n"
        kept = 0
        if path.is_file():
            with path.open("rb") as file:
                if file.readline() == head.encode():
                    kept = file.tell()
                    for line in file:
                        chunk = _chunk(line)
                        if chunk is None:
                            break
                        self.chunks.append(chunk)
                        kept += len(line)
        if not kept:
            write_text(path, head)
            kept = len(head)
        self._file = path.open("ab")
        self._file.truncate(kept)

    def add(self, chunk: Chunk) -> None:
        """Puts a chunk on the disk."""
        self.chunks.append(chunk)
        self._file.write((json.dumps(list(chunk)) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()


def _chunk(line: bytes) -> Chunk | None:
    try:
        if not line.endswith(b"\n"):
            return None
        answers, counts, truncated_requests = json.loads(line)
        return Chunk(answers, Counts(*counts), truncated_requests)
    except (ValueError, TypeError):
        return None


MAX_GENERATED_TOKENS = 256
"""lm-evaluation-harness's own; less where it would be more than half of the context."""
PADDING = 0
"""The token that lm-evaluation-harness fills the right side of shorter rows with."""

_Harness: Any = HFLM
"""Its decorator hides from type checkers what class it is."""


class MeasuredModel(_Harness):
    """Answers requests, with what was counted while they were answered.

    Args:
        model: A sparse model in evaluation mode.
        tokenizer: Its tokenizer.
        counter: On while the model answers.
        batch_size: Requests of one forward pass.
    """

    def __init__(
        self,
        model: SparseModel,
        tokenizer: PreTrainedTokenizerFast,
        counter: Counter,
        batch_size: int,
    ) -> None:
        # It warns of a model that it did not load itself, which is what we mean to give it.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal"
        )
        self._sparse_model, self._counter = model, counter
        self._truncated = 0

    @property
    def max_gen_toks(self) -> int:
        """Tokens that a request may be answered with."""
        return min(MAX_GENERATED_TOKENS, self.max_length // 2)

    def chunk(self, kind: str, arguments: Sequence[tuple[Any, ...]]) -> Chunk:
        """Answers some requests.

        Args:
            kind: `loglikelihood`, `loglikelihood_rolling` or `generate_until`.
            arguments: Of each request, as lm-evaluation-harness has them.
        """
        requests = [Instance(kind, {}, given, place) for place, given in enumerate(arguments)]  # pyright: ignore[reportArgumentType]
        self._truncated = 0
        if kind == "generate_until":
            room = self.max_length - self.max_gen_toks
            self._truncated = sum(len(self.tok_encode(given[0])) > room for given in arguments)
        # Only here: what else asks the model says itself which tokens count.
        hook = self._sparse_model.register_forward_pre_hook(self._tell_counter, with_kwargs=True)
        self._counter.begin()
        try:
            answers = getattr(self, kind)(requests, disable_tqdm=True)
        finally:
            hook.remove()
        plain = [list(answer) if isinstance(answer, tuple) else answer for answer in answers]
        return Chunk(plain, self._counter.taken(), self._truncated)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        # One token more than the context: the last one is only predicted.
        self._truncated += sum(
            len(context) + len(rest) > self.max_length + 1 for _, context, rest in requests
        )
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _tell_counter(self, _model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Which tokens of the coming pass are text and not padding."""
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        if mask is not None:
            counted = mask[:, -ids.shape[1] :].bool()
            if ids.shape[1] == 1:
                counted = counted & (ids != self.tokenizer.pad_token_id)
        else:
            counted = (ids != PADDING).flip(1).cumsum(1).flip(1) > 0
        self._counter.count(counted)
