"""The model that trains, inside DeepSpeed's engine: what is called of the engine, its forward passes watched, evaluation mode, and
whole weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from sparsify.models import SparseModel


def is_router(parameter: str) -> bool:
    """Whether a parameter of that name belongs to a router of groups (`models/group_router.py`)."""
    return ".group_router." in parameter


class Engine(Protocol):
    """What is used of `deepspeed.DeepSpeedEngine`.

    Attributes:
        optimizer: DeepSpeed's, around the one that was built for the model.
        micro_steps: Micro-batches so far; where a global batch begins follows from it.
    """

    optimizer: Any
    micro_steps: int
    global_steps: int
    global_samples: int
    skipped_steps: int

    @property
    def module(self) -> SparseModel: ...
    @property
    def device(self) -> torch.device: ...

    def __call__(self, **inputs: Any) -> Any: ...
    def train(self) -> Any: ...
    def eval(self) -> Any: ...
    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool = True) -> Any: ...
    def step(self) -> None: ...
    def zero_grad(self) -> None: ...
    def was_step_applied(self) -> bool: ...
    def get_global_grad_norm(self) -> Any: ...
    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None: ...
    def zero_optimization_stage(self) -> int: ...
    def zero_optimization_partition_weights(self) -> bool: ...
    def save_checkpoint(self, save_dir: str, *, tag: str, save_latest: bool) -> Any: ...
    def load_checkpoint(self, load_dir: str, *, tag: str, load_lr_scheduler_states: bool) -> tuple[str | None, Any]: ...


class ForwardMeter:
    """Context manager that watches a model's forward passes with hooks while it is on.

    It watches outputs, never weights, so partitioned weights (ZeRO-3) do not matter to it. What activation checkpointing computes
    again during the backward pass, with `_in_forward` False, must not be counted again; there hooks only repeat what they keep for it.
    """

    def __init__(self, model: SparseModel) -> None:
        self._model = model
        self._in_forward = False
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        decoder = self._model.model
        self._handles = [
            decoder.register_forward_pre_hook(self._enter_forward),
            decoder.register_forward_hook(self._leave_forward, always_call=True),
        ]
        self._handles += self._watch()
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _watch(self) -> Iterable[RemovableHandle]:
        """Hooks of the modules that are watched."""
        raise NotImplementedError

    def _begin(self) -> None:
        """Before each forward pass of the whole model."""

    def _end(self) -> None:
        """After it."""

    def _enter_forward(self, decoder: nn.Module, _: object) -> None:
        self._begin()
        self._in_forward = True

    def _leave_forward(self, decoder: nn.Module, _: object, output: object) -> None:
        self._in_forward = False
        self._end()


@contextmanager
def evaluating(engine: Engine) -> Iterator[None]:
    """Evaluation mode, in which compiled layers run as they are written.

    A compiled layer would not call the hooks of a probe that came after it was compiled, and every other length of text would
    be compiled again.
    """
    engine.eval()
    try:
        if engine.module.model.layers[0]._compiled_call_impl is None:
            yield
        else:
            with torch.compiler.set_stance("force_eager"):
                yield
    finally:
        engine.train()


def full_weight(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole of a parameter in fp32, its master copy where the engine keeps one; every rank calls it. Not to be written to."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(parameter)
    return parameter.detach().float() if whole is None else whole


@torch.no_grad()
def set_full_weight(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Gives a live parameter the value that rank 0 has for it, and its master copy too; every rank calls it between two steps."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    value = value.contiguous()
    dist.broadcast(value, 0)
    if not hasattr(parameter, "ds_tensor"):  # ZeRO 0 to 2
        parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value)
        return
    with GatheredParameters(parameter, modifier_rank=0):
        parameter.copy_(value)
    # The last rank's part is filled up to the size of the others', which DeepSpeed's own function for whole values overlooks.
    part = parameter.ds_tensor.numel()  # pyright: ignore[reportAttributeAccessIssue]
    mine = torch.zeros(part, device=value.device)
    held = value.flatten()[dist.get_rank() * part :][:part]
    mine[: len(held)] = held
    safe_set_local_fp32_param(parameter, mine)
