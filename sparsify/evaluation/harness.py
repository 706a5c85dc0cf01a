"""The model behind lm-evaluation-harness's requests, with activations counted in the same forward passes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

from sparsify.evaluation.subject import Counter, Counts
from sparsify.models import SparseModel


class Chunk(NamedTuple):
    """Outputs of a chunk of requests, and the counts of their forward passes."""

    outputs: list[Any]
    counts: Counts
    truncated_requests: int
    """Requests longer than the context, whose beginning was cut off."""


MAX_GENERATED_TOKENS = 256
"""The default of lm-evaluation-harness; at most half of the context."""
PADDING = 0
"""The token that lm-evaluation-harness pads the right side of shorter rows with."""

_Harness: Any = HFLM  # its decorator hides the class from type checkers


class CountingHFLM(_Harness):
    """Runs requests of lm-evaluation-harness on a model and counts its zeros."""

    def __init__(
        self,
        model: SparseModel,
        tokenizer: PreTrainedTokenizerFast,
        counter: Counter,
        batch_size: int,
    ) -> None:
        # Silences its warning about a model that it did not load itself.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        self._sparse_model, self._counter = model, counter
        self._truncated = 0

    @property
    def max_gen_toks(self) -> int:
        return min(MAX_GENERATED_TOKENS, self.max_length // 2)

    def chunk(self, kind: str, arguments: Sequence[tuple[Any, ...]]) -> Chunk:
        requests = [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]  # pyright: ignore[reportArgumentType]
        self._truncated = 0
        if kind == "generate_until":
            room = self.max_length - self.max_gen_toks
            self._truncated = sum(len(self.tok_encode(given[0])) > room for given in arguments)
        # Only for the harness: our own callers tell the counter themselves which tokens count.
        hook = self._sparse_model.register_forward_pre_hook(self._mask_padding, with_kwargs=True)
        self._counter.begin()
        try:
            outputs = getattr(self, kind)(requests, disable_tqdm=True)
        finally:
            hook.remove()
        plain = [list(output) if isinstance(output, tuple) else output for output in outputs]
        return Chunk(plain, self._counter.taken(), self._truncated)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        # The model reads all tokens but the last, so that a request may have one more than the context.
        self._truncated += sum(len(context) + len(rest) > self.max_length + 1 for _, context, rest in requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _mask_padding(self, _model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tells the counter which tokens of the next forward pass are not padding."""
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        if mask is not None:
            counted = mask[:, -ids.shape[1] :].bool()
            if ids.shape[1] == 1:
                counted = counted & (ids != self.tokenizer.pad_token_id)
        else:
            counted = (ids != PADDING).flip(1).cumsum(1).flip(1) > 0
        self._counter.count(counted)
