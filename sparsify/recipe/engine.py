"""On what a run trains: `engine`, `launch`, `tracking`, and which kernels there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field

from sparsify.errors import RecipeError
from sparsify.recipe.fields import NonNegativeInt, PositiveInt, Section

AUTO_STAGE = -1
Attention = Literal["sdpa", "flex_attention"]
"""Not flash_attention_2: transformers tells documents apart there only when a forward pass has one sequence."""
ATTENTION_IMPLEMENTATIONS: tuple[str, ...] = get_args(Attention)
TORCHRUN = "torchrun"


@dataclass
class EngineSection(Section):
    """DeepSpeed ZeRO."""

    zero_stage: Annotated[
        int, Field(ge=AUTO_STAGE, le=3, description="Allowed: 0 to 3, or engine=auto.")
    ]
    """0 to 3; AUTO_STAGE (`engine=auto`) leaves stage, offload, micro-batch and checkpointing to the plan."""
    auto_micro_batch: bool = True
    """`engine=auto` may replace training.micro_batch_size; the batch stays."""
    auto_checkpointing: bool = True
    """`engine=auto` may replace training.gradient_checkpointing."""
    auto_offload: bool = True
    """`engine=auto` may move optimiser and weights to host memory. On GPUs only; needs a C++ compiler."""
    planned_gpu: str | None = None
    """The GPU that `plan` reckons with, launch.processes of them, unless --hardware says otherwise: `h100-80gb`, for example.
    Null is this machine. Training always takes what is there."""
    offload_optimizer_to_cpu: bool = False
    """ZeRO stage 1 or above; needs a C++ compiler for DeepSpeed's CPU Adam."""
    offload_parameters_to_cpu: bool = False
    """ZeRO stage 3 only."""
    reduce_bucket_elements: PositiveInt = 50_000_000
    attention: Attention = "sdpa"
    """One of ATTENTION_IMPLEMENTATIONS. Both keep the documents of a sequence apart; flex_attention skips what lies between
    them instead of masking it, and trains on a GPU only."""


def check_auto(engine: EngineSection) -> None:
    """Refuses what `engine=auto` would silently replace, and what only it knows."""
    if engine.zero_stage != AUTO_STAGE:
        for key in ("auto_micro_batch", "auto_checkpointing", "auto_offload"):
            if not getattr(engine, key):
                raise RecipeError(
                    f"engine.{key} is false with engine.zero_stage={engine.zero_stage}, where nothing is chosen.",
                    next_step="Use engine=auto, or leave it out.",
                )
        return
    for key in ("offload_optimizer_to_cpu", "offload_parameters_to_cpu"):
        if getattr(engine, key):
            raise RecipeError(
                f"engine.{key} is set with engine=auto, which decides it.",
                next_step="Leave it out, or use engine=zero3_offload.",
            )


@dataclass
class LaunchSection(Section):
    """On what to run; none of it changes what is trained."""

    processes: PositiveInt = 1
    """Training processes on each machine, one GPU each where there are GPUs."""
    nodes: PositiveInt = 1
    """Machines. Each is given the same command but for `node_rank`, and sees the same `run_dir` and `cache_dir`."""
    node_rank: NonNegativeInt = 0
    """Which of them this is, from 0. Node 0 resolves the recipe, converts and tokenises; the others follow it."""
    rendezvous: str | None = None
    """HOST:PORT of node 0, where several nodes meet; or `torchrun`, under which `nodes` and `node_rank` are torchrun's."""
    hostfile: str | None = None
    """A DeepSpeed hostfile, lines of `HOST slots=N`. The command runs on the first host and starts the others by ssh; nodes and
    processes are the file's."""
    threads_per_process: PositiveInt | None = None
    """CPU threads of each process; the machine's cores shared evenly unless given."""
    ingest_processes: PositiveInt = 1
    """Processes that tokenise ahead of training, as long as there is something left to tokenise."""
    accept_changed_data: bool = False
    """Go on with a run although its text or its tokenizer changed since it began; the lock records it."""

    @property
    def total_processes(self) -> int:
        """Ranks over all machines."""
        return self.nodes * self.processes


def check_nodes(launch: LaunchSection) -> None:
    """Refuses a way to meet that the nodes cannot share.

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
                f"{source} is set beside launch.nodes={launch.nodes}, launch.node_rank={launch.node_rank}, "
                f"launch.rendezvous={launch.rendezvous}.",
                allowed="It says all of these itself.",
                next_step="Leave the others out.",
            )
        return
    host, _, port = (launch.rendezvous or "").rpartition(":")
    if launch.nodes == 1 and launch.rendezvous is not None:
        raise RecipeError(
            f"launch.rendezvous={launch.rendezvous} would be ignored: launch.nodes is 1.",
            next_step="Set launch.nodes, or leave out launch.rendezvous.",
        )
    if launch.nodes > 1 and not (host and port.isdigit()):
        raise RecipeError(
            f"launch.nodes is {launch.nodes}, and launch.rendezvous is {launch.rendezvous}.",
            allowed="HOST:PORT of node 0, the same for every node.",
            next_step="Set launch.rendezvous, such as node0.cluster:29400.",
        )


@dataclass
class TrackingSection(Section):
    """Who else is told."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """`disabled`, `offline` or `online`. metrics.jsonl and sparsity.jsonl are written in any case."""
    wandb_project: str = "sparsify"
