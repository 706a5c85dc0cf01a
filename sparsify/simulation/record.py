"""Records which slots each token of a text needs, from a model that decodes along the text.

A causal model computes the same for a position whether the positions after it are there or not, so the masks of a decode that writes a
text are those of one forward pass over it, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch

from sparsify.errors import RunError
from sparsify.models import SparseModel
from sparsify.models.activations import ACTIVATIONS, GATES_WITHOUT_ZEROS
from sparsify.models.masking import has_experts, num_experts, num_neurons, ranks_by_proxy, site_rules
from sparsify.simulation.trace import LayerTrace, Masks, RecordedTrace
from sparsify.sparsity.probe import SparsityProbe, Tokens


def natural_fetch(config: Any) -> str:
    """The way to fetch that a model's zeros allow without a predictor (`trace.FETCHES`)."""
    rules = site_rules(config)
    if ranks_by_proxy(rules):
        return "neurons"
    if "ffn_in" in rules:
        return "inputs"
    if "gate" in rules or ACTIVATIONS[config.ffn_activation].gate not in GATES_WITHOUT_ZEROS:
        return "gate_first"
    return "down" if rules.keys() & {"up", "inter"} else "dense"


def check_fetch(fetch: str, config: Any) -> None:
    """Refuses to fetch by zeros that a model does not make.

    Raises:
        RunError: With the way that its zeros allow.
    """
    natural = natural_fetch(config)
    lacking = {
        "inputs": "ffn_in" not in site_rules(config),
        "gate_first": natural not in ("gate_first",),
        "down": natural == "dense",
        "neurons": natural == "dense",
    }
    if lacking.get(fetch, False):
        raise RunError(
            f"--fetch {fetch} would fetch everything: this model makes no such zeros.",
            allowed=f"What its zeros allow is {natural}; dense fetches everything.",
            next_step="Give a model with an activation that makes zeros, or with a mask (docs/methods.md).",
        )


@torch.no_grad()
def record(
    model: SparseModel,
    sequences: Sequence[torch.Tensor],
    fetch: str,
    tell: Callable[[str], None] = lambda _: None,
) -> list[RecordedTrace]:
    """One trace for each sequence.

    Args:
        model: On any device.
        sequences: Token ids, [tokens] each.
        fetch: What a slot is: one of `trace.FETCHES` that `check_fetch` lets pass.
        tell: Gets a line of progress before each sequence.
    """
    traces = []
    for number, ids in enumerate(sequences, 1):
        tell(f"Recording sequence {number} of {len(sequences)}")
        traces.append(_Recorder(model, fetch, len(ids)).run(ids))
    return traces


class _Recorder:
    """An observer of a SparsityProbe that keeps masks in place of counts."""

    def __init__(self, model: SparseModel, fetch: str, tokens: int) -> None:
        config = model.config
        layers = config.num_hidden_layers
        self._model, self._fetch, self._neurons = model, fetch, num_neurons(config)
        self._hidden = config.hidden_size
        experts = num_experts(config)
        self._of_neurons = [np.zeros((tokens, experts * self._neurons), np.bool_) for _ in range(layers)]
        rows = tokens if fetch == "inputs" else 0
        self._of_inputs = [np.zeros((rows, experts * self._hidden), np.bool_) for _ in range(layers)]
        self._inputs: list[Any] = [None] * layers
        self._kept_inputs: list[Any] = [None] * layers
        self._expert, self._rows = 0, torch.empty(0, dtype=torch.int64)

    def run(self, ids: torch.Tensor) -> RecordedTrace:
        blocks: list[Any] = self._model.ffn_blocks()
        layers: list[Any] = list(self._model.model.layers)
        with SparsityProbe(self._model, self), ExitStack() as stack:
            for layer, (decoder_layer, block) in enumerate(zip(layers, blocks, strict=True)):
                hooks = [decoder_layer.mlp.register_forward_pre_hook(partial(self._keep_input, layer))]
                if self._fetch == "inputs":
                    hooks.append(block.input_mask.register_forward_hook(partial(self._keep_inputs, layer)))
                if self._fetch == "gate_first":  # after the probe's own hook, which says whose rows these are
                    hooks.append(block.ffn_activation.register_forward_hook(partial(self._keep_gates, layer)))
                for hook in hooks:
                    stack.callback(hook.remove)
            self._model(ids[None].to(self._model.device), use_cache=False)
        recorded = []
        for of_inputs, of_neurons, read in zip(self._of_inputs, self._of_neurons, self._inputs, strict=True):
            masks = [of_inputs, of_neurons] if self._fetch == "inputs" else [of_neurons]
            recorded.append(LayerTrace(masks, read))
        return RecordedTrace(recorded)

    def begin(self, tokens: Tokens) -> None:
        pass

    def add(self, layer: int, expert: int, tokens: torch.Tensor, block: Any, product: torch.Tensor) -> None:
        self._expert, self._rows = expert, tokens
        if self._fetch == "inputs":
            kept = self._kept_inputs[layer]
            place = slice(expert * self._hidden, (expert + 1) * self._hidden)
            self._of_inputs[layer][tokens.cpu().numpy(), place] = kept[tokens.cpu().numpy()]
        if self._fetch != "gate_first":
            self._put(layer, torch.ones_like(product) if self._fetch == "dense" else product)

    def _keep_input(self, layer: int, block: Any, args: tuple[torch.Tensor, ...]) -> None:
        self._inputs[layer] = args[0].flatten(0, -2).to(torch.float16).cpu().numpy()

    def _keep_inputs(self, layer: int, mask: Any, args: Any, output: torch.Tensor) -> None:
        self._kept_inputs[layer] = (output.flatten(0, -2) != 0).cpu().numpy()

    def _keep_gates(self, layer: int, activation: Any, pre_activations: Any, product: torch.Tensor) -> None:
        experts = self._expert if has_experts(self._model.config) else None
        self._put(layer, activation.masked_gate(pre_activations[0].flatten(0, -2), experts=experts))

    def _put(self, layer: int, values: torch.Tensor) -> None:
        place = slice(self._expert * self._neurons, (self._expert + 1) * self._neurons)
        needed: Masks = (values != 0).cpu().numpy()
        self._of_neurons[layer][self._rows.cpu().numpy(), place] = needed
