"""Recipes work after `pip install .` too, from any working directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sparsify.recipe.catalogue import recipe_names

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sparsify, sys
from pathlib import Path
assert Path(sparsify.__file__).is_relative_to(sys.argv.pop(1)), sparsify.__file__
from sparsify.cli.main import main
main()
"""


def test_an_installed_copy_brings_the_whole_catalogue(tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-build-isolation",  # hatchling is among the dev dependencies: no network
        "--no-deps",
        "--target",
        str(installed),
        str(ROOT),
    ]
    # Compiling kernels takes a while: tests/runtime/test_wheel.py does.
    subprocess.run(pip, env=os.environ | {"CXX": "/nowhere/c++"}, check=True, capture_output=True)
    native = Path("sparsify/runtime/native")
    assert {path.name for path in (installed / native).iterdir()} == {path.name for path in (ROOT / native).iterdir()}

    def sparsify(*arguments: str) -> str:
        command = [sys.executable, "-c", SCRIPT, str(installed), *arguments]
        environment = os.environ | {"PYTHONPATH": str(installed)}
        result = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    listed = sparsify("recipes", "list")
    assert all(name in listed for name in recipe_names())
    assert "quickstart: valid" in sparsify("recipes", "validate", "quickstart")
    assert "3,148,032" in sparsify("plan", "quickstart", "--json").replace("3148032", "3,148,032")
    sparsify("recipes", "copy", "quickstart", "mine.yaml")
    assert (elsewhere / "mine.yaml").is_file()
    assert "mine.yaml: valid" in sparsify("recipes", "validate", "mine.yaml")
