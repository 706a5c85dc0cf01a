"""`sparsify mixture tune`: runs trials, fits the regression, decides, confirms, and writes the tuned mixture as YAML."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import yaml

from sparsify.errors import RecipeError
from sparsify.files import write_text
from sparsify.mixture.sequences.shares import token_shares
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.source import SourceSection
from sparsify.tuning.decision import LEVEL, conclude, objective_weights
from sparsify.tuning.record import Confirmation, TuneRecord
from sparsify.tuning.report import write_page
from sparsify.tuning.space import Space, parse_space
from sparsify.tuning.trials import Measurement, Proxy, check_comparable, proxy_recipe, run_proxy

logger = logging.getLogger(__name__)

FIRST_WORDS = "# Found by sparsify mixture tune"
YAML = (".yaml", ".yml")


def check_target(to: Path) -> None:
    """Raises RecipeError if the path is not a YAML file, or exists and was not written by this command."""
    if to.suffix not in YAML:
        raise RecipeError(f"--to {to} does not end in .yaml.", allowed="The path of a mixture file to write.")
    if to.exists() and not (to.is_file() and to.read_text(errors="replace").startswith(FIRST_WORDS)):
        raise RecipeError(
            f"--to {to} already exists and was not written by this command.",
            next_step="Choose the path of a new file.",
        )


def write_mixture(mixture: MixtureSection, shares: Mapping[str, float], to: Path, how: str, name: str) -> None:
    """Writes a mixture with new shares, and one line of provenance per fact. Paths in `files:` stay relative to where
    commands are run.
    """
    sources = {
        source: {"token_share": shares[source], **_stated(section, SourceSection)}
        for source, section in mixture.sources.items()
    }
    content = {**_stated(mixture, MixtureSection), "name": name, "sources": sources}
    comment = "".join(f"# {line}\n" for line in how.splitlines())
    body = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    write_text(to, f"{FIRST_WORDS}: {comment.removeprefix('# ')}{body}")


def _stated(section: Any, schema: type) -> dict[str, Any]:
    """Every setting that differs from its default, except shares."""
    excluded = {"token_share", "instruction_token_share", "phases", "sources"}
    defaults = {field.name: field.default for field in fields(schema)}
    return {key: value for key, value in asdict(section).items() if key not in excluded and value != defaults[key]}


@dataclass(frozen=True)
class TuneRequest:
    """Arguments of a tuning.

    Args:
        over: The shares to vary (`sparsify.tuning.space`).
        weights: `DOMAIN=FACTOR` each, multiplies the weight of a domain.
        num_trials: Proxy runs, including that of the recipe's own mixture.
        trial_tokens: Training tokens of each proxy run.
        to: Path of the tuned mixture; default: in the folder of the tuning.
        confirm_tokens: Training tokens of the confirmation's runs; default: `trial_tokens`.
    """

    recipe: str
    overrides: Sequence[str]
    over: Sequence[str]
    weights: Sequence[str]
    num_trials: int
    trial_tokens: int
    to: Path | None = None
    force: bool = False
    confirm: bool = False
    confirm_tokens: int | None = None


def tune(request: TuneRequest) -> tuple[TuneRecord, Path]:
    """Tunes a recipe's mixture. The same command resumes an interrupted tuning.

    Raises:
        UserError: If the request, the recipe or the data are invalid, or a file cannot be written.
        sparsify.launch.child.Interrupted: After a clean save.
    """
    recipe = compose_recipe(request.recipe, request.overrides)
    space = parse_space(request.over, recipe.mixture)
    default = token_shares(recipe.mixture)
    weights = objective_weights(list(recipe.mixture.sources), default, request.weights)
    _check_trials(request.num_trials, space)
    folder = Path(f"{recipe.run_dir}-tune")
    to = request.to or folder / f"{recipe.mixture.name}_tuned.yaml"
    check_target(to)
    confirm_tokens = request.confirm_tokens or request.trial_tokens
    if request.confirm:  # raises now instead of after all trials
        proxy_recipe(recipe, default, confirm_tokens, folder, recipe.training.seed)

    proxies = _proxies(recipe, space, request, folder)
    trial_tokens = proxies[0].recipe.num_steps * recipe.step_tokens
    logger.info(f"{len(proxies)} trials of {trial_tokens:,} tokens in {folder}")
    measured = []
    for proxy in proxies:
        measured.append((proxy, run_proxy(proxy)))
        loss = sum(weights[name] * value for name, value in measured[-1][1].losses.items())
        logger.info(f"{proxy.title}: weighted loss {loss:.4f}, zeros {measured[-1][1].zeros:.1%}")
    check_comparable(measured)

    record = conclude(space, weights, measured)
    record.recipe, record.over, record.trial_tokens = recipe.name, list(request.over), trial_tokens
    record.command = " ".join(["sparsify", *sys.argv[1:]])
    tuned = {name: domain.tuned_share for name, domain in record.domains.items()}
    if request.confirm:
        record.confirmation = confirm(recipe, tuned, weights, confirm_tokens, folder)
    if record.recommended or request.force:
        name, how = f"{recipe.mixture.name}_tuned", f"{record.command}\n{record.verdict}"
        write_mixture(recipe.mixture, tuned, to, how, name)
        record.mixture_file = str(to)
    elif request.to is None:
        to.unlink(missing_ok=True)  # a recommendation from fewer trials or a shorter confirmation
    write_page(record, folder)
    return record, folder


def _check_trials(num_trials: int, space: Space) -> None:
    if num_trials < space.min_trials:
        names = ", ".join(part.name for part in space.parts)
        raise RecipeError(
            f"--trials {num_trials} are too few for {space.num_free} free share(s) ({names}, summing to 1).",
            allowed=f"At least {space.min_trials}: one for each coefficient of a linear model, and two to estimate noise.",
            next_step=f"Set --trials {2 * space.min_trials}, or vary fewer sources: --over SOURCE=LOW:HIGH.",
        )


def _proxies(recipe: Recipe, space: Space, request: TuneRequest, folder: Path) -> list[Proxy]:
    # Trial 0 is the recipe's own mixture.
    points = space.spread(request.num_trials - 1, recipe.training.seed)
    shares = [token_shares(recipe.mixture), *map(space.source_shares, points)]
    return [
        Proxy(
            f"Trial {number + 1} of {len(shares)}",
            proxy_recipe(
                recipe,
                one,
                request.trial_tokens,
                folder / f"trial-{number:02d}",
                recipe.training.seed,
            ),
            recipe.eval.validation_sequences_per_source,
        )
        for number, one in enumerate(shares)
    ]


def confirm(
    recipe: Recipe,
    tuned: Mapping[str, float],
    weights: Mapping[str, float],
    num_tokens: int,
    folder: Path,
) -> Confirmation:
    """Trains both mixtures and compares them on held-out sequences that no trial was evaluated on."""
    seed = recipe.training.seed + 1
    # The shares are part of the folder's name, because more trials may lead to another choice.
    key = hashlib.blake2b(json.dumps(tuned, sort_keys=True).encode(), digest_size=3).hexdigest()
    variants = {"default": token_shares(recipe.mixture), f"tuned-{key}": tuned}
    measured = []
    for name, shares in variants.items():
        place = folder / f"confirm-{num_tokens}" / name
        proxy = Proxy(
            f"Confirmation, {name.partition('-')[0]} mixture",
            proxy_recipe(recipe, shares, num_tokens, place, seed),
            recipe.eval.validation_sequences_per_source,
            "confirmation",
        )
        measured.append((proxy, run_proxy(proxy)))
    check_comparable(measured)
    (proxy, default), (_, better) = measured
    budget_tokens = proxy.recipe.num_steps * proxy.recipe.step_tokens
    return compare(default, better, weights, num_tokens=budget_tokens, seed=seed)


def compare(
    default: Measurement,
    tuned: Measurement,
    weights: Mapping[str, float],
    *,
    num_tokens: int,
    seed: int,
) -> Confirmation:
    """Compares two models sequence by sequence."""
    before, after = (sum(weights[name] * loss for name, loss in one.losses.items()) for one in (default, tuned))
    variance = 0.0
    for name, weight in weights.items():
        gaps = np.subtract(tuned.sequence_losses[name], default.sequence_losses[name])
        # The variance of a single sequence is unknown; it is counted as 0.
        variance += weight**2 * float(gaps.var(ddof=1)) / len(gaps) if len(gaps) > 1 else 0.0
    limit = NormalDist().inv_cdf((1 + LEVEL) / 2)
    return Confirmation(
        num_tokens=num_tokens,
        seed=seed,
        default_losses=default.losses,
        tuned_losses=tuned.losses,
        default_loss=before,
        tuned_loss=after,
        difference=after - before,
        half_width=limit * variance**0.5,
        default_zeros=default.zeros,
        tuned_zeros=tuned.zeros,
    )
