"""One of two ranks that refits a live engine, or trains through milestones: RUN_DIR… in turn.

A folder named `fit…` is compared with the calibrated replacement of the same sequences, which knows neither engine nor ranks. One with `cut` in
its name is stopped where a milestone lies before the next step, saved, and gone on with by a new session.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from safetensors.torch import load_file

from sparsify.methods.calibrate import Calibrator
from sparsify.methods.live_model import full_weight
from sparsify.methods.refits import refit, refit_sequences
from sparsify.mixture.sequences.reader import read_sequence
from sparsify.recipe.sparsification import ConversionSection
from sparsify.runs.run_folder import RunFolder
from sparsify.training.deepspeed_engine import init_distributed, set_learning_rate
from sparsify.training.loop import train
from sparsify.training.session import Session
from sparsify.training.worker import build_session
from tests.ranks import tokenise


def main(run: RunFolder) -> Any:
    tokenise(run)
    session = build_session(run, lambda: False)
    if run.path.name.startswith("fit"):
        return compare(session)
    if "cut" in run.path.name:
        session.stop_requested = lambda: session.state.step == 1
        assert not train(session)
        session = build_session(run, lambda: False)
        assert session.state.step == 1
        assert session.state.methods["blending"] == {"refits": 1}
    assert train(session)
    return None


def compare(session: Session) -> dict[str, Any]:
    """How far the refitted weights are from those of the calibrated replacement, and what became of them in the engine."""
    recipe, engine = session.recipe, session.engine
    sequences = refit_sequences(recipe, 0)
    record = refit(engine, recipe, session.reader, sequences, (0.0, 1.0))
    expected = reference(session, sequences)
    found = masters(engine.module)
    # In bf16 a neuron of which both halves hold about the same may be turned the other way round.
    signless = torch.abs if recipe.training.precision == "bf16" else torch.clone
    live = live_weights(engine.module)
    set_learning_rate(engine, 0.0)
    batch = session.reader.batch(dist.get_rank(), recipe.training.micro_batch_size).tensors
    loss = engine(batch["input_ids"], position_ids=batch["position_ids"]).logits.float().mean()
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss)
    engine.step()
    stepped = live_weights(engine.module)
    return {
        **asdict(record),
        "from_reference": max(
            float((signless(found[name]) - signless(value)).norm() / value.norm()) for name, value in expected.items()
        ),
        "live_is_master": all(torch.equal(live[name], value.to(live[name].dtype)) for name, value in found.items()),
        "stays": all(torch.equal(live[name], value) for name, value in stepped.items()),
    }


def reference(session: Session, sequences: tuple[int, int]) -> dict[str, torch.Tensor]:
    first, count = sequences
    reader = session.reader
    chosen = [read_sequence(reader.streams[name], rank)[0] for name, rank in reader.schedule.sequences_of(first, count)]
    settings = ConversionSection(calibration_tokens=1, refit_target="own")
    state = session.run.path / f"reference-{dist.get_rank()}"
    calibrator = Calibrator(session.run.initial, state, chosen, {"some": chosen[:1]}, settings)
    calibrator.run()
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        stored = load_file(calibrator.tensors_of(layer))
        experts = len(stored) // 2
        for part, names in {"up": ("up_proj", "w3"), "down": ("down_proj", "w2")}.items():
            chosen_names = sorted(name for name in stored if any(f".{n}." in name for n in names))
            assert len(chosen_names) == experts
            tensors[f"{layer}.{part}"] = torch.stack([stored[name] for name in chosen_names])
    return tensors


def masters(model: Any) -> dict[str, torch.Tensor]:
    """Up and down projections by layer, fp32 [experts, …]."""
    return {
        f"{layer}.{part}": value
        for layer, block in enumerate(model.ffn_blocks())
        for part, value in _parts(block, full_weight).items()
    }


def live_weights(model: Any) -> dict[str, torch.Tensor]:
    def gathered(parameter: torch.nn.Parameter) -> torch.Tensor:
        with GatheredParameters(parameter):
            return parameter.detach().clone()

    return {
        f"{layer}.{part}": value
        for layer, block in enumerate(model.ffn_blocks())
        for part, value in _parts(block, gathered).items()
    }


def _parts(block: Any, read: Any) -> dict[str, torch.Tensor]:
    if hasattr(block, "gate_up_proj"):
        return {"up": read(block.gate_up_proj).chunk(2, 1)[1], "down": read(block.down_proj)}
    up, down = read(block.up_proj.weight), read(block.down_proj.weight)
    return {"up": up[None], "down": down[None]}


if __name__ == "__main__":
    init_distributed()
    for name in sys.argv[1:]:
        answer = main(RunFolder(Path(name)))
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, answer)
        if dist.get_rank() == 0:
            import json

            print("FOUND " + json.dumps(answers), flush=True)
    dist.barrier()
    os._exit(0)
