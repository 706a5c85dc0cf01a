"""The table of feed-forward activations, which all other code reads.

A gated feed-forward block computes `down_proj(f(gate_proj(x)) * g(up_proj(x)))`. A row of the table names the pair (f, g) by
kinds. Torch modules, training kernels, C++ and Triton implement kinds, so a new pair of known kinds is one row here and no
other edit; a new kind also needs its formula in `models/ffn_activation.py` and in the decoding kernels.

This file imports nothing but the standard library, and is shipped with every export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

GateKind = Literal["silu", "gelu_tanh", "relu", "relu_squared", "shifted_relu", "fatrelu"]
UpKind = Literal["identity", "relu"]

GATES_WITH_THRESHOLD: tuple[GateKind, ...] = ("shifted_relu", "fatrelu")
GATES_WITHOUT_ZEROS: tuple[GateKind, ...] = ("silu", "gelu_tanh")
GATES_WITH_TRAINING_KERNEL: tuple[GateKind, ...] = ("silu", "relu")


@dataclass(frozen=True)
class Activation:
    """One pair of factors; neuron i is inactive for a token where their product is exactly zero.

    Attributes:
        name: Value of `ffn_activation`.
        gate: Kind of the factor of gate pre-activations.
        up: Kind of the factor of up pre-activations.
        formula: The product, as reports print it; t is the gate threshold.
        gate_threshold: The published value of what `shifted_relu` subtracts from the gate and of what `fatrelu` compares it
            with; of a model's own activation (`with_threshold`), that model's value. 0 for every other kind.
        saved_values: Values of one neuron that autograd saves for the backward pass, in a dense block and in fused experts,
            which hold gate and up in one tensor: both factors and their product; silu also saves its input, the square its root.
        saves_mask: Whether autograd also saves one byte for each value: whether it passed.
    """

    name: str
    gate: GateKind
    up: UpKind
    formula: str
    paper: str
    gate_threshold: float = 0.0
    saved_values: tuple[int, int] = (3, 4)
    saves_mask: bool = False

    @property
    def makes_zeros(self) -> bool:
        """Whether products are exactly zero without a threshold on them."""
        return self.gate not in GATES_WITHOUT_ZEROS or self.up == "relu"

    @property
    def has_gate_threshold(self) -> bool:
        return self.gate in GATES_WITH_THRESHOLD

    @property
    def has_training_kernel(self) -> bool:
        """Whether `training/kernels` can compute it in one pass."""
        return self.gate in GATES_WITH_TRAINING_KERNEL

    def with_threshold(self, gate_threshold: float) -> Activation:
        """A copy with a model's own gate threshold, which kinds without one ignore."""
        return replace(self, gate_threshold=gate_threshold) if self.has_gate_threshold else self


ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation(
            "swiglu",
            gate="silu",
            up="identity",
            formula="silu(gate) × up",
            paper="GLU Variants Improve Transformer (Shazeer, arXiv 2002.05202)",
            saved_values=(4, 4),
        ),
        Activation(
            "geglu",
            gate="gelu_tanh",
            up="identity",
            formula="gelu(gate) × up",
            paper="GLU Variants Improve Transformer (Shazeer, arXiv 2002.05202), with the tanh approximation of GELU (1606.08415)",
            saved_values=(4, 4),
        ),
        Activation(
            "reglu",
            gate="relu",
            up="identity",
            formula="max(0, gate) × up",
            paper="ReLU Strikes Back (arXiv 2310.04564), on a gated block",
        ),
        Activation(
            "shifted_relu",
            gate="shifted_relu",
            up="identity",
            formula="max(0, gate − t) × up",
            paper="ReLU Strikes Back (arXiv 2310.04564), its shifted ReLU",
            gate_threshold=1.0,
        ),
        # As published, without a gate, it is relu(x)^2: what drelu computes where gate_proj and up_proj are the same matrix.
        Activation(
            "relu2",
            gate="relu_squared",
            up="identity",
            formula="max(0, gate)² × up",
            paper="ReLU² Wins (arXiv 2402.03804), after Primer (2109.08668), on a gated block",
            saved_values=(4, 5),
        ),
        Activation(
            "fatrelu",
            gate="fatrelu",
            up="identity",
            formula="gate × up where gate > t, else 0",
            paper="ProSparse (arXiv 2402.13516); FATReLU is Kurtz et al. 2020",
            gate_threshold=0.01,
            saves_mask=True,
        ),
        Activation(
            "drelu",
            gate="relu",
            up="relu",
            formula="max(0, gate) × max(0, up)",
            paper="TurboSparse (arXiv 2406.05955), section 3.1",
            saved_values=(3, 3),
        ),
    )
}
"""By name, in the order in which messages list them."""

STOCK_ACTIVATION = "swiglu"
"""What stock checkpoints of most families compute."""


def activation_names(where: Callable[[Activation], bool] = lambda row: True) -> tuple[str, ...]:
    """Names of the rows for which `where` holds, in the table's order."""
    return tuple(name for name, row in ACTIVATIONS.items() if where(row))


def alternatives(names: Sequence[str]) -> str:
    """`a, b or c`, for help texts."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def is_dense(ffn_activation: str, *, is_masked: bool = False) -> bool:
    """Whether a model makes no exact zeros: neither its activation nor a stored mask does."""
    return not ACTIVATIONS[ffn_activation].makes_zeros and not is_masked


def activation_words(ffn_activation: str, *, is_masked: bool) -> str:
    """What tables call a model: `dense`, `drelu`, or `masked swiglu`."""
    if is_masked:
        return f"masked {ffn_activation}"
    return "dense" if is_dense(ffn_activation) else ffn_activation
