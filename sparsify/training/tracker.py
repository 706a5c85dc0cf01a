"""Weights & Biases, as an optional copy of a run's records: whatever goes wrong with it, the run continues.

What it gets of a run: every number of its lines, its samples, and a picture of the zeros.
"""

from __future__ import annotations

import configparser
import logging
import netrc
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import RecipeError
from sparsify.recipe.engine import TrackingSection
from sparsify.recipe.recipe import Recipe
from sparsify.runs.run_folder import RunFolder

logger = logging.getLogger(__name__)

CELL_PIXELS = 12
INIT_SECONDS = 30
"""How long a run waits for the server before it tracks offline; WANDB_INIT_TIMEOUT overrides it."""
FINISH_SECONDS = 60
"""How long a finished run waits for its last lines to be uploaded."""
LEAST_KEY = 40
"""Characters of an API key, at least."""
HOST = "https://api.wandb.ai"


def check_tracker(tracking: TrackingSection) -> None:
    """Refuses online tracking without a key, before the work. Uses no network.

    Raises:
        RecipeError: With the ways out.
    """
    if _mode(tracking) != "online" or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    ways = "Run `wandb login`, or set WANDB_API_KEY; or set tracking.wandb=offline, and `wandb sync` the run's wandb folder later."
    key = os.environ.get("WANDB_API_KEY")
    if key is not None:
        if len(key) < LEAST_KEY or not re.fullmatch(r"[-.\w]+", key):
            raise RecipeError(
                f"tracking.wandb is online, and WANDB_API_KEY has {len(key)} characters.",
                allowed=f"A key of {LEAST_KEY} or more letters, digits, dashes and underscores.",
                next_step=ways,
            )
        return
    host = _host()
    if not _has_login(host):
        raise RecipeError(
            f"tracking.wandb is online, and there is no API key for {host}.",
            allowed="A key in WANDB_API_KEY or in the netrc file.",
            next_step=ways,
        )


def _mode(tracking: TrackingSection) -> str:
    """WANDB_MODE of the environment may turn an online tracker off, as on machines without a network."""
    wanted = os.environ.get("WANDB_MODE")
    return wanted if tracking.wandb == "online" and wanted in ("offline", "disabled") else tracking.wandb


def _host() -> str:
    url = os.environ.get("WANDB_BASE_URL")
    if url is None:
        folder = os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
        settings = configparser.ConfigParser()
        try:
            settings.read(Path(folder).expanduser() / "settings")
            url = settings.get("default", "base_url", fallback=HOST)
        except (configparser.Error, UnicodeDecodeError):
            url = HOST
    return urlsplit(url).hostname or url


def _has_login(host: str) -> bool:
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        try:
            if netrc.netrc(path.expanduser()).hosts.get(host):
                return True
        except OSError:
            continue
        except netrc.NetrcParseError:
            return True  # wandb reads more than Python does; what it cannot read either, it says itself
    return False


class Tracker:
    """A wandb run. No method raises: at the first error a warning says so, and the run is no longer tracked."""

    def __init__(self, recipe: Recipe, run: RunFolder) -> None:
        self._run: Any = None
        self._wandb: Any = None
        self._folder = run.path / "wandb"
        mode = _mode(recipe.tracking)
        if mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_INIT_TIMEOUT", str(INIT_SECONDS))

        def start(mode: str) -> None:
            import wandb  # takes a second, which runs without it need not wait for

            self._wandb = wandb
            self._run = wandb.init(
                project=recipe.tracking.wandb_project,
                name=recipe.name,
                dir=str(run.path),
                mode=mode,  # pyright: ignore[reportArgumentType]  (validated by recipe.py)
                config=asdict(recipe),
            )

        if mode == "online":
            error = _failure(lambda: start("online"))
            if error is None:
                return
            logger.warning(
                f"wandb cannot be reached ({error}). The run is tracked offline in {self._folder}; `wandb sync` uploads it."
            )
        self._guarded(lambda: start("offline"))

    def numbers(self, record: dict[str, Any]) -> None:
        if self._run is not None:
            numbers = dict(_numbers(record, str(record.get("kind", "sparsity"))))
            self._guarded(lambda: self._run.log(numbers, step=record["step"]))

    def samples(self, step: int, pairs: list[dict[str, str]]) -> None:
        def log() -> None:
            rows: list[Any] = [[step, pair["prompt"], pair["continuation"]] for pair in pairs]
            table = self._wandb.Table(columns=["step", "prompt", "continuation"], data=rows)
            self._run.log({"samples": table}, step=step)

        if self._run is not None:
            self._guarded(log)

    def heat_map(self, step: int, layers: list[list[float]]) -> None:
        def log() -> None:
            caption = "share of zeros: layers from top to bottom, validations from left to right"
            self._run.log({"sparsity/heat_map": self._wandb.Image(heat_map(layers), caption=caption)}, step=step)

        if self._run is not None:
            self._guarded(log)

    def close(self) -> None:
        if self._run is None:
            return
        # Without a network, finishing waits for it without end.
        finishing = threading.Thread(target=lambda: self._guarded(self._run.finish), daemon=True)
        finishing.start()
        finishing.join(FINISH_SECONDS)
        if finishing.is_alive():
            logger.warning(
                f"wandb has not uploaded everything after {FINISH_SECONDS} s. `wandb sync` uploads the rest of {self._folder}."
            )

    def _guarded(self, act: Callable[[], object]) -> None:
        error = _failure(act)
        if error is not None:
            self._run = None
            logger.warning(
                f"wandb failed ({error}), and the run is tracked no longer. Training continues; metrics.jsonl has everything."
            )


def _failure(act: Callable[[], object]) -> str | None:
    """What went wrong, in one line; None if nothing did."""
    try:
        act()
    except (Exception, SystemExit) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return None


def heat_map(layers: list[list[float]]) -> NDArray[np.uint8]:
    """Share of zeros of every layer (rows) at every validation (columns) as a picture, white at 0 and dark at 1.

    Returns:
        Grey levels, with `CELL_PIXELS` a cell each way. [layers * cell, validations * cell]
    """
    grey = np.round(255 * (1 - np.array(layers).T)).astype(np.uint8)
    return np.kron(grey, np.ones((CELL_PIXELS, CELL_PIXELS), np.uint8))


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _numbers(item, f"{name}/{key}")
