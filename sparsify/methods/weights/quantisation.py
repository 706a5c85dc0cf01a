"""Integers for weights, activations, keys and values: rounding as it is, with smoothing (SmoothQuant), GPTQ, and RRS with its parts.

What all share is here: each matrix becomes integers on what the quantised layers before it feed it (`matrices.py`), the activations
themselves as numbers; what is stored is codes, scales and `config.quantisation`, which the model computes (`models/integer_linear.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator

from sparsify.conversion.architecture import sparse_config, stored_activation
from sparsify.conversion.layout import LAYER, projection_names
from sparsify.conversion.source_checkpoint import read_checkpoint
from sparsify.errors import RecipeError
from sparsify.methods.attention_refit import AttentionLayer
from sparsify.methods.base import MethodSettings, register
from sparsify.methods.weights.gptq import gptq
from sparsify.methods.weights.integers import IntegerMatrix, round_to_nearest
from sparsify.methods.weights.matrices import MatrixRewrite
from sparsify.methods.weights.rotation import check_rotation, rotate_checkpoint, turns_heads
from sparsify.methods.weights.sparsegpt import LEAST_ROWS_PER_INPUT, inverse_factor
from sparsify.methods.weights.statistics import InputStatistics
from sparsify.models import SparseConfig, family_of
from sparsify.models.hadamard import multiply
from sparsify.models.integer_linear import CODES, PROJECTIONS, SCALES, Quantisation, obstacle
from sparsify.models.masking import site_rules
from sparsify.recipe.sparsification import ConversionSection

SMOOTHED = ("o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections whose inputs RRS smooths while the model runs; those of q, k and v are rotated alone."""
SMOOTHED_BEFORE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""The projections whose inputs SmoothQuant smooths: those that read a norm, which can divide."""
LEAST_SMOOTHED = 1e-5


class QuantisationSettings(MethodSettings):
    weight_bits: Literal[4, 8] = Field(default=4, description="Bits of a weight: 4 or 8.")
    activation_bits: Literal[4, 8, 16] = Field(
        default=4, description="Bits of what a projection reads: 4, 8, or 16 for numbers."
    )
    kv_bits: Literal[4, 8, 16] = Field(
        default=16, description="Bits of keys and values in the cache: 4, 8, or 16 for numbers."
    )


class GptqSettings(QuantisationSettings):
    activation_bits: Literal[4, 8, 16] = Field(
        default=16, description="Bits of what a projection reads: 4, 8, or 16 for numbers."
    )
    damping: float = Field(
        default=0.01,
        gt=0,
        le=1000,
        description="Above 0: what is added to the Hessian's diagonal, as a share of the mean of that.",
    )


class SmoothQuantSettings(QuantisationSettings):
    weight_bits: Literal[4, 8] = Field(default=8, description="Bits of a weight: 4 or 8.")
    activation_bits: Literal[4, 8] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=8, description="Bits of what a projection reads: 4 or 8."
    )
    strength: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="0 to 1: how much of the spread of a channel's activations its weights take over (the paper's alpha).",
    )


class RrsSettings(QuantisationSettings):
    weights: Literal["gptq", "rtn"] = Field(default="gptq", description="How weights are rounded: gptq or rtn.")
    rotate: Literal["all", "residual", "none"] = Field(
        default="all",
        description="all; residual, which leaves the input of down as it is, with its exact zeros; or none.",
    )
    smooth_group: int | None = Field(
        default=128,
        ge=1,
        le=65_536,
        validate_default=True,
        description="Channels that share a runtime scale, 1 to 65,536; null smooths nothing.",
    )
    damping: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="Above 0, with gptq: what is added to the Hessian's diagonal, as a share of its mean. null: 0.01.",
    )

    @field_validator("smooth_group")
    @classmethod
    def _smooths_what_is_rounded(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("activation_bits") == 16:
            raise ValueError(
                "with activation_bits=16 inputs are not rounded, so it would be ignored; set smooth_group=null"
            )
        return value

    @field_validator("damping")
    @classmethod
    def _damps_a_hessian(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("weights") == "rtn":
            raise ValueError("with weights=rtn there is no Hessian, so it would be ignored; omit it")
        return value


class IntegerQuantisation(MatrixRewrite):
    """A method that makes integers; its subclasses are settings of this."""

    Settings: ClassVar[type[MethodSettings]] = QuantisationSettings
    outcome = "quantised"
    trains = False
    in_fp32 = True

    def __init__(self, settings: Any) -> None:
        self.settings, self.mask = settings, None
        self.last_stage, self.revives_zeros = "weights as integers", True
        self._integers: dict[str, IntegerMatrix] = {}
        self._heads = 1
        """Parts of the input of o that are mixed; set when the model is known."""

    @property
    def damping(self) -> float | None:
        """Of GPTQ; None where weights are rounded by themselves."""
        return None

    @property
    def rotate(self) -> str:
        return "none"

    @property
    def smooth_group(self) -> int | None:
        return None

    @property
    def reads(self) -> Literal["nothing", "norms", "products"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "nothing" if self.damping is None else "products"

    @property
    def stored_quantisation(self) -> Quantisation:
        settings = self.settings
        return Quantisation(
            method=self.name,
            weight_bits=settings.weight_bits,
            activation_bits=settings.activation_bits,
            smooth_group=self.smooth_group,
            smoothed=[] if self.smooth_group is None else list(SMOOTHED),
            rotated_down=self.rotate == "all",
            rotated_heads=self._heads > 1,
            kv_bits=settings.kv_bits,
        )

    @property
    def config_fields(self) -> dict[str, Any]:
        return {"quantisation": asdict(self.stored_quantisation)}

    def check_model(self, config: SparseConfig) -> None:
        """Raises RecipeError if the model cannot have such integers."""
        rotates = self.rotate != "none"
        self._heads = config.num_attention_heads if rotates and turns_heads(config) else 1
        if reason := obstacle(config, self.stored_quantisation):
            raise RecipeError(
                f"A {config.model_type} model cannot be quantised by {self.name}: {reason}.",
                allowed="Dense models, without a mask or with one on neurons or on the inputs of attention or block as a whole.",
                next_step="Quantise another model, or the model without its mask (conversion.drop_source_mask=true).",
            )
        if rotates:
            check_rotation(config, down=self.rotate == "all")

    def prepared(self, folder: Path, to: Path) -> Path:
        config = read_checkpoint(folder).config
        self.check_model(sparse_config(config, stored_activation(config), str(folder)))
        if self.rotate == "none":
            return folder
        if not to.is_dir():
            rotate_checkpoint(folder, to)
        return to

    def coordinates(self, projection: str, x: torch.Tensor) -> torch.Tensor:
        return self._turned(projection, x)

    def rewritten(
        self, layer: int, weights: Mapping[str, torch.Tensor], seen: Mapping[str, InputStatistics]
    ) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
        factors = self.input_factors(weights, seen)
        for name, weight in weights.items():
            turned = self._turned(name, weight)
            turned = turned if factors is None else turned * factors
            matrix, by, because = self._rounded(turned, seen[name])
            self._integers[name] = matrix
            own = matrix.dequantised()
            error = float((own - turned).square().sum() / turned.square().sum().clamp(min=1e-30)) ** 0.5
            own = own if factors is None else own / factors
            yield name, self._turned(name, own, inverse=True), {"error": error, "by": by, "because": because}

    def input_factors(
        self, weights: Mapping[str, torch.Tensor], seen: Mapping[str, InputStatistics]
    ) -> torch.Tensor | None:
        """What each channel that these projections read is divided by before, [channels]; None for nothing."""
        return None

    def stored(self, config: SparseConfig, layer: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        stored = dict(tensors)
        for projection in PROJECTIONS:
            (name,) = projection_names(config, layer, projection)
            matrix, base = self._integers.pop(projection), name.removesuffix("weight")
            stored.pop(name, None)
            stored |= {base + CODES: matrix.stored_codes, base + SCALES: matrix.scales}
        return stored

    def line(self, records: list[dict[str, Any]]) -> str:
        matrices = [one for record in records for one in record["weights"].values()]
        error = sum(one["error"] for one in matrices) / len(matrices)
        return f"weights of {self.settings.weight_bits} bits, {error:.3f} of their norm from the old ones"

    def _rounded(self, weight: torch.Tensor, seen: InputStatistics) -> tuple[IntegerMatrix, str, str | None]:
        """A matrix of integers, which method made it, and why not the wanted one."""
        bits, because = self.settings.weight_bits, None
        if self.damping is not None:
            assert seen.products is not None
            needed = LEAST_ROWS_PER_INPUT * weight.shape[1]
            if seen.num_rows >= needed:
                if not seen.is_factored:  # once for all matrices that read the same
                    seen.factor, seen.is_factored = inverse_factor(seen.products, self.damping), True
                if seen.factor is not None:
                    return gptq(weight, seen.factor, seen.products.diagonal() == 0, bits), "gptq", None
                because = "its Hessian is singular"
            else:
                because = f"{seen.num_rows:,} of at least {needed:,} calibration tokens reached it"
        return round_to_nearest(weight, bits), "rtn", because

    def _turned(self, projection: str, x: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
        """Rows that a projection reads, or of its weights, in the coordinates of its integers; `inverse` turns them back."""
        parts = {"down_proj": x.shape[1] if self.rotate == "all" else 1, "o_proj": self._heads}.get(projection, 1)
        if parts == 1:
            return x
        return multiply(x.unflatten(-1, (parts, -1)), -2, inverse=inverse).flatten(-2)


@register
class Rtn(IntegerQuantisation):
    """Every weight becomes the nearest integer; activations are rounded as they are. Looks at no text."""

    name = "rtn"
    paper = "a baseline: rounding to the nearest"
    Settings = QuantisationSettings


@register
class Gptq(IntegerQuantisation):
    """Weights by GPTQ; activations are numbers unless `activation_bits` says."""

    name = "gptq"
    paper = "GPTQ, arXiv 2210.17323"
    Settings = GptqSettings

    @property
    def damping(self) -> float | None:
        return self.settings.damping


@register
class Rrs(IntegerQuantisation):
    """Rotated runtime smoothing: rotation, GPTQ, and scales of channels that are computed while the model runs."""

    name = "rrs"
    paper = "RRS, arXiv 2409.20361; without smooth_group QuaRot, arXiv 2404.00456"
    Settings = RrsSettings

    @property
    def damping(self) -> float | None:
        if self.settings.weights == "rtn":
            return None
        return 0.01 if self.settings.damping is None else self.settings.damping

    @property
    def rotate(self) -> str:
        return self.settings.rotate

    @property
    def smooth_group(self) -> int | None:
        return self.settings.smooth_group


@register
class SmoothQuant(IntegerQuantisation):
    """Channels of large activations are divided by a number that the weights are multiplied by, once and for all tokens.

    The numbers are rounded to powers of two, so that the norms that divide by them are stored without an error.
    """

    name = "smoothquant"
    paper = "SmoothQuant, arXiv 2211.10438"
    Settings = SmoothQuantSettings
    reads = "norms"  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._norms: dict[str, torch.Tensor] = {}
        self._factors: dict[str, torch.Tensor] = {}

    def check_model(self, config: SparseConfig) -> None:
        super().check_model(config)
        family = family_of(config)
        if family.attention_norm is None or family.ffn_norm is None:
            raise RecipeError(
                f"A {config.model_type} model cannot be smoothed: no norms are in front of its attention and feed-forward block.",
                next_step="Choose rtn, or gptq.",
            )
        masked = [site for site in site_rules(config) if site in ("attn_in", "ffn_in", "group")]
        if masked:
            raise RecipeError(
                f"The model has a mask at {masked[0]}, whose channels smoothquant would scale.",
                next_step="Choose rtn, or gptq.",
            )

    def rewrite_attention(self, attention: AttentionLayer, conversion: ConversionSection) -> tuple[dict[str, Any], str]:
        self._norms = attention.attention.norms()
        return super().rewrite_attention(attention, conversion)

    def input_factors(
        self, weights: Mapping[str, torch.Tensor], seen: Mapping[str, InputStatistics]
    ) -> torch.Tensor | None:
        names = next((group for group in SMOOTHED_BEFORE if set(group) == set(weights)), None)
        if names is None:
            return None
        activations = seen[names[0]].peaks.clamp(min=LEAST_SMOOTHED)
        largest = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0).clamp(min=LEAST_SMOOTHED)
        strength = self.settings.strength
        factors = torch.exp2((activations**strength / largest ** (1 - strength)).log2().round())
        self._factors[names[0]] = factors
        return factors

    def stored(self, config: SparseConfig, layer: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        family, stored = family_of(config), super().stored(config, layer, tensors)
        for norm, names in zip((family.attention_norm, family.ffn_norm), SMOOTHED_BEFORE, strict=True):
            assert norm is not None
            offset = 1.0 if family.unit_offset else 0.0
            stored[f"{LAYER.format(layer)}{norm}.weight"] = (self._norms[norm] + offset) / self._factors.pop(
                names[0]
            ) - offset
        return stored
