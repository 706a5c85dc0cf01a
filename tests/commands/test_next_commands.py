"""The commands that a run suggests at its end can be typed as they are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparsify.commands.train import next_commands


def test_activating_the_environment_is_suggested_only_while_its_commands_are_not_on_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = tmp_path / "bin" / "sparsify"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    text = next_commands("quickstart", Path("runs/quickstart")).plain
    activate = f"source {tmp_path / 'bin' / 'activate'}"
    assert text.index(activate) < text.index("sparsify train quickstart")
    assert "sparsify report runs/quickstart" in text
    monkeypatch.setenv("PATH", str(command.parent))
    assert "source" not in next_commands("quickstart", Path("runs/quickstart")).plain
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert "source" not in next_commands("quickstart", Path("runs/quickstart")).plain
