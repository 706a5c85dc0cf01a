"""Progress reaches a log file: standard error need not be a terminal."""

from __future__ import annotations

import pytest

from sparsify.cli import options


def test_without_a_terminal_progress_is_lines_and_few_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(options.time, "monotonic", lambda: now)
    with options.status_line() as on_progress:
        for step in range(5):
            on_progress(f"step {step} of 5, recall [b]95%[/b]")
            now += options.LOG_SECONDS / 2
    assert capsys.readouterr().err.splitlines() == [f"step {step} of 5, recall [b]95%[/b]" for step in (0, 2, 4)]
