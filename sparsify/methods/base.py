"""The seam of methods: what a mask and a rewrite of weights must say and do, and which of them there are.

A method is one class in one module of this package, registered with `@register`. It names itself and its paper, and its
settings are the fields of a pydantic model: `sparsify convert --method NAME --set KEY=VALUE` and a recipe's
`conversion.method`, `conversion.method_settings` read them, bounds and all. Nothing else lists methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from sparsify.errors import RecipeError, nearest
from sparsify.methods import import_all
from sparsify.methods.attention_refit import AttentionLayer
from sparsify.methods.layer_expert import Expert
from sparsify.methods.layerwise import Layer
from sparsify.models import FAMILIES, SiteRule, SparseConfig, SparseModel
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.sparsification import ConversionSection

UNSOLVED_ZEROS = 0.5
"""Used as `target_zeros` where a target density is given and the model's shapes are not known yet, so that all else is checked."""


OWN_KEYS = ("target_zeros", "weight_sparsity")
"""Settings of methods that are set as `conversion.NAME` and by options of their own."""


class MethodSettings(BaseModel):
    """Base of a method's settings. A field `target_zeros` is set by `conversion.target_zeros` and `--target-zeros`, or solved for
    `conversion.target_density` (`methods/density.py`); `weight_sparsity` by `conversion.weight_sparsity` and `--weight-sparsity`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class SiteValues:
    """Values of a site on calibration tokens, as the layer with the masks fitted so far computes them.

    Attributes:
        values: [rows, channels].
        weights: The router's weight of each row; 1 outside experts. [rows]
        number: Which expert computed them, 0 outside experts.
        expert: Its weights; None outside blocks.
        sizes: Magnitudes by proxy, [rows, channels], where the site's rule chooses by them.
    """

    values: torch.Tensor
    weights: torch.Tensor
    number: int
    expert: Expert | None
    sizes: torch.Tensor | None = None


class LayerValues(Protocol):
    """What a mask is fitted to: one layer and the calibration tokens that reach it. Padding is skipped.

    The sites that a mask was fitted to before are masked.

    Attributes:
        experts: The layer's experts, one in a dense block; none at the sites of the attention.
        device: Where the values are.
    """

    experts: list[Expert]
    device: torch.device

    def values(self, site: str) -> Iterator[SiteValues]:
        """The values of a site before its mask, some rows at a time; may be iterated repeatedly. What a projection of an expert reads
        comes for each expert, with the tokens routed to it; `ffn_in` comes once, with all tokens. Later sites may be looked at.
        """
        ...

    def weights(self, site: str) -> dict[str, list[torch.Tensor]]:
        """The weights [outputs, channels] of the projections that read a site, by name: one for each expert, or one alone."""
        ...

    def output(self, masks: Mapping[str, Mapping[str, torch.Tensor]], num_tokens: int) -> torch.Tensor:
        """What the layer computes with the masks fitted so far and these on later sites, so that choices among them can be compared.

        Args:
            masks: Parts by site, as `Fitted` has them. Sites that are not named keep every element.
            num_tokens: On the first so many calibration tokens, or somewhat fewer.

        Returns:
            [tokens, hidden]: at a site of the attention the stream after the layer, inside a block the block's output.
        """
        ...


@dataclass(frozen=True)
class Fitted:
    """What was fitted to one site in one layer.

    Attributes:
        parts: What is stored, by the names and of the shapes of `models.masking.site_parts`: of a threshold `threshold`, [1],
            [channels] or [experts, channels]. A dense block may be given as one expert.
        record: Its entry in `calibration.json`. `pooled_experts` in it, those without statistics of their own, is said in the log.
        order: The order in which the neurons of each expert are stored from here on, [experts, neurons]: rows of gate and up, and
            columns of down. The block computes the same in any order. None keeps it.
    """

    parts: dict[str, torch.Tensor]
    record: dict[str, Any] = field(default_factory=dict)
    order: torch.Tensor | None = None


@runtime_checkable
class Mask(Protocol):
    """Which elements of which vectors are dropped for a token: fitted once and stored with the model.

    One that does not keep the same share, 1 - target_zeros, at each of its sites also has a property `kept_shares`, the share by site.
    One that is fitted to weights alone says so with a property `reads_values` that is False: then nothing need be computed for it.

    Attributes:
        name: What users call it; `config.sparsification` says it.
        paper: Where it is published.
        Settings: Its settings.
        reconstructs: Whether a ridge reconstruction of the layer's output matrix follows unless `conversion.refit` says.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    Settings: ClassVar[type[MethodSettings]]
    reconstructs: ClassVar[bool]

    def __init__(self, settings: Any) -> None: ...

    @property
    def sites(self) -> dict[str, SiteRule]: ...

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        """One site of one layer; called for each site in the order in which the layer computes them."""
        ...


class LayerRewrite(Protocol):
    """A rewrite of layers in order, each on what the rewritten layers before it feed it.

    Attributes:
        mask: The mask that is fitted along with the weights; None for none.
        last_stage: Name of the stage that is its result.
        revives_zeros: Whether it may give a weight that is zero another value.
        config_fields: What config.json says of it.
        in_fp32: Whether what is fitted is passed along in fp32, not rounded to the dtype on disk.
        trains: Whether its result can be trained.
    """

    mask: Mask | None
    last_stage: str
    revives_zeros: bool
    in_fp32: bool = False
    trains: bool = True

    @property
    def config_fields(self) -> dict[str, Any]:
        return {} if self.mask is None else {"sparsification": sparsification(self.mask)}

    def check_model(self, config: SparseConfig) -> None:
        """Refuses a model that it cannot rewrite, before anything is computed. Raises UserError."""

    def prepared(self, folder: Path, to: Path) -> Path:
        """The checkpoint whose layers are rewritten: the one in `folder`, or one that computes the same, written to `to` unless it is
        there. Raises UserError.
        """
        return folder

    def stored(self, config: SparseConfig, layer: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is stored of a layer in place of its new tensors, which are given in fp32 by their names on disk. Numbers are stored in
        the dtype on disk unless they are integers or their scales.
        """
        return tensors

    def rewrite_attention(self, attention: AttentionLayer, conversion: ConversionSection) -> tuple[dict[str, Any], str]:
        """Changes projections of the attention, whose masks are fitted: `Attention.refit` takes their new weights.

        Returns:
            What is added to the layer's record, and what is said of it; nothing of both where nothing was done.
        """
        return {}, ""

    def rewrite(self, layer: Layer, conversion: ConversionSection) -> Rewritten:
        """The feed-forward block behind that attention."""
        ...


class WeightMethod(LayerRewrite, Protocol):
    """A method that rewrites weights.

    Attributes:
        name: What users call it.
        paper: Where it is published.
        Settings: Its settings.
        needs_new_activation: Whether, without a mask, it does nothing to a model that keeps its activation.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    Settings: ClassVar[type[MethodSettings]]
    needs_new_activation: ClassVar[bool]

    def __init__(self, settings: Any) -> None: ...


@runtime_checkable
class Upcycling(Protocol):
    """A method that makes a model of another architecture out of a dense one. It is followed by no reconstruction.

    Attributes:
        name: What users call it.
        paper: Where it is published.
        Settings: Its settings.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    Settings: ClassVar[type[MethodSettings]]

    def __init__(self, settings: Any) -> None: ...

    def held_as(self, dense: SparseConfig) -> SparseConfig:
        """The configuration of the upcycled model. Raises ModelError if a model of that configuration cannot be upcycled."""
        ...

    def upcycle(self, dense: SparseModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> SparseModel:
        """The upcycled model, in the dtype of the dense one.

        Args:
            dense: In memory as a whole.
            batches: Calibration sequences, `input_ids` and `position_ids` [sequences, tokens] each; may be iterated repeatedly.
        """
        ...


class TokenMask(Protocol):
    """Which neurons count for a token, where that is decided while the model runs and nothing is stored: what
    a SparsityProbe applies.
    """

    def keep(self, layer: int, expert: int, product: torch.Tensor) -> torch.Tensor:
        """Bool [rows, neurons] for activations of that shape."""
        ...


@dataclass(frozen=True)
class Rewritten:
    """A layer's experts at each stage, and what was found.

    Attributes:
        stages: Experts by stage: `dense` first, the result last.
        record: The layer's entry in `calibration.json`; `experts` in it has one for each.
        line: What is said of it when it is done.
        masks: What is stored of the masks inside the block, by site and part.
    """

    stages: dict[str, list[Expert]]
    record: dict[str, Any]
    line: str
    masks: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


_METHODS: dict[str, type[Any]] = {}
Method = type[Any]


def register(method: Method) -> Method:
    """Makes a class known under its `name`."""
    assert method.name not in _METHODS, f"two methods are called {method.name}"
    _METHODS[method.name] = method
    return method


def methods() -> dict[str, Method]:
    """Every method by its name: the modules of this package are imported to find them."""
    import_all()
    return dict(sorted(_METHODS.items()))


def method_of(conversion: ConversionSection) -> Mask | WeightMethod | Upcycling:
    """The method that a conversion names, with its settings.

    Raises:
        RecipeError: If there is no such method, or a setting is invalid.
    """
    known = methods()
    name = conversion.method
    if name not in known:
        raise RecipeError(
            f"conversion.method is {name!r}.",
            allowed=f"{nearest(name, known)}Methods: {', '.join(known)}.",
        )
    method = known[name](_settings(known[name], conversion))
    if conversion.refit is not None and not isinstance(method, Mask):
        how = "reconstructs nothing" if isinstance(method, Upcycling) else "reconstructs in its own way"
        raise RecipeError(
            f"conversion.refit={str(conversion.refit).lower()} would be ignored: {name} {how}.",
            next_step="Leave it out, or choose a mask as conversion.method.",
        )
    if conversion.target_density is not None and not isinstance(method, Mask):
        raise RecipeError(
            f"conversion.target_density={conversion.target_density:g} is set with {name}, which is not a mask.",
            next_step="Leave it out, or choose a mask as conversion.method (--method).",
        )
    if conversion.remainder != "none" and not isinstance(method, Mask):
        raise RecipeError(
            f"conversion.remainder={conversion.remainder} would be ignored: {name} is not a mask.",
            next_step="Leave it out, or choose a mask as conversion.method.",
        )
    divisible = isinstance(method, Mask) and (conversion.target_zeros or conversion.target_density)
    if conversion.allocation != "uniform" and not divisible:
        raise RecipeError(
            f"conversion.allocation={conversion.allocation} would be ignored: {name} has no target_zeros to divide among layers.",
            next_step="Leave it out, or choose a mask and set conversion.target_zeros.",
        )
    return method


def check_method(conversion: ConversionSection) -> None:
    """Refuses an unknown method or invalid settings of it, and one whose result is not trained; without calibration there is nothing to
    check.

    Raises:
        RecipeError: Naming the setting.
    """
    if conversion.calibration_tokens and not getattr(method_of(conversion), "trains", True):
        raise RecipeError(
            f"conversion.method is {conversion.method}, which makes integers of the weights: they are not trained.",
            allowed="Methods whose result is trained.",
            next_step=f"Train first; then sparsify convert MODEL --method {conversion.method} quantises the result.",
        )


def check_layers(recipe: Recipe, model_type: str) -> None:
    """Refuses settings that need layers of norms, attention and feed-forward block alone, for a family that has others.

    Args:
        recipe: What to train.
        model_type: Of the checkpoint that training starts from.

    Raises:
        RecipeError: Naming the setting.
    """
    difference = FAMILIES[model_type].layer_difference
    if not difference:
        return
    for key, given in {
        "blending.refit_milestones": recipe.blending.refit_milestones > 0,
        "distillation.ffn_weight": recipe.distillation.ffn_weight > 0 and upcycling_of(recipe.conversion) is not None,
        "training.compile": recipe.training.compile,
    }.items():
        if given:
            raise RecipeError(
                f"{key} is set, and a {model_type} has {difference}, which it does not know.",
                next_step=f"Omit {key}.",
            )


def makes_masks(conversion: ConversionSection) -> bool:
    method = method_of(conversion)
    return isinstance(method, Mask) or (not isinstance(method, Upcycling) and method.mask is not None)


def upcycling_of(conversion: ConversionSection) -> Upcycling | None:
    """The method of a conversion, if it makes another architecture; None without calibration, as of any other method."""
    method = method_of(conversion) if conversion.calibration_tokens else None
    return method if isinstance(method, Upcycling) else None


def needs_new_activation(conversion: ConversionSection) -> bool:
    """Whether the method does nothing to a model that keeps its activation."""
    method = method_of(conversion)
    return not isinstance(method, Mask | Upcycling) and method.needs_new_activation and method.mask is None


def sparsification(mask: Mask) -> dict[str, Any]:
    return {
        "method": mask.name,
        "sites": {site: _stored_rule(rule) for site, rule in mask.sites.items()},
    }


def stored_by(conversion: ConversionSection) -> dict[str, Any] | None:
    """`config.sparsification` of the model that a conversion makes; None without a mask."""
    method = method_of(conversion)
    if isinstance(method, Upcycling):
        return None
    mask = method if isinstance(method, Mask) else method.mask
    return None if mask is None else sparsification(mask)


def _stored_rule(rule: SiteRule) -> dict[str, Any]:
    """A rule as config.json has it: what it is, and what differs from a plain one."""
    plain = asdict(SiteRule())
    return {key: value for key, value in asdict(rule).items() if key in ("rule", "per") or value != plain[key]}


def _settings(method: Method, conversion: ConversionSection) -> MethodSettings:
    given: Mapping[str, Any] = dict(conversion.method_settings)
    keys = {name: f"conversion.method_settings.{name}" for name in given}
    if conversion.target_zeros is not None:
        given = {**given, "target_zeros": conversion.target_zeros}
        keys["target_zeros"] = "conversion.target_zeros"
    if conversion.weight_sparsity is not None:
        given = {**given, "weight_sparsity": conversion.weight_sparsity}
        keys["weight_sparsity"] = "conversion.weight_sparsity"
    fields = method.Settings.model_fields
    if conversion.target_density is not None:
        if conversion.target_zeros is not None:
            raise RecipeError(
                f"conversion.target_density={conversion.target_density:g} and conversion.target_zeros={conversion.target_zeros:g} "
                "both say how much is dropped.",
                next_step="Omit one of them.",
            )
        if "target_zeros" not in fields:
            raise RecipeError(
                f"conversion.target_density={conversion.target_density:g} would be ignored: {method.name} has no target_zeros.",
                next_step="Omit it, or choose another method.",
            )
        given = {**given, "target_zeros": UNSOLVED_ZEROS}
        keys["target_zeros"] = "conversion.target_zeros"
    for name in given:
        if name not in fields:
            raise RecipeError(
                f"{keys[name]}={given[name]} would be ignored: {method.name} has no such setting.",
                allowed=f"{nearest(name, fields)}Settings of {method.name}: {', '.join(fields)}.",
            )
    try:
        return method.Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        what = fields[name].description or ""
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            key = f"conversion.{name}" if name in OWN_KEYS else f"conversion.method_settings.{name}"
            raise RecipeError(f"{method.name} needs {key}.", allowed=what) from error
        raise RecipeError(
            f"{keys.get(name, f'conversion.method_settings.{name}')} is {given.get(name, fields[name].default)}: "
            f"{message[:1].lower()}{message[1:]}.",
            allowed=what,
        ) from error
