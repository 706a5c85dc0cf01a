"""Liger's kernels in training steps: norms, rotary embedding, and the output projection with its loss.

Liger's own patches replace whole families of models in a process, and their feed-forward blocks compute SwiGLU whatever the model's
activation is. None of them is applied here. The classes of one model's modules are changed in place; its blocks, their activations
and every other model stay.

In evaluation mode all modules run the model's own code: what is validated, sampled or saved does not depend on Liger.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.phi3 import modeling_phi3

from sparsify.conversion.sparse_folder import check_activation
from sparsify.errors import RecipeError
from sparsify.models import SparseModel
from sparsify.recipe.recipe import Recipe
from sparsify.runtime.triton_ffn import interpreting
from sparsify.training.kernels.liger_ops import (
    PACKAGE,
    Norm,
    check_kernels,
    installed_version,
    linear_cross_entropy,
    rms_norm,
    rotate,
)

OLDEST_VERSION = "0.8.5"
"""Oldest supported version."""
ROTARY = "apply_rotary_pos_emb"
"""Name of the function that transformers' attention calls for its rotary embedding."""


class _KindOfNorm(NamedTuple):
    """A norm of transformers, the name of its epsilon, and how Liger computes it."""

    stock: type[nn.Module]
    epsilon: str
    kind: Norm
    offset: float


NORMS = (
    _KindOfNorm(modeling_llama.LlamaRMSNorm, "variance_epsilon", "llama", 0.0),
    _KindOfNorm(modeling_olmo2.Olmo2RMSNorm, "variance_epsilon", "gemma", 0.0),
    _KindOfNorm(modeling_gemma3.Gemma3RMSNorm, "eps", "gemma", 1.0),
)
ROTARIES = tuple(getattr(module, ROTARY) for module in (modeling_llama, modeling_olmo2, modeling_phi3))
"""Rotary embeddings of all of a head. OLMo's rounds at the end; Phi-3's can cover a part of each head, which `use_liger` refuses."""


class FusedNorm(nn.Module):
    """An RMS norm that Liger computes in training."""

    weight: nn.Parameter
    kind_of_norm: _KindOfNorm

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(hidden_states)
        norm = self.kind_of_norm
        return rms_norm(hidden_states, self.weight, getattr(self, norm.epsilon), norm.kind, norm.offset)


class FusedAttention(nn.Module):
    """A family's attention, with Liger's rotary embedding in training."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = _with_rotary(type(self).__mro__[2]) if self.training else super().forward
        return forward(self, *args, **kwargs) if self.training else forward(*args, **kwargs)


@cache
def fused_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class of a module with Liger's kernel in it; None for classes that no kernel computes."""
    name = kind.__name__
    if name.endswith("RMSNorm"):
        norm = next((one for one in NORMS if _same(kind.forward, one.stock.forward)), None)
        return norm and type(f"Fused{name}", (FusedNorm, kind), {"kind_of_norm": norm})
    if not name.endswith("Attention"):
        return None
    # The forward pass may be inherited from a class of another file, where its rotary embedding is, too.
    rotary = vars(sys.modules[kind.forward.__module__]).get(ROTARY)
    known = rotary is not None and any(_same(rotary, one) for one in ROTARIES)
    return type(f"Fused{name}", (FusedAttention, kind), {}) if known else None


def _same(one: Any, other: Any) -> bool:
    """Whether two functions of transformers, which copies them from model to model, have the same code."""
    codes = [inspect.unwrap(each).__code__ for each in (one, other)]
    return len({(code.co_code, code.co_names, code.co_consts[1:]) for code in codes}) == 1


class LossHead(nn.Linear):
    """Output projection that returns a loss while `labels` is set, without computing all logits at once.

    It is a module so that the loss is computed where its weight is: ZeRO-3 gathers it for this module's forward pass.

    Attributes:
        labels: Labels of the loss, int64 [sequences, tokens]; None to return logits.
    """

    labels: torch.Tensor | None

    def forward(self, input: torch.Tensor) -> Any:
        """Logits of hidden states [sequences, tokens, hidden]; with labels their `linear_cross_entropy`."""
        if self.labels is None:
            return super().forward(input)
        return linear_cross_entropy(input, self.weight, self.labels)

    @contextmanager
    def loss_of(self, labels: torch.Tensor) -> Iterator[None]:
        """Makes forward passes return the loss of these labels within the `with` block."""
        self.labels = labels
        try:
            yield
        finally:
            self.labels = None


def use_liger(model: SparseModel, recipe: Recipe) -> None:
    """Uses Liger's kernels in the model's training steps if `training.liger_kernels` is set.

    Raises:
        RunError: If a kernel cannot be built here, or its values differ from torch's.
        RuntimeError: If the model has unknown modules, or does not apply the recipe's activation.
    """
    if not recipe.training.liger_kernels:
        return
    check_kernels("cuda" if torch.cuda.is_available() else "cpu", model.dtype)
    kinds = {module: fused_class(type(module)) for module in model.modules()}
    replaced = {module: fused for module, fused in kinds.items() if fused is not None}
    unknown = {type(module).__name__ for module in kinds.keys() - replaced.keys() if _should_be(module)}
    layers, attention = len(model.model.layers), sum(issubclass(one, FusedAttention) for one in replaced.values())
    if not unknown and (attention != layers or len(replaced) - attention < 2 * layers + 1):
        unknown = {"the norms or the attention"}
    if (model.config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        unknown.add("rotary embeddings of a part of each head")
    if getattr(model.config, "final_logit_softcapping", None) is not None or type(model.lm_head) is not nn.Linear:
        unknown.add("its loss")
    if unknown:
        raise RecipeError(
            f"training.liger_kernels is set, and its kernels do not compute {', '.join(sorted(unknown))} of a "
            f"{model.config.model_type}.",
            next_step="Set training.liger_kernels=false.",
        )
    for module, fused in replaced.items():
        module.__class__ = fused
    model.lm_head.__class__ = LossHead
    cast(Any, model.lm_head).labels = None
    check_activation(model, recipe.activation.ffn_activation)


def _should_be(module: nn.Module) -> bool:
    """Whether a module's name says that it is what Liger has a kernel for."""
    return type(module).__name__.endswith(("RMSNorm", "Attention"))


@cache
def _with_rotary(attention: type[nn.Module]) -> Callable[..., Any]:
    """The forward pass of one of transformers' classes, with `rotate` instead of its module's rotary embedding.

    It is the same code object with other globals, so that the module and every other model stay unchanged.
    """
    plain = attention.forward
    if not isinstance(plain, FunctionType) or ROTARY not in plain.__code__.co_names:
        raise RuntimeError(f"{attention.__name__} does not call {ROTARY}")
    own = FunctionType(plain.__code__, plain.__globals__ | {ROTARY: rotate}, plain.__name__)
    own.__defaults__, own.__kwdefaults__ = plain.__defaults__, plain.__kwdefaults__
    return own


def check_liger(recipe: Recipe) -> None:
    """Refuses `training.liger_kernels` on a machine that cannot run them.

    Raises:
        RecipeError: Naming what is missing.
    """
    if not recipe.training.liger_kernels:
        return
    if not torch.cuda.is_available() and not interpreting():
        raise RecipeError(
            "training.liger_kernels is set, and there is no GPU here.",
            allowed="Liger's kernels run on a GPU.",
            next_step="Set training.liger_kernels=false.",
        )
    found = installed_version()
    if found is None or _numbers(found) < _numbers(OLDEST_VERSION):
        raise RecipeError(
            "training.liger_kernels is set, and "
            + (f"{PACKAGE} is not installed." if found is None else f"{PACKAGE} is {found}."),
            allowed=f"{PACKAGE} {OLDEST_VERSION} or newer.",
            next_step=f"`pip install -U {PACKAGE}`, or set training.liger_kernels=false.",
        )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3] if part.isdigit()]


def liger_sentence() -> str:
    return (
        f"Liger {installed_version()} computes norms, rotary embedding and loss in training steps; "
        "validations run the model's own code."
    )
