"""Small models and tokenizers for the tests of the export to llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from sparsify.conversion.sparse_folder import write_config
from sparsify.conversion.tokenizer import copy_tokenizer, load_tokenizer, save_tokenizer
from sparsify.export.gguf_pre_tokenizers import PRE_TOKENIZERS
from sparsify.models import FAMILIES, SparseMistralConfig, SparseMixtralConfig
from tests.conftest import SHAPE, TOKENIZER

SIZES = SHAPE | {"sliding_window": None, "initializer_range": 0.2}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROPE: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"ffn_activation": "swiglu"},
    "tied": {"ffn_activation": "swiglu", "tie_word_embeddings": True, "vocab_size": 2050},
    "wide heads": {"ffn_activation": "swiglu", "head_dim": 16, "rms_norm_eps": 1e-3},
    "mixtral": {"ffn_activation": "swiglu"} | MIXTURE,
    "reglu": {"ffn_activation": "reglu"},
    "tied reglu": {"ffn_activation": "reglu", "tie_word_embeddings": True, "head_dim": 16},
    "linear": {"ffn_activation": "swiglu", "rope_parameters": ROPE["linear"]},
    "yarn": {"ffn_activation": "swiglu", "rope_parameters": ROPE["yarn"]},
    "llama3": {"ffn_activation": "swiglu", "rope_parameters": ROPE["llama3"]},
    "linear reglu": {"ffn_activation": "reglu", "rope_parameters": ROPE["linear"]},
    "yarn reglu": {"ffn_activation": "reglu", "rope_parameters": ROPE["yarn"]},
}


def config_of(name: str, **more: Any) -> SparseMistralConfig | SparseMixtralConfig:
    fields = SIZES | MODELS[name] | more
    return (SparseMixtralConfig if "num_local_experts" in fields else SparseMistralConfig)(**fields)


def written_model(folder: Path, name: str, **more: Any) -> Any:
    """A model whose weights bf16 holds, saved with the quickstart's tokenizer."""
    torch.manual_seed(0)
    config = config_of(name, **more)
    model = FAMILIES[config.model_type].model(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    write_config(model.config, folder, torch.float32)
    copy_tokenizer(TOKENIZER, folder)
    return model


TEXTS = (
    "Once upon a time there were 1234567 words, weren't there?",
    "two  spaces\n\n\nand\ttabs   \n  indented: x = [1, 2]; y=3.14\r\n",
    " leading and trailing ",
    "I'LL you'll WE'RE don't 'tis Camel2Case snake_case HTTPServer",
    "ünïcödé 世界 日本語テスト 한국어 emoji 😀😀 \u00a0 nbsp e\u0301",
    "<s>[INST] special</s>\n<|user|>\nhi there<|end|>\n<|assistant|> sure",
    "a/b//c /path/to ...!!! (x)[y]{z} #tag @me\n/slash\n",
    "١٢٣ ½ ² 12 34\u2028line",
    "",
)
"""What tokenizers split in different ways."""


def byte_level(name: str, *, bos: bool = True, ignore_merges: bool | None = None) -> PreTrainedTokenizerFast:
    """A small byte-level BPE with this pre-tokenizer, whose merges cross the borders of every pre-tokenizer's words."""
    known = PRE_TOKENIZERS[name]
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    own.train_from_iterator([text for text in TEXTS if text] * 4, trainer)
    content = json.loads(own.to_str())
    steps = [json.loads(step) for step in known.steps]
    for step in steps:
        if step["type"] == "ByteLevel":
            step["trim_offsets"] = True
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    content["model"]["ignore_merges"] = known.whole_words if ignore_merges is None else ignore_merges
    own = Tokenizer.from_str(json.dumps(content))
    own.decoder = decoders.ByteLevel()
    own.add_tokens([AddedToken("[INST]", special=False, normalized=False)])
    if bos:
        own.post_processor = processors.TemplateProcessing(
            single=["<s>", "$A"], pair=["<s>", "$A", "<s>", "$B"], special_tokens=[("<s>", own.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>")


SPACES: dict[str, dict[str, Any]] = {
    "none": {},
    "prepended": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
    },
    "always": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}},
    "first": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}},
}
"""How SentencePiece tokenizers say where a space is put before a text."""


def sentence_piece(spaces: str, **more: Any) -> PreTrainedTokenizerFast:
    """The quickstart's tokenizer with another rule of spaces, and other fields of its tokenizer.json."""
    base = load_tokenizer(TOKENIZER)
    content = json.loads(base.backend_tokenizer.to_str()) | SPACES[spaces] | more
    own = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def with_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Replaces the tokenizer of a model's folder."""
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    save_tokenizer(tokenizer, folder)
    return folder
