"""`sparsify plan`: a recipe's needs on given hardware."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsify.conversion.source_checkpoint import locate
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import RecipeError, UserError
from sparsify.evaluation.request import suite_code
from sparsify.launch.hosts import read_hostfile
from sparsify.methods.base import check_method
from sparsify.mixture.sequences.shares import token_shares
from sparsify.mixture.tokens.encoder import Tokenizer
from sparsify.mixture.tokens.ingest import bad_rows_of, mixture_ingests
from sparsify.plan import Hardware, Plan, make_plan, named_hardware, resolve_engine, this_machine
from sparsify.plan.estimate import is_local
from sparsify.plan.report import nearest_sentence
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.recipe import Recipe

logger = logging.getLogger(__name__)

ALL_TOKENS = 2**62


@dataclass(frozen=True)
class Assumptions:
    """Values that override the hardware table.

    Attributes:
        hardware: COUNTxGPU; every device gets one process.
        tokens_per_second: Measured throughput of all processes together.
        host_memory_gb: Memory of one node.
    """

    hardware: str | None = None
    tokens_per_second: float | None = None
    gpu_hour_price: float | None = None
    host_memory_gb: float | None = None


def plan(name_or_path: str, overrides: Sequence[str], given: Assumptions) -> Plan:
    """Plans a recipe. Raises UserError if it is wrong, or `engine=auto` finds nothing that fits."""
    _check(given)
    hardware = _named(given.hardware, given) if given.hardware else None
    recipe = compose_recipe(name_or_path, [*overrides, *(_alone(hardware.devices) if hardware else [])])
    if recipe.launch.hostfile is not None:
        place = _alone(sum(read_hostfile(recipe.launch.hostfile).values()))
        recipe = compose_recipe(name_or_path, [*overrides, *place])
    if code := suite_code(recipe.eval):
        logger.warning(code)
    check_method(recipe.conversion)
    hardware = hardware or hardware_of(recipe, given)
    recipe, choice = resolve_engine(recipe, hardware=hardware)
    return make_plan(
        recipe,
        hardware=hardware,
        tokens_per_second=given.tokens_per_second,
        source_tokens=known_tokens(recipe),
        choice=choice,
    )


def hardware_of(recipe: Recipe, given: Assumptions) -> Hardware:
    """Default hardware of a plan: `engine.planned_gpu`, or this machine."""
    if recipe.engine.planned_gpu is not None:
        return _named(f"{recipe.launch.total_processes}x{recipe.engine.planned_gpu}", given)
    here = this_machine(recipe.launch.processes, recipe.launch.nodes, given.gpu_hour_price)
    if given.host_memory_gb is None:
        return here
    return here.model_copy(update={"host_bytes": round(given.host_memory_gb * 1e9)})


def refuse_unfit(plan: Plan) -> None:
    """Raises RecipeError with the reason and the nearest settings that fit, if a plan cannot work."""
    if plan.verdict.fits:
        return
    raise RecipeError(
        f"{plan.recipe} does not fit {plan.hardware.name}: {plan.verdict.reason}.",
        allowed=f"Nearest that fits: {nearest_sentence(plan.verdict)}.",
        next_step="Set these, use engine=auto, or plan for other devices: --hardware 8xh100-80gb",
    )


def known_tokens(recipe: Recipe) -> dict[str, int]:
    """Training tokens of the sources that are completely cached; warns of turns that the chat template drops from them. Reads
    no text and uses no network.
    """
    tokenizer = _tokenizer_here(recipe)
    if tokenizer is None:
        return {}
    known = {}
    ingests = mixture_ingests(
        recipe.mixture,
        tokenizer,
        train_tokens=dict.fromkeys(token_shares(recipe.mixture), ALL_TOKENS),
        held_out_tokens=0,
        sequence_length=recipe.training.sequence_length,
        cache_dir=Path(recipe.cache_dir),
    )
    for name, ingest in ingests.items():
        try:
            source = ingest.open()
            if not source.cache.complete:
                continue
            bad_rows = bad_rows_of(source)
        except UserError:
            continue  # `train` and `mixture stats` report errors of a source; a plan does without it
        known[name] = source.num_train_tokens
        if bad_rows is not None and bad_rows.dropped_turns:
            logger.warning(bad_rows.summary())
    return known


def _tokenizer_here(recipe: Recipe) -> Tokenizer | None:
    source = recipe.model.tokenizer or recipe.model.source
    if source is None or not is_local(source):
        return None
    try:
        return load_tokenizer(locate(source), source)
    except UserError:
        return None


def _named(name: str, given: Assumptions) -> Hardware:
    host_bytes = None if given.host_memory_gb is None else round(given.host_memory_gb * 1e9)
    return named_hardware(name, host_bytes=host_bytes, gpu_hour_price=given.gpu_hour_price)


def _alone(processes: int) -> list[str]:
    # A plan uses no network, so the nodes need no rendezvous.
    alone = (
        "launch.nodes=1",
        "launch.node_rank=0",
        "launch.rendezvous=null",
        "launch.hostfile=null",
    )
    return [*alone, f"launch.processes={processes}"]


def _check(given: Assumptions) -> None:
    for option in ("tokens_per_second", "gpu_hour_price", "host_memory_gb"):
        value = getattr(given, option)
        if value is not None and not value > 0:
            raise RecipeError(f"--{option.replace('_', '-')} is {value}.", allowed="It must be above 0.")
