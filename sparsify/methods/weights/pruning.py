"""What all methods of weight sparsity share: settings, what the model says of its zeros, and how many each matrix gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, ValidationInfo, field_validator

from sparsify.conversion.weight_zeros import WeightSparsity, weight_sparsity
from sparsify.errors import RecipeError
from sparsify.methods.base import MethodSettings
from sparsify.methods.weights.matrices import MatrixRewrite
from sparsify.methods.weights.statistics import InputStatistics
from sparsify.methods.weights.zeros import ZeroPattern, parse_pattern, share_of_zeros
from sparsify.models import SparseConfig
from sparsify.models.masking import num_experts, projection_shapes

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


class WeightPruning(MatrixRewrite):
    """A method of weight sparsity; its subclasses say what becomes of one matrix."""

    Settings: ClassVar[type[MethodSettings]] = PruningSettings
    outcome = "pruned"

    def __init__(self, settings: PruningSettings) -> None:
        self.settings, self.mask = settings, None
        self.last_stage, self.revives_zeros = self.name, False
        self.zeros = parse_pattern(settings.pattern, settings.weight_sparsity)

    def prune(self, weight: torch.Tensor, seen: InputStatistics, zeros: ZeroPattern) -> Pruned:
        """One matrix [outputs, inputs] in fp32, from what it reads. Weights that are zero stay zero."""
        raise NotImplementedError

    @property
    def reads_all_tokens(self) -> bool:
        return self.settings.calibrate_all_experts

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

    def rewritten(
        self, layer: int, weights: Mapping[str, torch.Tensor], seen: Mapping[str, InputStatistics]
    ) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
        shares = self.settings.layer_shares
        zeros = self.zeros if shares is None else ZeroPattern(shares[layer])
        for name, own in seen.items():
            pruned = self.prune(weights[name], own, zeros)
            record = {"zeros": share_of_zeros(pruned.weight), "by": pruned.by, "because": pruned.because}
            yield name, pruned.weight, record

    def line(self, records: list[dict[str, Any]]) -> str:
        matrices = [one for record in records for one in record["weights"].values()]
        share = sum(one["zeros"] for one in matrices) / len(matrices)
        return f"{share:.1%} of the feed-forward weights are zero"
