"""`sparsify convert --calibrate-on`: what cannot be is refused with help, before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparsify.cli.main import main

REFUSED = {
    "--target-zeros 0.9": ["--target-zeros 0.9 would be ignored", "--calibrate-on"],
    "--calibrate-on quickstart --on quickstart": ["--on quickstart would be ignored"],
    "--calibrate-on quickstart --target-zeros 90": ["--target-zeros is '90.0'", "numbers from 0 to 0.9999"],
    "--method percentil --target-zeros 0.5": ["conversion.method is 'percentil'", "Methods:"],
    "--method thresholds": ["thresholds needs conversion.target_zeros", "such as 0.9"],
    "--method thresholds --target-zeros 0": ["conversion.target_zeros is 0.0", "greater than 0"],
    "--method thresholds --target-zeros 0.5 --set site=gate": [
        "conversion.method_settings.site=gate would be ignored",
        "Settings of thresholds: target_zeros",
    ],
    "--method thresholds --target-zeros 0.5 --set gate": ["--set gate", "KEY=VALUE"],
    "--calibrate-on quickstart --refit": ["conversion.refit=true would be ignored"],
    "--method percentile --target-density 0": ["--target-density is '0.0'", "above 0 to 1"],
    "--method percentile --target-density 0.5 --target-zeros 0.5": ["both say how much is dropped"],
    "--method percentile --target-density 0.01": ["conversion.target_density is 0.01", "Above 0."],
    "--calibrate-on quickstart --target-density 0.5": ["is not a mask", "--method"],
    "--target-density 0.5": ["--target-density 0.5 would be ignored"],
    "--set site=gate": ["--set site=gate would be ignored", "--method"],
    "--calibrate-on quikstart": ["Did you mean 'quickstart'?"],
    "--activation drelu --gate-threshold 1": ["--gate-threshold=1 would be ignored", "fatrelu"],
}


@pytest.mark.parametrize("options", REFUSED)
def test_a_calibration_that_cannot_be_made(
    options: str,
    stock: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    to = tmp_path / "out"
    command = ["sparsify", "convert", str(stock["mistral"]), "--to", str(to), *options.split()]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    message = capfd.readouterr().err
    assert ended.value.code == 2
    assert [words for words in REFUSED[options] if words not in message] == []
    assert not list(tmp_path.iterdir())
