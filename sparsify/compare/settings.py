"""Settings in which runs differ, and short names of settings and runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsify.compare.run_summary import RunSummary
from sparsify.compare.schema import Setting
from sparsify.mixture.sequences.shares import rounded_share
from sparsify.recipe.identity import decides, is_bookkeeping

SEED = "training.seed"
INSTRUCTION_SHARE = "mixture.instruction_token_share"


def differing_settings(summaries: Sequence[RunSummary]) -> list[dict[str, Setting]]:
    """For each run, the settings that differ between the runs: SECTION.KEY to value, in the recipe's order.

    Sources that not all mixtures have are not listed here; they are columns of the sources' table. If any run sets
    `instruction_token_share`, null is replaced by the share that follows from the run's sources.
    """
    flat = [_flat(asdict(summary.recipe)) for summary in summaries]
    if any(settings[INSTRUCTION_SHARE] is not None for settings in flat):
        for summary, settings in zip(summaries, flat, strict=True):
            settings[INSTRUCTION_SHARE] = _instruction_share(summary, settings[INSTRUCTION_SHARE])
    keys = [
        key
        for key in dict.fromkeys(key for settings in flat for key in settings)
        if not is_bookkeeping(key)
        and len({settings.get(key) for settings in flat}) > 1
        and not (key.startswith("mixture.sources.") and any(key not in one for one in flat))
    ]
    return [{key: settings.get(key) for key in keys} for settings in flat]


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Setting]:
    flat: dict[str, Setting] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            flat[f"{prefix}{key}"] = ", ".join(map(str, value))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _instruction_share(summary: RunSummary, given: Setting) -> Setting:
    if given is not None:
        return given
    sources = summary.recipe.mixture.sources
    stated = sum(
        source.token_share for name, source in summary.lock.sources.items() if sources[name].group == "instruction"
    )
    return rounded_share(stated)


def swept_setting(settings: Sequence[Mapping[str, Setting]]) -> str | None:
    """The only setting of the training that differs, if its values are numbers.

    The seed may differ too: runs that differ in nothing else are repetitions.
    """
    keys = [key for key in settings[0] if decides(key) and len({one[key] for one in settings}) > 1]
    if len(keys) > 1:
        keys = [key for key in keys if key != SEED]
    if len(keys) != 1:
        return None
    values = [one[keys[0]] for one in settings]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return keys[0] if numbers else None


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest names by which folders differ.

    Comma-separated parts that the folders' names have in common are removed as long as the names stay different. If that
    is not enough, the names are whole folder names, then ever longer ends of the paths.
    """
    whole = [path.resolve() for path in paths]
    depth = max(len(path.parts) for path in whole)
    ends = [["/".join(path.parts[-n:]) for path in whole] for n in range(1, depth + 1)]
    candidates = [_without_shared(ends[0]), *ends]
    return next(names for names in candidates if len(set(names)) == len(names))


def _without_shared(names: Sequence[str]) -> list[str]:
    parts = [name.split(",") for name in names]
    common = set(parts[0]).intersection(*parts)
    left = [[part for part in one if part not in common] or one[:1] for one in parts]
    counts = Counter(part for one in left for part in one)
    for shared, count in counts.most_common():
        fewer = [[part for part in one if part != shared] for one in left]
        if count > 1 and all(fewer) and len({tuple(one) for one in fewer}) == len(fewer):
            left = fewer
    return [",".join(one) for one in left]


def common_name(paths: Sequence[Path]) -> str:
    """The comma-separated parts that the names of all folders begin with; empty if there are none."""
    parts = [path.resolve().name.split(",") for path in paths]
    common = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ",".join(common)
