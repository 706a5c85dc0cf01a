"""What all rewrites of matrices share: a layer's projections in the order in which it computes them, each on what those before it,
rewritten already, feed it.

Masks that the source stores apply: a projection's inputs are what is left of them. The embedding, the output layer, routers and
norms stay. In a mixture of experts a matrix sees the tokens that are routed to its expert, or, with `reads_all_tokens`, all of them;
what the layer gives on is routed either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch

from sparsify.methods.attention_refit import AttentionLayer
from sparsify.methods.base import Rewritten, WeightMethod
from sparsify.methods.calibrated_replacement import BARE
from sparsify.methods.layer_expert import Expert
from sparsify.methods.layerwise import Layer
from sparsify.methods.reconstruction import Errors
from sparsify.methods.sites import rows_of
from sparsify.methods.weights.statistics import InputStatistics
from sparsify.recipe.sparsification import ConversionSection

ATTENTION_STEPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
BLOCK_STEPS = (("gate_proj", "up_proj"), ("down_proj",))
"""The projections of a layer, those together that read at the same time."""

Reads = Callable[[], Iterator[dict[str, torch.Tensor]]]
"""Gives what projections read, by their names, [rows, channels] each; again on each call."""


class MatrixRewrite(WeightMethod):
    """A method that rewrites the matrices of a layer one by one; its subclasses say what becomes of one.

    Attributes:
        reads: What is summed of the inputs of a matrix.
        outcome: What a rewritten matrix is called in records: `error_OUTCOME` is its block's error.
    """

    reads: ClassVar[Literal["nothing", "norms", "products"]]
    outcome: ClassVar[str]
    needs_new_activation = False

    def rewritten(
        self, layer: int, weights: Mapping[str, torch.Tensor], seen: Mapping[str, InputStatistics]
    ) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
        """Matrices [outputs, inputs] in fp32 that read at the same time: the name of each, what replaces it, and its record, whose
        `by` and `because` say which method it was and why not the wanted one.
        """
        raise NotImplementedError

    def coordinates(self, projection: str, x: torch.Tensor) -> torch.Tensor:
        """The rows that a projection reads, [rows, channels], as the statistics sum them."""
        return x

    @property
    def reads_values(self) -> bool:
        return self.reads != "nothing"

    @property
    def reads_all_tokens(self) -> bool:
        """Whether the matrices of every expert see all tokens."""
        return False

    def line(self, records: list[dict[str, Any]]) -> str:
        """What is said of a block when it is done, from the records of its experts."""
        raise NotImplementedError

    def rewrite_attention(self, attention: AttentionLayer, conversion: ConversionSection) -> tuple[dict[str, Any], str]:
        record: dict[str, Any] = {}
        of, dtype = attention.attention, attention.dtype
        for names in ATTENTION_STEPS:

            def reads(names: tuple[str, ...] = names) -> Iterator[dict[str, torch.Tensor]]:
                for part in attention.sequences():
                    yield _rows(of.reads(names, part.converted, part.position_ids), part.fit)

            weights = {name: of.weight(name).clone() for name in names}
            for name, new, found in self.rewritten(attention.number, weights, self._statistics(weights, reads)):
                of.refit(name, new.to(dtype).float(), dtype)
                record[name] = found
        return {"attention": {"weights": record}}, "; ".join(fallbacks([{"weights": record}]))

    def rewrite(self, layer: Layer, conversion: ConversionSection) -> Rewritten:
        experts: list[Expert] = []
        records: list[dict[str, Any]] = [{"weights": {}} for _ in layer.replaced]
        for number, expert in enumerate(layer.replaced):
            for names in BLOCK_STEPS:

                def reads(
                    number: int = number, names: tuple[str, ...] = names, expert: Expert = expert
                ) -> Iterator[dict[str, torch.Tensor]]:
                    for chunk in layer.inputs():
                        token = chunk.fit if self.reads_all_tokens else rows_of(chunk, number)[0]
                        yield expert.reads(names, chunk.x[token])

                weights = {name: expert.weight(name) for name in names}
                for name, new, found in self.rewritten(layer.number, weights, self._statistics(weights, reads)):
                    expert = replace(expert, **{name.removesuffix("_proj"): new.to(layer.dtype).float()})
                    records[number]["weights"][name] = found
            experts.append(expert)
        stages = {"dense": layer.dense, BARE: layer.replaced, self.last_stage: experts}
        if repr(layer.dense[0].activation) == repr(layer.replaced[0].activation):
            del stages[BARE]
        if layer.measure:
            for number, record in enumerate(records):
                record |= _errors(layer, number, experts[number], self.outcome)
        return Rewritten(stages, {"experts": records}, self._line(records, layer.measure))

    def _statistics(self, weights: Mapping[str, torch.Tensor], reads: Reads) -> dict[str, InputStatistics]:
        """What each matrix reads; those that read the very same share one."""
        found: dict[str, InputStatistics] = {}
        for read in reads() if self.reads != "nothing" else ():
            added: dict[int, str] = {}
            for name, x in read.items():
                first = added.setdefault(id(x), name)
                if first == name:
                    if name not in found:
                        found[name] = InputStatistics(x.shape[1], x.device, products=self.reads == "products")
                    found[name].add(self.coordinates(name, x))
                else:
                    found[name] = found[first]
        for name, weight in weights.items():
            if name not in found:
                found[name] = InputStatistics(weight.shape[1], weight.device, products=False)
        return found

    def _line(self, records: list[dict[str, Any]], measured: bool) -> str:
        line, key = self.line(records), f"error_{self.outcome}"
        errors = [record[key] for record in records if measured and record[key] is not None]
        if errors:
            line += f", relative error {sum(errors) / len(errors):.3f}"
        return line + "".join(f"; {note}" for note in fallbacks(records))


def fallbacks(records: list[dict[str, Any]]) -> list[str]:
    """Which matrices of a block were rewritten by another method than the wanted one, and why."""
    notes = []
    for number, record in enumerate(records):
        for name, one in record["weights"].items():
            if one["because"]:
                where = f"expert {number}, {name}" if len(records) > 1 else name
                notes.append(f"{where} by {one['by']}: {one['because']}")
    return notes


def _rows(read: Mapping[str, torch.Tensor], fit: torch.Tensor) -> dict[str, torch.Tensor]:
    """The rows of some tokens; what is the same for several names stays the same."""
    rows: dict[int, torch.Tensor] = {}
    for x in read.values():
        if id(x) not in rows:
            rows[id(x)] = x.flatten(0, -2)[fit]
    return {name: rows[id(x)] for name, x in read.items()}


def _errors(layer: Layer, number: int, rewritten: Expert, outcome: str) -> dict[str, Any]:
    """Relative errors of an expert's output on held-out tokens: with the new activation alone, and rewritten."""
    errors = Errors(("bare", "rewritten"), rewritten.down.device)
    for chunk in layer.inputs():
        token, weight = rows_of(chunk, number, "held_out")
        x, weight = chunk.x[token], weight[:, None]
        errors.add(
            (layer.dense[number].output(x) + chunk.gap[token]) * weight,
            bare=layer.replaced[number].output(x) * weight,
            rewritten=rewritten.output(x) * weight,
        )
    return {"error_bare": errors.relative("bare"), f"error_{outcome}": errors.relative("rewritten")}
