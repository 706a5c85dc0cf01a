"""What the model writes while it trains."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from sparsify.recipe_evaluation import EvalSection
from sparsify.training.compiled import evaluating


@torch.no_grad()
def continue_prompts(
    engine: Any, tokenizer: PreTrainedTokenizerFast, settings: EvalSection
) -> list[str]:
    """Greedy continuations of `eval.sample_prompts` by the live model.

    Every rank calls it with the same prompts. Under ZeRO-3 each forward pass gathers weights from all ranks, so they make the
    same number of passes even where rounding lets one of them end its text before the others.

    Returns:
        The continuation of each prompt, without the prompt.
    """
    prompts = [tokenizer(prompt)["input_ids"] for prompt in settings.sample_prompts]
    length = max(map(len, prompts))
    padding = tokenizer.eos_token_id
    # All prompts at once, padded on the left: a pass under ZeRO-3 costs the same for one as for all of them.
    ids = [[padding] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with evaluating(engine):
        output = engine.module.generate(
            torch.tensor(ids, device=engine.device),
            attention_mask=torch.tensor(mask, device=engine.device),
            do_sample=False,
            max_new_tokens=settings.sample_tokens,
            pad_token_id=padding,
            synced_gpus=engine.zero_optimization_partition_weights(),
        )
    return tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
