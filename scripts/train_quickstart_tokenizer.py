"""Trains the SentencePiece tokenizer of the embedded quickstart model on the standard library's own text.

Run: python scripts/train_quickstart_tokenizer.py FOLDER
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from transformers import LlamaTokenizer

from sparsify.mixture.sources.stdlib_text import stdlib_documents

VOCABULARY_TOKENS = 2048
CHAT_SYMBOLS = ["<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MAX_LINE_CHARACTERS = 1000


def training_lines() -> Iterator[str]:
    """Lines of the code and prose sources; instructions are made of the same words."""
    for part in ("code", "prose"):
        for document in stdlib_documents(part):
            for line in (document.text or "").splitlines():
                if line.strip() and len(line) <= MAX_LINE_CHARACTERS:
                    yield line


def main(folder: Path) -> None:
    """Writes tokenizer.model and the files that transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=training_lines(),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY_TOKENS,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n", *CHAT_SYMBOLS],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # repeatable
        minloglevel=1,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "legacy": false, "add_prefix_space": false}\n'
    )
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
