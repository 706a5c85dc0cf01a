"""What a source's tokens depend on, in one short hash: the name of its folder in the token cache."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict

from sparsify.mixture.decontamination import decontamination_fingerprint
from sparsify.mixture.encoding import Tokenizer, tokenizer_fingerprint
from sparsify.mixture.sources import source_paths
from sparsify.mixture.stdlib_text import module_paths
from sparsify.recipe import MixtureSection, SourceSection

FORMAT_VERSION = 2
"""Raised when the same source would be read or laid out differently than before."""


def source_fingerprint(
    name: str, source: SourceSection, mixture: MixtureSection, tokenizer: Tokenizer
) -> str:
    """Hash of a source's specification and content, the tokenizer, the loss mask and the held-out split.

    Its share is left out: changing a ratio never tokenises anything again.

    Raises:
        MixtureError: If a file of the source is missing.
    """
    specification = asdict(source)
    for key in ("token_share", "files", "max_epochs", "when_exhausted"):
        del specification[key]
    parts = {
        "format": FORMAT_VERSION,
        "source": specification,
        "content": _content(name, source),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "instruction_loss": mixture.instruction_loss if source.group == "instruction" else None,
        "validation_fraction": mixture.validation_fraction,
        "remove_duplicates": mixture.remove_duplicates,
        "decontaminate_against": decontamination_fingerprint(mixture),
    }
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _content(name: str, source: SourceSection) -> list[list[str | int]]:
    """Paths, sizes and times instead of the text itself: reading a terabyte to find it unchanged helps nobody."""
    if source.stdlib is not None:
        sizes = [[module, path.stat().st_size] for module, path in module_paths()]
        return [[sys.version], *sizes]
    if source.files is not None:
        stats = [(path.resolve(), path.stat()) for path in source_paths(name, source)]
        return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    return []
