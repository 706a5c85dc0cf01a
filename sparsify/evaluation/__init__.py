"""Evaluation: suites of tasks, answered by a model whose activations are counted in the same pass."""
