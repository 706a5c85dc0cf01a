"""Quantised projections computed in integers: each projection of a model by itself, its forward replaced (`integer_products.py`).

Prompts and decoding steps use the same kernels. Sequences that are padded, or packed into one row, keep the module's own forward at
projections that are smoothed: their runtime scales are of parts of a call.
"""

from __future__ import annotations

from typing import Any

import torch

from sparsify.errors import ModelError
from sparsify.models.integer_linear import CODES
from sparsify.runtime.integer_products import integer_kernels, integer_product, tiled, turned


class IntegerForward:
    """The forward of one `IntegerLinear`, with its codes as the kernels read them."""

    def __init__(self, module: Any, threads: int | None) -> None:
        self._module, self._threads = module, threads
        self.matrix = tiled(module.codes(), module.weight_scales, module.weight_bits)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., inputs] to [..., outputs], in the dtype of x."""
        module = self._module
        group = module.smooth_group if module.activation_bits < 16 else None
        if group is not None and _has_parts(module.sequences):
            return type(module).forward(module, x)
        rows = x.reshape(-1, x.shape[-1])
        if module.turned > 1:
            rows = turned(rows, module.turned)
        tokens = x.shape[-2] if x.dim() > 1 else 1
        together = len(rows) if group is None or tokens == 1 else tokens
        outputs = [
            integer_product(
                one,
                self.matrix,
                module.activation_bits,
                smooth_group=group,
                apart=tokens == 1,
                threads=self._threads,
            )
            for one in rows.split(max(1, together))
        ]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if module.bias is not None:
            output += module.bias.float()
        return output.to(x.dtype).view(*x.shape[:-1], -1)


def _has_parts(sequences: Any) -> bool:
    """Whether a call has several sequences in a row, or padding."""
    return sequences is not None and (sequences.padding is not None or sequences.numbers is not None)


class IntegerProjections:
    """All quantised projections of a model.

    Args:
        model: On a CPU, with `config.quantisation`.
        threads: Of the kernels; default: torch's number.

    Raises:
        ModelError: If the model is elsewhere, or there are no kernels.
    """

    def __init__(self, model: Any, threads: int | None = None) -> None:
        device = next(model.parameters()).device.type
        if device != "cpu" or integer_kernels() is None:
            where = f"the model is on {device}" if device != "cpu" else "there is no C++ compiler"
            raise ModelError(
                f"The model holds integers instead of weights, whose kernels are for a CPU, and {where}.",
                next_step="Decode it as it is, simulated: sparsify generate --dense, or model.generate() alone.",
            )
        self.modules = [one for one in model.modules() if hasattr(one, CODES)]
        for module in self.modules:
            module.forward = IntegerForward(module, threads)

    @property
    def num_bytes(self) -> int:
        """Memory of the codes as the kernels read them, in addition to those that are stored."""
        return sum(module.forward.matrix.nbytes for module in self.modules)

    def remove(self) -> None:
        """Restores the simulated forwards."""
        for module in self.modules:
            del module.forward
