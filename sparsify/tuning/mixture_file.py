"""The tuned mixture as a YAML file that a recipe can use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from sparsify.errors import RecipeError
from sparsify.files import write_text
from sparsify.recipe import MixtureSection, SourceSection

FIRST_WORDS = "# Found by sparsify mixture tune"
YAML = (".yaml", ".yml")


def check_target(to: Path) -> None:
    """Refuses a path that a tuned mixture must not be written to, before any trial is run.

    Raises:
        RecipeError: If it does not name a YAML file, or one stands there that this command did not write.
    """
    if to.suffix not in YAML:
        raise RecipeError(
            f"--to {to} does not end in .yaml.", allowed="The path of a mixture file to write."
        )
    if to.exists() and not (
        to.is_file() and to.read_text(errors="replace").startswith(FIRST_WORDS)
    ):
        raise RecipeError(
            f"--to {to} exists already, and this command did not write it.",
            next_step="Choose the path of a new file.",
        )


def write_mixture(
    mixture: MixtureSection, shares: Mapping[str, float], to: Path, how: str, name: str
) -> None:
    """Writes a mixture with other shares. `files:` stay as they were: relative to where commands are run.

    Args:
        mixture: The mixture that was tuned.
        shares: The new token share of each source; they sum to 1.
        to: The file.
        how: How it was found, one line a fact.
        name: The new mixture's name.
    """
    sources = {
        source: {"token_share": shares[source], **_stated(section, SourceSection)}
        for source, section in mixture.sources.items()
    }
    content = {**_stated(mixture, MixtureSection), "name": name, "sources": sources}
    comment = "".join(f"# {line}\n" for line in how.splitlines())
    body = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    write_text(to, f"{FIRST_WORDS}: {comment.removeprefix('# ')}{body}")


def _stated(section: Any, schema: type) -> dict[str, Any]:
    """Every setting that is not its default, apart from shares."""
    left_out = {"token_share", "instruction_token_share", "phases", "sources"}
    defaults = {field.name: field.default for field in fields(schema)}
    return {
        key: value
        for key, value in asdict(section).items()
        if key not in left_out and value != defaults[key]
    }
