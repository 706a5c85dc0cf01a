"""The model of one process, and everything that it can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from transformers import PreTrainedTokenizerFast

from sparsify.evaluation.counting import Counter, Counts
from sparsify.evaluation.harness import MeasuredModel
from sparsify.evaluation.journal import Chunk
from sparsify.evaluation.results import Sample
from sparsify.evaluation.scores import Score
from sparsify.mixture.windows import Window, collate
from sparsify.models import SparseModel
from sparsify.predictors import Predictors
from sparsify.sparsity.measure import IGNORED_LABEL, summed_loss

REPETITION_PENALTY = 1.1
"""Of samples; that of the ones that an export's check writes."""


class Measurer:
    """Context manager around a model that answers.

    Args:
        model: A sparse model in evaluation mode.
        tokenizer: Its tokenizer.
        batch_size: Requests of one forward pass.
        predictors: Of the model; every pass is then masked by them.
    """

    def __init__(
        self,
        model: SparseModel,
        tokenizer: PreTrainedTokenizerFast,
        batch_size: int,
        predictors: Predictors | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._counter = Counter(model, predictors)
        self._harness = MeasuredModel(model, tokenizer, self._counter, batch_size)

    def __enter__(self) -> Self:
        self._counter.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._counter.__exit__()

    @torch.no_grad()
    def chunk(self, kind: str, arguments: Sequence[tuple[Any, ...]]) -> Chunk:
        """Answers requests of lm-evaluation-harness."""
        return self._harness.chunk(kind, arguments)

    @torch.no_grad()
    def window(self, window: Window) -> tuple[Score, Counts]:
        """Negative log-likelihood of a window of text, and its number of labels."""
        batch = {key: value.to(self._model.device) for key, value in collate([window]).items()}
        self._counter.begin()
        loss = float(summed_loss(self._model, batch))
        labels = float((batch["labels"] != IGNORED_LABEL).sum())
        return Score(loss, labels), self._counter.taken()

    @torch.no_grad()
    def sample(self, prompt: str, num_tokens: int) -> Sample:
        """Goes on from a prompt greedily, with a mild penalty on repeating itself: the same weights give the same text."""
        inputs = self._tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        inputs = {key: value.to(self._model.device) for key, value in inputs.items()}
        output = cast(Any, self._model).generate(
            **inputs,
            max_new_tokens=num_tokens,
            do_sample=False,
            repetition_penalty=REPETITION_PENALTY,
            pad_token_id=self._tokenizer.eos_token_id,
        )
        written = output[0, inputs["input_ids"].shape[1] :].tolist()
        return Sample(
            prompt=prompt, text=str(self._tokenizer.decode(written, skip_special_tokens=True))
        )
