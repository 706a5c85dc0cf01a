"""torch.compile on the decoder layers of a model in training, and on nothing else."""

from __future__ import annotations

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
