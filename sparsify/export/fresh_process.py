"""Loads a bundle offline with transformers alone.

Run by `sparsify.export.check` as `python -I fresh_process.py REQUEST RESULT`; imports nothing of this package.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main(request_path: str, result_path: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    request = json.loads(Path(request_path).read_text())
    bundle = request["bundle"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        bundle, trust_remote_code=True, use_safetensors=True, dtype="auto", output_loading_info=True
    )
    model, info = loaded
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(bundle, trust_remote_code=False)
    result = {
        "loading": {key: sorted(map(str, value)) for key, value in info.items()},
        "model_class": f"{type(model).__module__}.{type(model).__name__}",
        "foreign_modules": sorted(name for name in sys.modules if name.split(".")[0] == "sparsify"),
        "ffn_activation": model.config.ffn_activation,
        "samples": [sample(model, tokenizer, prompt, request["sample_tokens"]) for prompt in request["prompts"]],
    }
    if request["reference"]:
        reference = load_file(request["reference"])
        counts = count_zeros(model)
        with torch.no_grad():
            logits = model(input_ids=reference["input_ids"], use_cache=False).logits.float()
        result["zeros"] = counts["zeros"] / counts["values"]
        result["reference_tokens"] = reference["input_ids"].numel()
        result["logits_difference"] = float((logits - reference["logits"]).abs().max())
        result["logits_largest"] = float(reference["logits"].abs().max())
    Path(result_path).write_text(json.dumps(result))


def count_zeros(model: Any) -> dict[str, int]:
    """Registers hooks that count values and exact zeros of every activation."""
    counts = {"values": 0, "zeros": 0}

    def count(module: Any, args: Any, output: torch.Tensor) -> None:
        counts["values"] += output.numel()
        counts["zeros"] += int((output == 0).sum())

    for module in model.modules():
        if type(module).__name__ == "FfnActivation":
            module.register_forward_hook(count)
    return counts


def sample(model: Any, tokenizer: Any, prompt: str, sample_tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] > 1 and inputs["input_ids"][0, -1] == tokenizer.eos_token_id:
        # A tokenizer that appends </s> would end the prompt, and the model would begin another document.
        inputs = {name: value[:, :-1] for name, value in inputs.items()}
    output = model.generate(
        **inputs,
        max_new_tokens=sample_tokens,
        do_sample=False,
        repetition_penalty=1.1,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
