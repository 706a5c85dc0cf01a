"""The layout that PowerInfer's own convert.py takes: a Hugging Face folder, and a folder of predictors."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from sparsify.export.powerinfer.gguf import Facts, rope_theta
from sparsify.export.powerinfer.vocabulary import PIECES_FILE, Vocabulary
from sparsify.files import write_json
from sparsify.models import SparseMistralForCausalLM
from sparsify.predictors import BlockPredictor

SHARD_BYTES = "5GB"


def write_layout(
    folder: Path,
    model: SparseMistralForCausalLM,
    predictors: list[BlockPredictor],
    vocabulary: Vocabulary,
    facts: Facts,
    tokenizer_folder: Path,
) -> None:
    """Writes `model/` and `predictor/` into a folder.

    convert.py refuses a tensor that it does not know, so the predictors stand apart; it picks the architecture by `model_type`
    and reads rope_theta at the top level, where transformers of today does not write it.

    Args:
        folder: That holds both.
        model: The model.
        predictors: Of every layer, for the residual.
        vocabulary: A token for every row of the embedding.
        facts: As for the GGUF.
        tokenizer_folder: Folder with tokenizer.model.
    """
    (folder / "model").mkdir(parents=True)
    weights = {
        name: parameter.detach().to(torch.float16).contiguous().clone()
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    save_torch_state_dict(weights, folder / "model", max_shard_size=SHARD_BYTES)
    write_json(folder / "model" / "config.json", _config(model, facts))
    shutil.copyfile(tokenizer_folder / PIECES_FILE, folder / "model" / PIECES_FILE)
    if vocabulary.added:
        write_json(folder / "model" / "added_tokens.json", vocabulary.added)
    (folder / "predictor").mkdir()
    for index, predictor in enumerate(predictors):
        # Contiguous tensors of their own: convert.py's reader of pickles takes no views.
        matrices = {
            "fc1.weight": predictor.A.half().contiguous().clone(),
            "fc2.weight": predictor.B.half().contiguous().clone(),
        }
        torch.save(matrices, folder / "predictor" / f"model_{index}.pt")
    write_json(folder / "predictor" / "config.json", {"sparse_threshold": facts.threshold})


def _config(model: SparseMistralForCausalLM, facts: Facts) -> dict[str, object]:
    config = model.config
    return {
        "model_type": "bamboo",
        "architectures": ["BambooForCausalLM"],
        "hidden_act": "relu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": facts.context_tokens,
        "rope_theta": rope_theta(model),
        "tie_word_embeddings": False,
        "bos_token_id": facts.bos,
        "eos_token_id": facts.eos,
        "torch_dtype": "float16",
    }
