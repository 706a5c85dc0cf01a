"""Prints uv.lock as pip constraints for the Python that runs this, so that pip installs the versions that uv would.

python scripts/constraints.py > constraints.txt
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from pip._vendor.packaging.markers import Marker  # pip is what reads the constraints

LOCK = Path(__file__).parents[1] / "uv.lock"

for package in tomllib.loads(LOCK.read_text(encoding="utf-8"))["package"]:
    markers = package.get("resolution-markers", [])
    # A package that differs between Pythons or systems is listed once for each, with the markers of its own.
    fits = not markers or any(Marker(marker).evaluate() for marker in markers)
    if "registry" in package["source"] and fits:
        print(f"{package['name']}=={package['version']}")
