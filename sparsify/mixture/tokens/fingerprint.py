"""Fingerprint of a source: a hash of everything its tokens depend on. It names the source's cache folder."""

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
"""Incremented when a new version reads or stores the same source differently."""

IGNORED_FIELDS = ("token_share", "files", "token_files", "max_epochs", "when_exhausted")
"""Settings of a source that do not affect its tokens. File patterns are replaced by the files that they match."""


def source_fingerprint(
    name: str,
    source: SourceSection,
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    files: Sequence[SourceFile] | None = None,
) -> str:
    """Hash of a source's specification and content, the tokenizer, the loss mask and the held-out split.

    The share is not part of it: changing a ratio does not tokenise anything again.

    Args:
        name: Name of the source in its mixture.
        source: The source.
        mixture: Gives the held-out fraction, the chat template and which instruction tokens carry loss.
        tokenizer: A fast Hugging Face tokenizer.
        files: Result of `source_files`; computed by default. Pass the same to `read_documents`, so that a file that
            changes in between is detected.

    Raises:
        MixtureError: If a file of the source is missing.
    """
    specification = asdict(source)
    for key in IGNORED_FIELDS:
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
    # Paths, sizes and times instead of the text, because reading a terabyte to find it unchanged is too slow.
    if source.stdlib is not None:
        sizes = [[module, path.stat().st_size] for module, path in module_paths()]
        return [[sys.version], *sizes]
    if source.hub is not None:
        return []
    found = source_files(name, source) if files is None else files
    return [[str(file.path.resolve()), file.num_bytes, file.modified_ns] for file in found]
