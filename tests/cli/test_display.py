"""What a newcomer is told to type next can be typed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from sparsify.cli.tables import _next_commands


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="there is nothing to activate")
def test_the_environment_is_named_only_while_its_commands_are_not_on_the_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = SimpleNamespace(given="quickstart", run=SimpleNamespace(path=Path("runs/quickstart")))
    bin_folder = Path(sys.prefix) / "bin"
    monkeypatch.setenv("PATH", "/nowhere")
    told = str(_next_commands(result))
    assert told.index(f"source {bin_folder / 'activate'}") < told.index("sparsify train quickstart")
    monkeypatch.setenv("PATH", str(bin_folder))
    assert "source" not in str(_next_commands(result))
