"""Proxy runs: the recipe at a smaller budget and other shares, each in a folder of its own, none run twice."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import RecipeError, RunError
from sparsify.export.weights import find_trained, load_trained
from sparsify.files import write_text
from sparsify.mixture.plan import SourceSchedule
from sparsify.mixture.shares import Shares
from sparsify.recipe import Recipe
from sparsify.recipe_rules import validate
from sparsify.training.run_folder import RunFolder
from sparsify.tuning.measurement import Measurement, held_out_halves, measure_domains
from sparsify.verbs import Say
from sparsify.verbs.arm import check_same, train_run

RESULT_FILE = "trial.json"
Half = Literal["trial", "confirmation"]


@dataclass(frozen=True)
class Proxy:
    """One proxy run.

    Args:
        title: What to call it while it runs.
        recipe: Its own recipe.
        validation_windows: Held-out windows of each domain that it is judged on.
        half: Which half of the held-out windows it is judged on.
    """

    title: str
    recipe: Recipe
    validation_windows: int
    half: Half = "trial"

    @property
    def run(self) -> RunFolder:
        return RunFolder(Path(self.recipe.run_dir))

    @property
    def delivered_shares(self) -> dict[str, float]:
        """Shares that its few windows come to; they differ from those asked for by less than a window."""
        training = self.recipe.training
        num_windows = self.recipe.num_steps * training.batch_windows
        sources = self.recipe.mixture.sources
        shares = Shares.constant({name: one.token_share for name, one in sources.items()})
        counts = SourceSchedule(shares).counts(num_windows)
        return {name: counts.get(name, 0) / num_windows for name in sources}


def proxy_recipe(
    recipe: Recipe, shares: Mapping[str, float], num_tokens: int, folder: Path, seed: int
) -> Recipe:
    """The recipe at another budget and other shares.

    Warm-up shrinks in proportion, and the decay ends with the budget as in every run. There is no control, and the
    run validates itself on one window a source only: trials are judged by `measure_domains`.

    Raises:
        RecipeError: If the budget is less than a step.
    """
    if num_tokens < recipe.step_tokens:
        raise RecipeError(
            f"{num_tokens:,} tokens are less than one step of {recipe.step_tokens:,} tokens.",
            allowed="A trial needs several steps to differ from the model that it starts from.",
            next_step=f"Set --trial-tokens to {10 * recipe.step_tokens} or more, or lower training.batch_windows.",
        )
    proxy = deepcopy(recipe)
    proxy.name, proxy.run_dir = f"{recipe.name}-{folder.name}", str(folder)
    proxy.mixture.instruction_token_share, proxy.mixture.phases = None, []
    for name, source in proxy.mixture.sources.items():
        source.token_share = shares.get(name, 0.0)
    scale = num_tokens / recipe.training.budget_tokens
    proxy.training.budget_tokens, proxy.training.seed = num_tokens, seed
    proxy.optimizer.warmup_tokens = int(recipe.optimizer.warmup_tokens * scale)
    proxy.eval.every_tokens, proxy.eval.validation_windows_per_source = num_tokens, 1
    proxy.checkpoint.keep_last = 1
    proxy.control.ffn_activation = None
    return validate(proxy)


def run_proxy(proxy: Proxy, say: Say) -> Measurement:
    """Trains and measures one proxy run, or reads what it measured before.

    Its weights are removed once it is measured: they are large, and a proxy run is nothing to go on from. Its
    recipe, lock, metrics and measurement stay.

    Raises:
        RunError: If the folder holds a run with other settings.
        sparsify.training.launcher.Interrupted: After a clean save.
    """
    run, result = proxy.run, proxy.run.path / RESULT_FILE
    if result.is_file():
        check_same(run.load_recipe(), proxy.recipe, run)
        say(f"{proxy.title}: measured already")
        measurement = _read(result)
    else:
        shares = (f"{name} {share:.1%}" for name, share in proxy.delivered_shares.items())
        say(f"{proxy.title}: {', '.join(shares)}")
        train_run(proxy.recipe, run, say)
        measurement = _measure(proxy)
        write_text(result, measurement.model_dump_json(indent=2) + "\n")
    for folder in (run.initial, run.checkpoints):
        shutil.rmtree(folder, ignore_errors=True)
    return measurement


def _read(result: Path) -> Measurement:
    try:
        return Measurement.model_validate_json(result.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise RunError(
            f"{result} cannot be read: {str(error).splitlines()[0]}.",
            next_step=f"Remove {result.parent}; the same command runs that trial again.",
        ) from error


def _measure(proxy: Proxy) -> Measurement:
    trained = find_trained(proxy.run.path)
    assert trained is not None, f"{proxy.run.path} was trained but has no recipe"
    halves = held_out_halves(
        proxy.recipe, load_tokenizer(proxy.run.initial), proxy.validation_windows
    )
    held_out = halves[0] if proxy.half == "trial" else halves[1]
    return measure_domains(
        load_trained(trained), held_out, proxy.recipe.training.micro_batch_windows
    )


def check_comparable(measured: Sequence[tuple[Proxy, Measurement]]) -> None:
    """Refuses to compare proxy runs that were judged on different text.

    Raises:
        RunError: Naming those that differ from the first.
    """
    first, reference = measured[0]
    other = [
        str(proxy.run.path)
        for proxy, one in measured
        if one.held_out_fingerprint != reference.held_out_fingerprint
    ]
    if other:
        raise RunError(
            f"Judged on other held-out text than {first.run.path}: {', '.join(other)}.",
            allowed="Files, tokenizer and the number of validation windows stay as they are from the first trial to "
            "the last.",
            next_step="Remove the folders of the older trials, or choose another place with run_dir=….",
        )
