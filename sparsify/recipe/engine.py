"""The sections `engine`, `launch` and `tracking`, and the attention implementations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from sparsify.errors import RecipeError
from sparsify.recipe.fields import NonNegativeInt, Processes, Section

AUTO_STAGE = -1
Attention = Literal["sdpa", "flex_attention"]
"""Not flash_attention_2: transformers tells documents apart there only when a forward pass has one sequence."""
TORCHRUN = "torchrun"


@dataclass
class EngineSection(Section):
    zero_stage: Annotated[int, Field(ge=AUTO_STAGE, le=3, description="Allowed: 0 to 3, or engine=auto.")]
    """0 to 3; AUTO_STAGE (`engine=auto`) leaves stage, offload, micro-batch and checkpointing to the plan."""
    auto_micro_batch: bool = True
    """`engine=auto` may replace training.micro_batch_size; the batch stays."""
    auto_checkpointing: bool = True
    """`engine=auto` may replace training.gradient_checkpointing."""
    auto_offload: bool = True
    """`engine=auto` may move optimiser and weights to host memory. On GPUs only; needs a C++ compiler."""
    planned_gpu: str | None = None
    """GPU that `plan` assumes, one per process, unless --hardware is given: `h100-80gb`, for example. Null is this machine.
    Training always uses the devices present."""
    offload_optimizer_to_cpu: bool = False
    """ZeRO stage 1 or above; needs a C++ compiler for DeepSpeed's CPU Adam."""
    offload_parameters_to_cpu: bool = False
    """ZeRO stage 3 only."""
    reduce_bucket_elements: Annotated[int, Field(ge=1, le=2**31 - 1)] = 50_000_000
    attention: Attention = "sdpa"
    """Neither attends across the documents of a sequence; flex_attention skips blocks between documents instead of
    masking them, and trains on a GPU only."""


def check_auto(engine: EngineSection) -> None:
    """Refuses settings that `engine=auto` would replace, and auto_* settings without it."""
    if engine.zero_stage != AUTO_STAGE:
        for key in ("auto_micro_batch", "auto_checkpointing", "auto_offload"):
            if not getattr(engine, key):
                raise RecipeError(
                    f"engine.{key} is false with engine.zero_stage={engine.zero_stage}, where nothing is chosen.",
                    next_step="Use engine=auto, or omit it.",
                )
        return
    for key in ("offload_optimizer_to_cpu", "offload_parameters_to_cpu"):
        if getattr(engine, key):
            raise RecipeError(
                f"engine.{key} is set with engine=auto, which decides it.",
                next_step="Omit it, or use engine=zero3_offload.",
            )


@dataclass
class LaunchSection(Section):
    """Processes and machines; no setting changes what is trained."""

    processes: Processes = 1
    """Training processes on each machine, one GPU each where there are GPUs."""
    nodes: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Number of machines. Each runs the same command except for `node_rank`, with a shared `run_dir` and `cache_dir`."""
    node_rank: NonNegativeInt = 0
    """Index of this machine, from 0. Node 0 resolves the recipe, converts and tokenises; the others follow it."""
    rendezvous: str | None = None
    """HOST:PORT of node 0 for several nodes; or `torchrun`, which then sets `nodes` and `node_rank`."""
    hostfile: str | None = None
    """A DeepSpeed hostfile, lines of `HOST slots=N`. The command runs on the first host and starts the others by ssh; nodes and
    processes are the file's."""
    threads_per_process: Processes | None = None
    """CPU threads per process; null divides the machine's cores evenly."""
    ingest_processes: Processes = 1
    """Background ingest processes, which tokenise ahead of training."""
    accept_changed_data: bool = False
    """Resume a run even if its text or tokenizer has changed since it began; the lock records it."""

    @property
    def total_processes(self) -> int:
        return self.nodes * self.processes


def check_nodes(launch: LaunchSection) -> None:
    """Refuses a rendezvous that the nodes cannot share.

    Raises:
        RecipeError: Naming the setting.
    """
    if not 0 <= launch.node_rank < launch.nodes:
        raise RecipeError(
            f"launch.node_rank is {launch.node_rank} of launch.nodes={launch.nodes}.",
            allowed=f"Allowed: 0 to {launch.nodes - 1}.",
        )
    if launch.hostfile is not None or launch.rendezvous == TORCHRUN:
        source = "launch.hostfile" if launch.hostfile is not None else "launch.rendezvous=torchrun"
        both = launch.hostfile is not None and launch.rendezvous is not None
        if both or launch.nodes > 1 or launch.node_rank > 0:
            raise RecipeError(
                f"{source} is set together with launch.nodes={launch.nodes}, launch.node_rank={launch.node_rank}, "
                f"launch.rendezvous={launch.rendezvous}.",
                allowed="It says all of these itself.",
                next_step="Omit the others.",
            )
        return
    host, _, port = (launch.rendezvous or "").rpartition(":")
    if launch.nodes == 1 and launch.rendezvous is not None:
        raise RecipeError(
            f"launch.rendezvous={launch.rendezvous} would be ignored: launch.nodes is 1.",
            next_step="Set launch.nodes, or omit launch.rendezvous.",
        )
    if launch.nodes > 1 and not (host and port.isdigit()):
        raise RecipeError(
            f"launch.nodes is {launch.nodes}, and launch.rendezvous is {launch.rendezvous}.",
            allowed="HOST:PORT of node 0, the same for every node.",
            next_step="Set launch.rendezvous, such as node0.cluster:29400.",
        )


@dataclass
class TrackingSection(Section):
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Mode of Weights & Biases. metrics.jsonl and sparsity.jsonl are always written. No error of the tracker ends a run;
    `online` needs a key, and becomes `offline` where the server cannot be reached."""
    wandb_project: str = "sparsify"
