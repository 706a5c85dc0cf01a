"""The tokenizer of a folder, as prompts see it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from sparsify.conversion.tokenizer import copy_tokenizer, load_tokenizer
from tests.conftest import TOKENIZER


@pytest.mark.parametrize(("single", "begins"), [("<s> $A </s>", [1]), ("$A </s>", []), ("<s> $A", [1])])
def test_a_prompt_never_ends_in_the_end_token(single: str, begins: list[int], tmp_path: Path) -> None:
    copy_tokenizer(TOKENIZER, tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])  # pyright: ignore[reportAttributeAccessIssue]
    backend.save(str(tmp_path / "tokenizer.json"))
    # transformers' class for Llama would write a post-processor of its own.
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace("LlamaTokenizer", "TokenizersBackend"))
    tokenizer = load_tokenizer(tmp_path)
    text = "the model reads"
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer(text)["input_ids"] == begins + plain
    assert tokenizer([text, ""])["input_ids"] == [begins + plain, begins]
