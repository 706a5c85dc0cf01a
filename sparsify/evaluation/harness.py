"""A model as lm-evaluation-harness asks it, with its activations counted in the same pass."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

from sparsify.evaluation.journal import Chunk, Journal
from sparsify.models import SparseModel
from sparsify.sparsity.probe import SparsityProbe

CHUNK_REQUESTS = {"loglikelihood": 64, "loglikelihood_rolling": 2, "generate_until": 16}
"""Requests that are answered before the journal is written: what a killed evaluation loses at most."""
MAX_GENERATED_TOKENS = 256
"""lm-evaluation-harness's own; less where it would be more than half of the context."""
PADDING = 0
"""The token that lm-evaluation-harness fills the right side of shorter rows with."""

_Harness: Any = HFLM
"""Its decorator hides from type checkers what class it is."""

Progress = Callable[[int, int], None]


class Counted(NamedTuple):
    """What was counted while one task was measured."""

    totals: torch.Tensor
    """int64 [4]: values computed, and those of gate, up and product that were not zero."""
    tokens: int
    truncated_requests: int
    """Requests whose beginning did not fit into the context."""
    seconds: float


class MeasuredModel(_Harness):
    """Answers requests in chunks that go to a journal, each with its counts.

    Args:
        model: A sparse model; it is left in evaluation mode.
        tokenizer: Its tokenizer.
        probe: On while the model answers.
        batch_size: Requests of one forward pass.
    """

    def __init__(
        self,
        model: SparseModel,
        tokenizer: PreTrainedTokenizerFast,
        probe: SparsityProbe,
        batch_size: int,
    ) -> None:
        # It warns of a model that it did not load itself, which is what we mean to give it.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal"
        )
        self._probe = probe
        self._journal: tuple[Path, str, Progress] | None = None
        self._counted: list[Chunk] = []
        self._truncated = 0
        self._hook = model.register_forward_pre_hook(self._tell_probe, with_kwargs=True)

    def close(self) -> None:
        """Takes its hook off the model."""
        self._hook.remove()

    @property
    def max_gen_toks(self) -> int:
        """Tokens that a request may be answered with."""
        return min(MAX_GENERATED_TOKENS, self.max_length // 2)

    def begin(self, journal: Path, identity: str, on_progress: Progress) -> None:
        """A task begins: its answers go to, or come from, this journal."""
        self._journal = (journal, identity, on_progress)
        self._counted = []

    def counted(self) -> Counted:
        """What was counted since the task began, in earlier launches too."""
        totals = torch.tensor([chunk.totals for chunk in self._counted], dtype=torch.int64)
        return Counted(
            totals.reshape(-1, 4).sum(0),
            sum(chunk.tokens for chunk in self._counted),
            sum(chunk.truncated_requests for chunk in self._counted),
            sum(chunk.seconds for chunk in self._counted),
        )

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the most likely one."""
        answers = self._answer("loglikelihood", super().loglikelihood, requests)
        return [(float(log_likelihood), bool(greedy)) for log_likelihood, greedy in answers]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts."""
        return self._answer("loglikelihood_rolling", super().loglikelihood_rolling, requests)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop."""
        return self._answer("generate_until", super().generate_until, requests)

    def _answer(self, kind: str, ask: Callable[..., list[Any]], requests: Any) -> list[Any]:
        assert self._journal is not None, "begin() comes first"
        path, identity, on_progress = self._journal
        asked = hashlib.blake2b(identity.encode(), digest_size=16)
        for request in requests:
            asked.update(repr(request.args).encode())
        journal = Journal(path.with_name(f"{path.name}.{kind}.jsonl"), asked.hexdigest())
        answers = [answer for chunk in journal.chunks for answer in chunk.answers]
        try:
            while len(answers) < len(requests):
                on_progress(len(answers), len(requests))
                some = requests[len(answers) : len(answers) + CHUNK_REQUESTS[kind]]
                journal.add(self._chunk(kind, ask, some))
                answers += journal.chunks[-1].answers
        finally:
            journal.close()
        on_progress(len(answers), len(requests))
        self._counted += journal.chunks
        return answers

    def _chunk(self, kind: str, ask: Callable[..., list[Any]], requests: Any) -> Chunk:
        before, started = self._probe.layer_totals().sum(0), time.perf_counter()
        tokens, self._truncated = self._probe.num_tokens, 0
        if kind == "generate_until":
            room = self.max_length - self.max_gen_toks
            self._truncated = sum(
                len(self.tok_encode(request.args[0])) > room for request in requests
            )
        answers = ask(requests, disable_tqdm=True)
        totals = self._probe.layer_totals().sum(0) - before
        return Chunk(
            [list(answer) if isinstance(answer, tuple) else answer for answer in answers],
            totals.tolist(),
            self._probe.num_tokens - tokens,
            self._truncated,
            time.perf_counter() - started,
        )

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        # One token more than the context: the last one is only predicted.
        self._truncated += sum(
            len(context) + len(rest) > self.max_length + 1 for _, context, rest in requests
        )
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _tell_probe(self, _model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Which tokens of the coming pass are text and not padding."""
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        if mask is not None:
            counted = mask[:, -ids.shape[1] :].bool()
            if ids.shape[1] == 1:
                counted = counted & (ids != self.tokenizer.pad_token_id)
        else:
            counted = (ids != PADDING).flip(1).cumsum(1).flip(1) > 0
        self._probe.count(counted)
