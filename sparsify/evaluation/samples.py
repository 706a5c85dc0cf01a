"""Continuations of fixed prompts, so that a person sees what numbers hide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerFast

from sparsify.evaluation.results import Sample
from sparsify.models import SparseModel

REPETITION_PENALTY = 1.1
"""That of the samples that an export's check writes."""


@torch.no_grad()
def samples(
    model: SparseModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], num_tokens: int
) -> list[Sample]:
    """Continues prompts greedily, with a mild penalty on repeating itself: the same weights give the same text."""
    found, writer = [], cast(Any, model)
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        output = writer.generate(
            **inputs,
            max_new_tokens=num_tokens,
            do_sample=False,
            repetition_penalty=REPETITION_PENALTY,
            pad_token_id=tokenizer.eos_token_id,
        )
        written = output[0, inputs["input_ids"].shape[1] :].tolist()
        text = str(tokenizer.decode(written, skip_special_tokens=True))
        found.append(Sample(prompt=prompt, text=text))
    return found
