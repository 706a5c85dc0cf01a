"""A rank that trains, saves and loads without data: CONVERTED_MODELS OUT CASE …, where a case is
KIND:PRECISION[+offload]:STAGE[:CHECKPOINT]."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state

from sparsify.methods.live_model import Engine, full_weight
from sparsify.recipe.compose import compose_recipe
from sparsify.runs.state import TrainingState
from sparsify.training.checkpoints import Keep, load, save
from sparsify.training.deepspeed_engine import build_engine, init_distributed, set_learning_rate
from sparsify.training.dry_run import largest_batch
from sparsify.training.session import Session
from sparsify.training.stability import finish_step
from sparsify.training.step import accumulate

TINY = [
    "training.sequence_length=32", "training.global_batch_size=8", "training.micro_batch_size=2",
    "optimizer.weight_decay=0.5",
]  # fmt: skip
STEPS = 2


def main(models: Path, out: Path, case: str) -> dict[str, Any]:
    """Trains two steps and saves, or loads the checkpoint; writes what the engine then holds, and trains one step more."""
    kind, precision, stage, *checkpoint = case.split(":")
    precision, _, offload = precision.partition("+")
    settings = [*TINY, f"engine.zero_stage={stage}", f"training.precision={precision}"]
    settings.append(f"engine.offload_optimizer_to_cpu={bool(offload)}")
    recipe = compose_recipe("quickstart_base", [*settings, f"launch.processes={dist.get_world_size()}"])
    torch.manual_seed(7)
    engine = build_engine(recipe, models / kind)
    session = cast(
        Session,
        SimpleNamespace(
            recipe=recipe,
            engine=engine,
            state=SimpleNamespace(step=0, baseline={}),
            objectives=[],
            reader=SimpleNamespace(names=["one"]),
        ),
    )
    processes = dist.get_world_size()
    folder = out / f"{kind}-{precision}{offload}-{stage}-by-{processes}"
    if checkpoint:
        state = load(engine, out / checkpoint[0])
        assert state.step == STEPS
    else:
        for step in range(STEPS):
            train_step(session, step)
        state = TrainingState(STEPS, STEPS * recipe.step_tokens, processes, int(stage), {"one": 16})
        save(engine, state, folder, Keep(1, None, recipe.step_tokens), {})
    contents = held(engine)
    file = out / f"{case.replace(':', '-').replace('/', '-')}-{processes}.pt"
    if dist.get_rank() == 0:
        torch.save(contents, file)
    counters = [engine.global_steps, engine.skipped_steps]
    steps = adam_steps(engine)
    decay = [group["weight_decay"] for group in engine.optimizer.param_groups]
    loss, norm = train_step(session, STEPS)
    steps_after = sorted(set(adam_steps(engine)))
    engine.destroy()  # pyright: ignore[reportAttributeAccessIssue]
    found = {
        "held": str(file),
        "counters": counters,
        "steps": sorted(set(steps)),
        "steps_after": steps_after,
        "decay": decay,
    }
    return found | {"loss": loss, "norm": norm, "checkpoint": str(folder / f"step-{STEPS:08d}")}


def adam_steps(engine: Engine) -> list[float]:
    return [float(state["step"]) for state in engine.optimizer.state.values()]


def train_step(session: Session, step: int) -> tuple[float, float]:
    recipe, engine = session.recipe, session.engine
    set_learning_rate(engine, 1e-2)
    batches = []
    for micro_batch in range(recipe.accumulation_steps):
        recipe.training.seed = 1000 * step + micro_batch * dist.get_world_size()  # to which its rank is added
        batches.append(largest_batch(recipe, engine.module.config.vocab_size, 1))
    losses = accumulate(session, batches, ["one"] * recipe.training.global_batch_size, recipe.step_tokens, None)
    norm, applied = finish_step(engine)
    assert applied, (norm, losses)
    return float(losses.sum()), norm


def held(engine: Engine) -> dict[str, torch.Tensor]:
    """Everything that training changes, of all ranks, from where the next step takes it."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        found[f"{name} fp32"] = full_weight(parameter).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{name} {moment}"] = whole_moment(engine, parameter, moment)
    return found


def whole_moment(engine: Engine, parameter: Any, moment: str) -> torch.Tensor:
    if engine.zero_optimization_stage() == 3:
        whole = safe_get_full_optimizer_state(parameter, moment)
        assert whole is not None
        return whole.clone()
    if engine.zero_optimization_stage() == 0:
        return engine.optimizer.state[parameter][moment].clone()
    adam, place = engine.optimizer.optimizer, parameter._hp_mapping
    whole = torch.zeros(parameter.numel())
    if place is not None:  # none of it is this rank's otherwise
        (flat,) = adam.param_groups[place.param_group_index]["params"]
        here, there = place.lp_fragment_address, place.hp_fragment_address
        part = adam.state[flat][moment][there.start : there.start + there.numel]
        whole[here.start : here.start + here.numel] = part
    dist.all_reduce(whole)
    return whole.reshape(parameter.shape)


if __name__ == "__main__":
    init_distributed()
    models, out, *cases = sys.argv[1:]
    for case in cases:
        found = main(Path(models), Path(out), case)
        if dist.get_rank() == 0:
            print("FOUND", json.dumps([found]), flush=True)
    dist.barrier()
    os._exit(0)
