"""What a source's tokens depend on, in one short hash: the name of its folder in the token cache."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from sparsify.mixture.cleaning.decontaminate import decontamination_fingerprint
from sparsify.mixture.sources.source_files import SourceFile, source_files
from sparsify.mixture.sources.stdlib_text import module_paths
from sparsify.mixture.tokens.chat import chat_template_text
from sparsify.mixture.tokens.encoder import Tokenizer, tokenizer_fingerprint
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.source import SourceSection

FORMAT_VERSION = 3
"""Raised when the same source would be read or laid out differently than before."""

NOT_READING = ("token_share", "files", "token_files", "max_epochs", "when_exhausted")
"""Settings of a source that change nothing in how it is read; the files themselves are looked at."""


def source_fingerprint(
    name: str,
    source: SourceSection,
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    files: Sequence[SourceFile] | None = None,
) -> str:
    """Hash of a source's specification and content, the tokenizer, the loss mask and the held-out split.

    Its share is left out: changing a ratio never tokenises anything again.

    Args:
        name: The source's name in its mixture.
        source: The source.
        mixture: Gives the held-out fraction, the chat template and which instruction tokens carry loss.
        tokenizer: A fast Hugging Face tokenizer.
        files: What `source_files` found; looked for again unless given. Give the same to `read_documents`, which
            then notices when a file changes in between.

    Raises:
        MixtureError: If a file of the source is missing.
    """
    specification = asdict(source)
    for key in NOT_READING:
        del specification[key]
    instruction = source.group == "instruction"
    parts = {
        "format": FORMAT_VERSION,
        "source": specification,
        "content": _content(name, source, files),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "instruction_loss": mixture.instruction_loss if instruction else None,
        "chat_template": chat_template_text(mixture.chat_template, tokenizer)
        if instruction
        else None,
        "validation_fraction": mixture.validation_fraction,
        "remove_duplicates": mixture.remove_duplicates,
        "decontaminate_against": decontamination_fingerprint(mixture),
    }
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _content(
    name: str, source: SourceSection, files: Sequence[SourceFile] | None
) -> list[list[str | int]]:
    """Paths, sizes and times instead of the text itself: reading a terabyte to find it unchanged helps nobody."""
    if source.stdlib is not None:
        sizes = [[module, path.stat().st_size] for module, path in module_paths()]
        return [[sys.version], *sizes]
    if source.hub is not None:
        return []
    found = source_files(name, source) if files is None else files
    return [[str(file.path.resolve()), file.num_bytes, file.modified_ns] for file in found]
