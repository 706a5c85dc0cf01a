"""One rank of test_dry_run: the same steps with and without a dry run before them, for every stage and precision."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.recipe import Recipe
from sparsify.training.deepspeed_engine import build_engine, init_distributed, set_learning_rate
from sparsify.training.dry_run import dry_run, largest_batch
from sparsify.training.session import Session
from sparsify.training.stability import finish_step
from sparsify.training.step import accumulate

SETUPS = [(0, "fp32"), *((stage, name) for stage in (1, 2, 3) for name in ("fp32", "bf16"))]


def main(folder: Path, overrides: list[str]) -> None:
    """Prints each setup's outcome without and with a dry run, as two words."""
    init_distributed()
    for stage, precision in SETUPS:
        changed = [f"engine.zero_stage={stage}", f"training.precision={precision}"]
        recipe = compose_recipe("quickstart_base", [*overrides, *changed])
        outcomes = [outcome(recipe, folder, is_dry) for is_dry in (False, True)]
        print("OUTCOME", stage, precision, *outcomes, flush=True)
    dist.barrier()
    os._exit(0)


def outcome(recipe: Recipe, folder: Path, is_dry: bool) -> str:
    """Hash of the losses, gradient norms, weights, optimiser and random state of three steps."""
    torch.manual_seed(7)
    engine = build_engine(recipe, folder)
    session = cast(
        Session,
        SimpleNamespace(
            recipe=recipe,
            engine=engine,
            state=SimpleNamespace(step=0, baseline={}),
            objectives=[],
            reader=SimpleNamespace(names=["one", "two"]),
        ),
    )
    if is_dry:
        dry_run(session)
    seen: list[Any] = []
    for step in range(3):
        set_learning_rate(engine, 1e-2)
        batches = []
        for _ in range(recipe.accumulation_steps):
            recipe.training.seed += 1  # other tokens for every micro-batch
            batches.append(largest_batch(recipe, engine.module.config.vocab_size, 2))
        sources = ["one"] * recipe.training.global_batch_size
        losses = accumulate(session, batches, sources, recipe.step_tokens, None)
        seen += [step, losses.tolist(), *map(str, finish_step(engine))]
    recipe.training.seed -= 3 * recipe.accumulation_steps
    seen += [engine.global_steps, engine.micro_steps]
    tensors = [parameter.data for parameter in engine.module.parameters()]
    if recipe.engine.zero_stage == 3:
        tensors = [parameter.ds_tensor.data for parameter in engine.module.parameters()]
    basic = engine.basic_optimizer
    tensors += [value for state in basic.state.values() for value in state.values()]
    digest = hashlib.sha256(repr(seen).encode())
    for tensor in [*tensors, torch.get_rng_state()]:
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
    engine.destroy()
    return digest.hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
