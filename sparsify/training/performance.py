"""How fast a run is: recent tokens per second, the share of the hardware's arithmetic that it uses, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from pathlib import Path

import torch

from sparsify.models import SparseModel
from sparsify.plan.cost import training_flops_per_token
from sparsify.plan.hardware import known_gpu
from sparsify.plan.parameters import Architecture, count_parameters

RECENT_STEPS = 50
STATM = Path("/proc/self/statm")


class Performance:
    """Measures of this rank's steps and what the whole run makes of them.

    Args:
        left_tokens: Training tokens that this launch has before it.
    """

    def __init__(
        self,
        model: SparseModel,
        sequence_length: int,
        num_devices: int,
        precision: str,
        left_tokens: int,
    ) -> None:
        architecture = Architecture.of(model.config.to_dict(), None, 1)
        parameters = count_parameters(architecture)
        self._flops_per_token = training_flops_per_token(architecture, parameters, sequence_length)
        gpu = known_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        # The table holds bf16; what fp32 reaches depends on whether TF32 is allowed.
        bf16 = precision == "bf16"
        self._peak_flops = gpu.peak_tflops * 1e12 * num_devices if gpu and bf16 else None
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=RECENT_STEPS)
        self._left_tokens, self._trained_tokens = left_tokens, 0
        self._started = time.monotonic()

    def step(self, num_tokens: int, seconds: float, data_seconds: float) -> dict[str, float | None]:
        """Takes in one step.

        Args:
            num_tokens: Its tokens over all ranks.
            seconds: From where it began to wait for data to where its loss is known.
            data_seconds: Of these, until its data was there.

        Returns:
            What its line holds. `tokens_per_second` and `data_share` are over the recent steps, without validations and
            checkpoints between them; `left_seconds` extrapolates from everything since the launch, these included.
            `mfu` is None where the device's peak is not known.
        """
        self._steps.append((num_tokens, seconds, data_seconds))
        self._trained_tokens += num_tokens
        recent_tokens, recent_seconds, waited_seconds = map(sum, zip(*self._steps, strict=True))
        speed = recent_tokens / max(recent_seconds, 1e-9)
        left_tokens = max(self._left_tokens - self._trained_tokens, 0)
        elapsed_seconds = time.monotonic() - self._started
        return {
            "tokens_per_second": round(speed, 1),
            "flops_per_second": round(speed * self._flops_per_token),
            "mfu": self._peak_flops and round(speed * self._flops_per_token / self._peak_flops, 4),
            "data_seconds": round(data_seconds, 4),
            "data_share": round(waited_seconds / max(recent_seconds, 1e-9), 4),
            "memory_bytes": memory_bytes(),
            "left_seconds": round(left_tokens * elapsed_seconds / self._trained_tokens, 1),
        }


def memory_bytes() -> int:
    """Memory of this rank: the most that torch has reserved on its GPU, else what the process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    if STATM.is_file():
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
