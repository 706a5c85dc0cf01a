"""torch.compile on the decoder layers of a model in training, and on nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsify.errors import RecipeError
from sparsify.models import SparseModel
from sparsify.recipe.recipe import Recipe
from sparsify.training.kernels.activation import has_compiler


def check_compilable(recipe: Recipe) -> None:
    """Refuses `training.compile` on a machine that has nothing to compile with.

    Raises:
        RecipeError: Naming the setting.
    """
    if recipe.training.compile and not has_compiler():
        raise RecipeError(
            "training.compile is set, and there is no C++ compiler here.",
            allowed="torch.compile writes C++ for a CPU and has it compiled: g++, or what CXX names.",
            next_step="Install one, or set training.compile=false.",
        )


def compile_layers(model: SparseModel, recipe: Recipe) -> None:
    """Lets every decoder layer be compiled at its first pass: once for all, as they have the same code and shapes."""
    if recipe.training.compile:
        for layer in model.model.layers:
            layer.compile()


@contextmanager
def evaluating(engine: Any) -> Iterator[None]:
    """Evaluation mode, in which compiled layers run as they are written.

    A compiled layer would not call the hooks of a probe that came after it was compiled, and every other length of text would
    be compiled anew.
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
