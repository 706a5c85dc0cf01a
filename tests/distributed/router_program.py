"""One of two ranks that trains a Mixtral whose tokens are sent where the case says: RUN_DIR CASE IMPLEMENTATION …"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from sparsify.runs.run_folder import RunFolder
from sparsify.training.deepspeed_engine import init_distributed
from sparsify.training.loop import train
from sparsify.training.worker import build_session

FAR = 1e4


def send_to(first_expert: int) -> Any:
    """A hook that leaves the router two experts to choose from, the same for every token."""

    def hook(router: MixtralTopKRouter, _: object, output: tuple[torch.Tensor, ...]) -> Any:
        away = torch.full((router.num_experts,), FAR)
        away[first_expert : first_expert + router.top_k] = 0
        logits = output[0] - away
        scores, indices = logits.float().softmax(-1).topk(router.top_k, dim=-1)
        return logits, scores / scores.sum(-1, keepdim=True), indices

    return hook


def main(folder: str, case: str, implementation: str) -> dict[str, Any]:
    session = build_session(RunFolder(Path(folder)), lambda: False)
    model = session.engine.module
    model.config._experts_implementation = implementation
    first = {"disjoint": 2 * dist.get_rank(), "underused": 0}[case]
    seen: set[int] = set()
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(send_to(first))
        layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: seen.update(inputs[1].unique().tolist()))
    train(session)
    return {"experts": sorted(seen), "steps": session.state.step}


if __name__ == "__main__":
    init_distributed()
    arguments = iter(sys.argv[1:])
    for folder, case, implementation in zip(arguments, arguments, arguments, strict=True):
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, main(folder, case, implementation))
        if dist.get_rank() == 0:
            print("FOUND", json.dumps(gathered), flush=True)
    dist.barrier()
    os._exit(0)
