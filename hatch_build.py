"""Puts compiled decoding kernels into the wheel where there is a C++ compiler; without one the wheel is pure Python.

Never for this machine's own processor: the wheel may be installed on another. An editable installation gets none, since it
would keep using them after the sources have changed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags


class KernelsHook(BuildHookInterface):
    """Compiles the kernels' variants for this kind of machine and names the wheel after it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        compiler = self._load_build_module()
        path = compiler.find_compiler()
        if path is None:
            self.app.display_info("No C++ compiler: a wheel without decoding kernels.")
            return
        self._scratch = tempfile.TemporaryDirectory()
        folder = Path(self._scratch.name)

        def make(variant: str, choices: Any, library: str) -> Path | None:
            file = folder / compiler.library_name(variant, library)
            try:
                compiler.compile_kernels(path, file, choices, library)
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", None) or str(error)
                self.app.display_warning(f"No {library} for {variant}: {said.strip()[-500:]}")
                return None
            return file

        wanted = compiler.variants(platform.machine())
        pairs = [(*one, library) for library in compiler.LIBRARIES for one in wanted.items()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = [file for file in pool.map(lambda one: make(*one), pairs) if file is not None]
        if not made:
            return
        for file in made:
            build_data["force_include"][str(file)] = f"sparsify/runtime/prebuilt/{file.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if scratch := getattr(self, "_scratch", None):
            scratch.cleanup()

    def _load_build_module(self) -> ModuleType:
        """By its path: importing the package would need torch."""
        path = Path(self.root) / "sparsify" / "runtime" / "build.py"
        spec = importlib.util.spec_from_file_location("sparsify_build", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def _platform_tag() -> str:
    """The plain one: only a repaired wheel may claim that it runs on every Linux of an age."""
    many = ("manylinux", "musllinux")
    return next(tag for tag in platform_tags() if not tag.startswith(many))
