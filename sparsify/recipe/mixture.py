"""The section `mixture`, with its phases."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from sparsify.errors import RecipeError, nearest
from sparsify.recipe.fields import Section, Share, check_name
from sparsify.recipe.source import SourceSection, check_source

SHARE_TOLERANCE = 1e-6


@dataclass
class PhaseSection(Section):
    """Shares from the end of the previous phase up to a point of the run."""

    until_budget_share: float
    """Where the phase ends, as a share of the training budget; 1 for the last phase."""
    instruction_token_share: Share | None = None
    """Share of tokens from the instruction group, as in the mixture; shares inside both groups keep their proportions."""
    token_shares: dict[str, Share] = field(default_factory=dict)
    """Share of each source instead of its own `token_share`; 0 for sources that are not listed. They sum to 1."""
    ramp: bool = False
    """Interpolate linearly from the previous phase's final shares, instead of a step."""


@dataclass
class MixtureSection(Section):
    """Training data. Has no run parameter, so that one mixture serves every budget."""

    name: str
    description: str = ""
    sources: dict[str, SourceSection] = field(default_factory=dict)
    instruction_token_share: Share | None = None
    """Share of training tokens from the instruction group; shares inside both groups keep their proportions.
    Null keeps the sources' own shares."""
    phases: list[PhaseSection] = field(default_factory=list)
    """How shares change over the run; empty: they are constant."""
    instruction_loss: Literal["responses", "all"] = "responses"
    """Which tokens of an instruction carry loss: `responses` or `all`."""
    chat_template: str | None = None
    """Chat template of instructions: null for the tokenizer's own (ChatML if it has none), `chatml`, a Jinja text, or the
    path of a .jinja file."""
    max_bad_fraction: Share = 0.01
    """Largest share of invalid rows of a source (unreadable, null, of a wrong type); above it the run stops. Invalid rows are
    always skipped, counted and listed."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of each source's documents that is held out from training, chosen by a hash of their content or origin."""
    remove_duplicates: bool = True
    """Skip a document whose text, or all of whose messages, equal those of an earlier document of the same source: a duplicate
    would be seen twice an epoch."""
    decontaminate_against: list[str] = field(default_factory=list)
    """Evaluation sets: a document that shares 13 consecutive words with one of their items is skipped. Names of suites in
    `eval/` that list `evaluation_files`, paths of such a .yaml, or paths and globs of the files themselves."""


def check_mixture(mixture: MixtureSection) -> None:
    """Refuses a mixture without sources, or with wrong sources or shares.

    Raises:
        RecipeError: Naming the source and the setting.
    """
    if not mixture.sources:
        raise RecipeError(
            f"Mixture {mixture.name!r} has no sources.",
            next_step="Add at least one entry under mixture.sources.",
        )
    check_name("mixture.name", mixture.name)
    for name, source in mixture.sources.items():
        check_name("The name of a source in mixture.sources", name)
        check_source(f"mixture.sources.{name}", source)
    check_chat_template(mixture)
    if mixture.instruction_token_share is None or not _groups_sum_to_one(mixture):
        _check_sum(
            f"The token shares of mixture {mixture.name!r}",
            {name: source.token_share for name, source in mixture.sources.items()},
            "mixture.instruction_token_share moves all of them at once.",
        )
    if mixture.phases:
        _check_phases(mixture)
    else:
        _check_share(mixture, "mixture.instruction_token_share", mixture.instruction_token_share)


def check_chat_template(mixture: MixtureSection) -> None:
    """Refuses a chat template that a mixture cannot use.

    Raises:
        RecipeError: Naming the setting.
    """
    template = mixture.chat_template
    if template is None:
        return
    if template != "chatml" and not template.endswith(".jinja") and "{" not in template:
        raise RecipeError(
            f"mixture.chat_template is {template!r}.",
            allowed="Allowed: null, chatml, a Jinja text, or the path of a .jinja file.",
        )
    if not any(source.group == "instruction" for source in mixture.sources.values()):
        raise RecipeError(
            f"mixture.chat_template is set, but mixture {mixture.name!r} has no instruction source that would use it.",
            next_step="Set mixture.chat_template=null, or group: instruction of a source.",
        )


def _groups_sum_to_one(mixture: MixtureSection) -> bool:
    groups: dict[str, list[float]] = {}
    for source in mixture.sources.values():
        groups.setdefault(source.group, []).append(source.token_share)
    return all(_is_one(math.fsum(shares)) for shares in groups.values())


def _is_one(total: float) -> bool:
    return abs(total - 1.0) <= SHARE_TOLERANCE


def _check_sum(what: str, shares: dict[str, float], hint: str) -> None:
    total = math.fsum(shares.values())
    if not _is_one(total):
        listed = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise RecipeError(
            f"{what} sum to {total:.6g}: {listed}.",
            allowed="They must sum to 1.",
            next_step=f"Change one of them by {1.0 - total:+.6g}; {hint}",
        )


def _check_phases(mixture: MixtureSection) -> None:
    if mixture.instruction_token_share is not None:
        raise RecipeError(
            f"mixture.instruction_token_share is {mixture.instruction_token_share}, but mixture {mixture.name!r} has phases, "
            "which would ignore it.",
            next_step="Set mixture.phases.0.instruction_token_share (and those after it), or mixture.phases=[].",
        )
    before = 0.0
    for number, phase in enumerate(mixture.phases):
        key = f"mixture.phases.{number}"
        last = number == len(mixture.phases) - 1
        if not before < phase.until_budget_share <= 1 or (last and phase.until_budget_share != 1):
            raise RecipeError(
                f"{key}.until_budget_share is {phase.until_budget_share:g}.",
                allowed="Phases end one after another, above 0, and the last one at 1: "
                f"this one {'at 1' if last else f'above {before:g} and below 1'}.",
            )
        before = phase.until_budget_share
        _check_phase(mixture, key, phase, first=number == 0)
    if all(phase.token_shares for phase in mixture.phases):
        raise RecipeError(
            f"Every phase of mixture {mixture.name!r} states token_shares, so the token_share of its sources would be ignored.",
            next_step="Give the sources the shares of one phase, and omit token_shares there.",
        )


def _check_phase(mixture: MixtureSection, key: str, phase: PhaseSection, *, first: bool) -> None:
    if phase.ramp and first:
        raise RecipeError(
            f"{key}.ramp is true, but there is no phase before it to begin from.",
            next_step="Begin with a phase of constant shares; it may be short.",
        )
    if phase.token_shares and phase.instruction_token_share is not None:
        raise RecipeError(
            f"{key} states token_shares and instruction_token_share, of which one would be ignored.",
            next_step="Omit one of them.",
        )
    for name in phase.token_shares:
        if name not in mixture.sources:
            raise RecipeError(
                f"{key}.token_shares names {name!r}, which is not a source of mixture {mixture.name!r}.",
                allowed=f"{nearest(name, mixture.sources)}Sources: {', '.join(mixture.sources)}.",
            )
    if phase.token_shares:
        _check_sum(f"{key}.token_shares", dict(phase.token_shares), "or omit them all.")
    _check_share(mixture, f"{key}.instruction_token_share", phase.instruction_token_share)


def _check_share(mixture: MixtureSection, key: str, wanted: float | None) -> None:
    if wanted is None:
        return
    for group, share in (("instruction", wanted), ("pretraining", 1 - wanted)):
        if share > 0 and not any(
            source.group == group and source.token_share > 0 for source in mixture.sources.values()
        ):
            raise RecipeError(
                f"{key} is {wanted}, but mixture {mixture.name!r} has no {group} source.",
                next_step=f"Add a source with group: {group}, or leave this share unset.",
            )
