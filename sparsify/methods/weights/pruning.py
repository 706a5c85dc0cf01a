"""What all methods of weight sparsity share: a layer's projections in the order in which it computes them, each on what those
before it, pruned already, feed it.

Masks that the source stores apply: a projection's inputs are what is left of them. The embedding, the output layer, routers and
norms stay dense. In a mixture of experts a matrix sees the tokens that are routed to its expert, or, with `calibrate_all_experts`, all of
them; what the layer gives on is routed either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator

from sparsify.conversion.weight_zeros import WeightSparsity, weight_sparsity
from sparsify.errors import RecipeError
from sparsify.methods.attention_refit import AttentionLayer
from sparsify.methods.base import MethodSettings, Rewritten, WeightMethod
from sparsify.methods.calibrated_replacement import BARE
from sparsify.methods.layerwise import Expert, Layer
from sparsify.methods.reconstruction import Errors
from sparsify.methods.sites import rows_of
from sparsify.methods.weights.statistics import InputStatistics
from sparsify.methods.weights.zeros import ZeroPattern, parse_pattern, share_of_zeros
from sparsify.models import SparseConfig
from sparsify.models.masking import num_experts, projection_shapes
from sparsify.recipe.sparsification import ConversionSection

ATTENTION_STEPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
BLOCK_STEPS = (("gate_proj", "up_proj"), ("down_proj",))
"""The projections of a layer, those together that read at the same time."""
SECONDS_OF_HOUR = 60


class PruningSettings(MethodSettings):
    weight_sparsity: float = Field(
        gt=0, lt=1, description="Share of the weights of every linear projection that become zero, such as 0.5."
    )
    pattern: str = Field(
        default="unstructured",
        description="`unstructured`, or N:M, such as 2:4: of M consecutive weights of a row N stay, and 1 - N/M is weight_sparsity.",
    )
    layer_shares: list[float] | None = Field(
        default=None,
        description="Instead of the same share in all layers, one for each, from 0 to below 1, whose mean is weight_sparsity.",
    )

    calibrate_all_experts: bool = Field(
        default=False,
        description="In a mixture of experts, whether every expert is pruned on all tokens, and not only on those routed to it.",
    )

    @field_validator("pattern", mode="before")
    @classmethod
    def _not_a_time(cls, value: Any) -> Any:
        # YAML 1.1 reads 2:4 as two minutes and four seconds.
        minutes = isinstance(value, int) and not isinstance(value, bool)
        return f"{value // SECONDS_OF_HOUR}:{value % SECONDS_OF_HOUR}" if minutes else value

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, value: str, info: ValidationInfo) -> str:
        if "weight_sparsity" in info.data:
            parse_pattern(value, info.data["weight_sparsity"])
        return value

    @field_validator("layer_shares")
    @classmethod
    def _has_mean(cls, value: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if value is None or "weight_sparsity" not in info.data:
            return value
        if info.data.get("pattern", "unstructured") != "unstructured":
            raise ValueError(f"pattern={info.data['pattern']} has the same share everywhere")
        mean = sum(value) / max(len(value), 1)
        if not all(0 <= one < 1 for one in value) or abs(mean - info.data["weight_sparsity"]) > 1e-3:
            raise ValueError(f"they are to be from 0 to below 1, and their mean is {mean:.4f}")
        return value


@dataclass(frozen=True)
class Pruned:
    """A pruned matrix.

    Attributes:
        by: The method that chose the zeros.
        because: Why it is not the one that was wanted; None if it is.
    """

    weight: torch.Tensor
    by: str
    because: str | None = None


class WeightPruning(WeightMethod):
    """A method of weight sparsity; its subclasses say what becomes of one matrix.

    Attributes:
        reads: What `prune` looks at of the inputs.
    """

    Settings: ClassVar[type[MethodSettings]] = PruningSettings
    reads: ClassVar[Literal["nothing", "norms", "products"]]
    needs_new_activation = False

    def __init__(self, settings: PruningSettings) -> None:
        self.settings, self.mask = settings, None
        self.last_stage, self.revives_zeros = self.name, False
        self.zeros = parse_pattern(settings.pattern, settings.weight_sparsity)

    def prune(self, weight: torch.Tensor, seen: InputStatistics, zeros: ZeroPattern) -> Pruned:
        """One matrix [outputs, inputs] in fp32, from what it reads. Weights that are zero stay zero."""
        raise NotImplementedError

    @property
    def config_fields(self) -> dict[str, Any]:
        settings = self.settings
        stored = WeightSparsity(self.name, settings.pattern, settings.weight_sparsity)
        return {"weight_sparsity": asdict(stored)}

    def check_model(self, config: SparseConfig) -> None:
        """Raises RecipeError if it has other layers or sizes than the settings say, or more zeros already."""
        settings, key = self.settings, "conversion.method_settings"
        old, layers = weight_sparsity(config), config.num_hidden_layers
        if old is not None and old.sparsity > settings.weight_sparsity:
            raise RecipeError(
                f"conversion.weight_sparsity is {settings.weight_sparsity:g}, and the model has {old.words} already.",
                allowed=f"{old.sparsity:g} or more: zeros are added, and none taken back.",
            )
        if settings.layer_shares is not None and len(settings.layer_shares) != layers:
            raise RecipeError(
                f"{key}.layer_shares has {len(settings.layer_shares)} shares, and the model {layers} layers.",
                allowed="One share for each layer.",
            )
        if settings.calibrate_all_experts and (self.reads == "nothing" or num_experts(config) == 1):
            because = f"{self.name} reads no tokens" if self.reads == "nothing" else "the model has no experts"
            raise RecipeError(
                f"{key}.calibrate_all_experts is true, and {because}.",
                allowed="wanda and sparsegpt on a mixture of experts.",
                next_step="Omit it.",
            )
        group = self.zeros.group
        for name, (_, inputs) in projection_shapes(config).items():
            if inputs % group:
                raise RecipeError(
                    f"{key}.pattern is {settings.pattern}, and {name} has {inputs} inputs.",
                    allowed=f"A pattern whose group divides the inputs of every projection; {group} does not divide {inputs}.",
                )

    def rewrite_attention(self, attention: AttentionLayer, conversion: ConversionSection) -> tuple[dict[str, Any], str]:
        record: dict[str, Any] = {}
        of, dtype = attention.attention, attention.dtype
        for names in ATTENTION_STEPS:

            def reads(names: tuple[str, ...] = names) -> Iterator[dict[str, torch.Tensor]]:
                for part in attention.sequences():
                    yield _rows(of.reads(names, part.converted, part.position_ids), part.fit)

            weights = {name: of.weight(name).clone() for name in names}
            for name, new, found in self._prune(weights, reads, self._zeros(attention.number)):
                of.refit(name, new.to(dtype).float(), dtype)
                record[name] = found
        return {"attention": {"weights": record}}, "; ".join(fallbacks([{"weights": record}]))

    def rewrite(self, layer: Layer, conversion: ConversionSection) -> Rewritten:
        zeros = self._zeros(layer.number)
        experts: list[Expert] = []
        records: list[dict[str, Any]] = [{"weights": {}} for _ in layer.replaced]
        for number, expert in enumerate(layer.replaced):
            for names in BLOCK_STEPS:

                def reads(
                    number: int = number, names: tuple[str, ...] = names, expert: Expert = expert
                ) -> Iterator[dict[str, torch.Tensor]]:
                    for chunk in layer.inputs():
                        token = chunk.fit if self.settings.calibrate_all_experts else rows_of(chunk, number)[0]
                        yield expert.reads(names, chunk.x[token])

                for name, new, found in self._prune({name: expert.weight(name) for name in names}, reads, zeros):
                    expert = replace(expert, **{name.removesuffix("_proj"): new.to(layer.dtype).float()})
                    records[number]["weights"][name] = found
            experts.append(expert)
        stages = {"dense": layer.dense, BARE: layer.replaced, self.name: experts}
        if repr(layer.dense[0].activation) == repr(layer.replaced[0].activation):
            del stages[BARE]
        if layer.measure:
            for number, record in enumerate(records):
                record |= _errors(layer, number, experts[number])
        return Rewritten(stages, {"experts": records}, self._line(records, layer.measure))

    def _zeros(self, layer: int) -> ZeroPattern:
        shares = self.settings.layer_shares
        return self.zeros if shares is None else ZeroPattern(shares[layer])

    def _prune(
        self,
        weights: Mapping[str, torch.Tensor],
        reads: Callable[[], Iterator[dict[str, torch.Tensor]]],
        zeros: ZeroPattern,
    ) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
        """Prunes matrices that read at the same time: name, new weight and record of each."""
        for name, seen in self._statistics(weights, reads).items():
            pruned = self.prune(weights[name], seen, zeros)
            record = {"zeros": share_of_zeros(pruned.weight), "by": pruned.by, "because": pruned.because}
            yield name, pruned.weight, record

    def _statistics(
        self, weights: Mapping[str, torch.Tensor], reads: Callable[[], Iterator[dict[str, torch.Tensor]]]
    ) -> dict[str, InputStatistics]:
        """What each matrix reads; those that read the very same share one."""
        found: dict[str, InputStatistics] = {}
        for read in reads() if self.reads != "nothing" else ():
            added: dict[int, str] = {}
            for name, x in read.items():
                first = added.setdefault(id(x), name)
                if first == name:
                    if name not in found:
                        found[name] = InputStatistics(x.shape[1], x.device, products=self.reads == "products")
                    found[name].add(x)
                else:
                    found[name] = found[first]
        for name, weight in weights.items():
            if name not in found:
                found[name] = InputStatistics(weight.shape[1], weight.device, products=False)
        return found

    def _line(self, records: list[dict[str, Any]], measured: bool) -> str:
        matrices = [one for record in records for one in record["weights"].values()]
        share = sum(one["zeros"] for one in matrices) / len(matrices)
        line = f"{share:.1%} of the feed-forward weights are zero"
        errors = [record["error_pruned"] for record in records if measured and record["error_pruned"] is not None]
        if errors:
            line += f", relative error {sum(errors) / len(errors):.3f}"
        return line + "".join(f"; {note}" for note in fallbacks(records))


def fallbacks(records: list[dict[str, Any]]) -> list[str]:
    """Which matrices of a block were pruned by another method than the wanted one, and why."""
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


def _errors(layer: Layer, number: int, pruned: Expert) -> dict[str, Any]:
    """Relative errors of an expert's output on held-out tokens: with the new activation alone, and pruned."""
    errors = Errors(("bare", "pruned"), pruned.down.device)
    for chunk in layer.inputs():
        token, weight = rows_of(chunk, number, "held_out")
        x, weight = chunk.x[token], weight[:, None]
        errors.add(
            (layer.dense[number].output(x) + chunk.gap[token]) * weight,
            bare=layer.replaced[number].output(x) * weight,
            pruned=pruned.output(x) * weight,
        )
    return {"error_bare": errors.relative("bare"), "error_pruned": errors.relative("pruned")}
