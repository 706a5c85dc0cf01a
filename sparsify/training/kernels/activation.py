"""The feed-forward activation in one pass forward and one backward, for training.

Eager torch makes a pass over memory for every operation: three forward and four backward for drelu. Here only the
pre-activations are saved, and one pass each computes the product and both gradients. The values of reglu and drelu are
those of eager torch, bit for bit; swiglu in bf16 is rounded once instead of twice.

The class of the model's own module is changed in place, so hooks, checks and code that looks for a `FfnActivation` find it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, ClassVar, Self, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from sparsify.errors import RecipeError, RunError
from sparsify.methods.objective import Objective, TrainingRun, objective
from sparsify.models import ACTIVATIONS, Activation, FfnActivation
from sparsify.models.ffn_activation import UP_FACTORS
from sparsify.recipe.recipe import Recipe

Backward = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Kernel:
    """An implementation of one activation.

    Attributes:
        forward: (gate, up, zeros) to the product, all [..., neurons]; the number of its exact zeros is added to
            `zeros`, int64 [] or None.
        backward: (gradient of the product, gate, up) to the gradients of gate and up.
    """

    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Backward]


def _product(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    up_factor = UP_FACTORS[activation.up]
    if activation.gate == "relu":
        return torch.relu(gate) * up_factor(up)
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (nn.functional.silu(gate.to(wide)) * up_factor(up.to(wide))).to(gate.dtype)


def _gradients(activation: Activation, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> Backward:
    dtype, up_factor = gate.dtype, UP_FACTORS[activation.up]
    if activation.gate == "relu":
        # The gradient is zero at exactly zero, and NaN passes, as in torch's relu.
        gate_grad = torch.where(gate <= 0, 0.0, grad * up_factor(up))
        up_grad = grad * torch.relu(gate)
    else:
        wide = torch.promote_types(dtype, torch.float32)
        grad, gate, up = grad.to(wide), gate.to(wide), up.to(wide)
        sigmoid = torch.sigmoid(gate)
        gate_grad = grad * up_factor(up) * (sigmoid * (1 + gate * (1 - sigmoid)))
        up_grad = grad * gate * sigmoid
    if activation.up == "relu":
        up_grad = torch.where(up <= 0, 0.0, up_grad)
    return gate_grad.to(dtype), up_grad.to(dtype)


def formulas(
    name: str,
) -> tuple[Callable[..., torch.Tensor], Callable[..., Backward]]:
    """(gate, up) to the product, and (gradient of the product, gate, up) to the gradients of gate and up, by torch."""
    activation = ACTIVATIONS[name]
    assert activation.has_training_kernel, name
    return partial(_product, activation), partial(_gradients, activation)


def plain_kernel(name: str) -> Kernel:
    product_of, backward = formulas(name)

    def forward(gate: torch.Tensor, up: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        product = product_of(gate, up)
        if zeros is not None:
            zeros += (product == 0).sum()
        return product

    return Kernel(forward, backward)


@cache
def inductor_kernel(name: str) -> Kernel:
    product_of, backward_of = formulas(name)

    def counted(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        product = product_of(gate, up)
        return product, (product == 0).sum()

    # Dynamic: the rows that an expert gets differ at every call.
    product_of, backward_of, counted = (
        cast(Any, torch.compile(function, dynamic=True)) for function in (product_of, backward_of, counted)
    )

    def forward(gate: torch.Tensor, up: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        gate, up = _rows(gate), _rows(up)
        if zeros is None:
            return product_of(gate, up)
        product, found = counted(gate, up)
        zeros += found
        return product

    def backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> Backward:
        return backward_of(_rows(grad), _rows(gate), _rows(up))

    return Kernel(forward, backward)


def triton_kernel(name: str) -> Kernel:
    from sparsify.training.kernels import activation_triton

    def forward(gate: torch.Tensor, up: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        return activation_triton.forward(name, gate, up, zeros)

    def backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> Backward:
        return activation_triton.backward(name, grad, gate, up)

    return Kernel(forward, backward)


KERNELS = {"triton": triton_kernel, "inductor": inductor_kernel, "plain": plain_kernel}


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().flatten(0, -2)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        kernel: Kernel,
        zeros: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernel = kernel
        return kernel.forward(gate, up, zeros).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        gate_grad, up_grad = ctx.kernel.backward(grad, gate, up)
        return gate_grad.view(gate.shape), up_grad.view(up.shape), None, None


class FusedFfnActivation(FfnActivation):
    """A `FfnActivation` that a kernel computes; its name and factors stay.

    Attributes:
        kernel: The implementation.
        zeros: Counter of the exact zeros of every product, int64 []; None if they are not counted.
    """

    kernel: Kernel
    zeros: torch.Tensor | None
    num_values: int

    def forward(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        experts: int | torch.Tensor | None = None,
        proxies: tuple[torch.Tensor, ...] | None = None,
        groups: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the neuron activations, of the same shape as `gate` and `up`: [..., neurons]."""
        assert proxies is groups is None, "a masked model is not fused"
        if self.zeros is not None:
            self.num_values += gate.numel()
        return cast(torch.Tensor, _OnePass.apply(gate, up, self.kernel, self.zeros))


def fuse_activation(model: nn.Module, recipe: Recipe) -> None:
    """Fuses every feed-forward activation of the model according to `training.fused_activation`.

    Called again after the activation of the model was replaced, which brings plain ones.

    Raises:
        RecipeError: If it is set and the activation has thresholds, which no kernel supports.
        RunError: If the kernel cannot be built here, or does not compute the formula.
    """
    for activation in _activations(model):
        implementation = _implementation(recipe, activation)
        if implementation is not None:
            fuse(activation, implementation)


def fuse(activation: FfnActivation, implementation: str) -> FusedFfnActivation:
    """Fuses one activation.

    Args:
        activation: An activation with a training kernel and without thresholds; its class is changed in place.
        implementation: A key of KERNELS.

    Raises:
        RunError: If the kernel cannot be built here, or does not compute the formula.
    """
    activation.__class__ = FusedFfnActivation
    fused = cast(FusedFfnActivation, activation)
    fused.kernel = checked_kernel(implementation, activation.name)
    fused.zeros, fused.num_values = None, 0
    return fused


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Computes every activation with the model's own code within the `with` block, as in a loaded model."""
    fused: list[FfnActivation] = [one for one in _activations(model) if type(one) is FusedFfnActivation]
    for activation in fused:
        activation.__class__ = FfnActivation
    try:
        yield
    finally:
        for activation in fused:
            activation.__class__ = FusedFfnActivation


def check_fusible(recipe: Recipe) -> None:
    """Refuses a named kernel that cannot run on this machine.

    Raises:
        RecipeError: Naming what is missing.
    """
    setting = recipe.training.fused_activation
    missing = {
        "triton": None if _triton_is_here() else "there is no GPU with Triton here",
        "inductor": None if has_compiler() else "there is no C++ compiler here",
    }
    if missing.get(setting):
        raise RecipeError(
            f"training.fused_activation is {setting}, and {missing[setting]}.",
            next_step="Set training.fused_activation=auto, which uses what is available.",
        )


def _implementation(recipe: Recipe, activation: FfnActivation) -> str | None:
    setting = recipe.training.fused_activation
    knows = ACTIVATIONS[activation.name].has_training_kernel
    if setting == "off" or (setting == "auto" and (not knows or recipe.blending.budget_share)):
        return None
    if activation.is_masked:
        if setting == "auto" and not recipe.training.count_zeros:
            return None
        requested = "count_zeros=true" if setting == "auto" else f"fused_activation={setting}"
        raise RecipeError(
            f"training.{requested} needs a kernel, and this model stores a mask, which no kernel applies.",
            next_step="Omit it: the model's own code computes them.",
        )
    if setting != "auto":
        return setting
    if recipe.training.compile:
        return None  # the compiler fuses the model's own code
    if _triton_is_here():
        return "triton"
    return "plain" if recipe.training.count_zeros else None


def fastest_implementation() -> str:
    """A key of KERNELS: the fastest that can run here."""
    if _triton_is_here():
        return "triton"
    return "inductor" if has_compiler() else "plain"


def _triton_is_here() -> bool:
    return torch.cuda.is_available() and find_spec("triton") is not None


def has_compiler() -> bool:
    """Whether torch's compiler can build loops here: for a CPU it needs a C++ compiler."""
    return torch.cuda.is_available() or shutil.which(os.environ.get("CXX", "g++")) is not None


@cache
def checked_kernel(implementation: str, name: str) -> Kernel:
    """The kernel, checked against the formula's values and gradients on every pair of signs, including exact zeros.

    Raises:
        RunError: If it cannot be built, or its values differ.
    """
    kernel = KERNELS[implementation](name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.linspace(-2, 2, 33, device=device)
    gate, up = torch.meshgrid(values, values, indexing="ij")
    zeros = torch.zeros((), dtype=torch.int64, device=device)
    try:
        product, grads = kernel.forward(gate, up, zeros), kernel.backward(gate, gate, up)
    except Exception as error:
        raise _broken(implementation, f"cannot be built here: {error}") from error
    formula, gradients = formulas(name)
    expected = (formula(gate, up), *gradients(gate, gate, up))
    for got, wanted in zip((product, *grads), expected, strict=True):
        if not torch.allclose(got.view_as(wanted), wanted, rtol=1e-5, atol=1e-6):
            raise _broken(implementation, f"gives other values than {name} here")
    if int(zeros) != int((expected[0] == 0).sum()):
        raise _broken(implementation, "miscounts zeros here")
    return kernel


def _broken(implementation: str, what: str) -> RunError:
    return RunError(
        f"The {implementation} kernel of the activation {what}.",
        next_step="Set training.fused_activation=off: the values are the same, only slower.",
    )


def _activations(model: nn.Module) -> list[FfnActivation]:
    return [module for module in model.modules() if isinstance(module, FfnActivation)]


class ZeroMeter:
    """Counts exact zeros of the activations of one step, in the pass that computes them.

    Recomputed layers of gradient checkpointing count twice, both zeros and values, so the share is the same.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._zeros = torch.zeros((), dtype=torch.int64, device=device)
        self._activations = [
            activation for activation in _activations(model) if isinstance(activation, FusedFfnActivation)
        ]
        for activation in self._activations:
            activation.zeros, activation.num_values = self._zeros, 0

    def share(self) -> float:
        """Share of exact zeros over all layers and ranks; every rank calls it, once."""
        num_values = 0
        for activation in self._activations:
            num_values += activation.num_values
            activation.zeros = None
        totals = torch.stack([self._zeros, self._zeros.new_tensor(num_values)])
        dist.all_reduce(totals)
        zeros, values = totals.tolist()
        return zeros / max(values, 1)


@objective
class ZeroCount(Objective):
    """Adds the share of exact zeros to every step's line, if `training.count_zeros` is set."""

    name: ClassVar[str] = "zeros"

    def __init__(self, run: TrainingRun) -> None:
        self._engine = run.engine

    @classmethod
    def of(cls, run: TrainingRun) -> Self | None:
        return cls(run) if run.recipe.training.count_zeros else None

    @contextmanager
    def step(self) -> Iterator[None]:
        self._meter = ZeroMeter(self._engine.module, self._engine.device)
        yield

    def after_step(self, loss: float) -> dict[str, Any]:
        return {self.name: self._meter.share()}
