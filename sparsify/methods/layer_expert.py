"""A feed-forward block of a layer that is being calibrated, or one expert of it: its weights, its masks, and what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from sparsify.models import FfnActivation
from sparsify.models.group_router import GroupRouter
from sparsify.models.masking import GROUP, INPUTS, READERS, SiteMask, SiteRule, is_in_activation
from sparsify.models.projection_masks import ProjectionMask
from sparsify.models.quantised import KeptBlocks, product


def turned(weight: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """A projection's weight [outputs, channels] for inputs that are multiplied by a basis as it is stored.

    A basis that is rounded is not quite orthogonal: with its inverse instead of itself the weight's own rounding is the only error.
    """
    return torch.linalg.solve(basis.double(), weight.double().T).T.to(weight.dtype).contiguous()


@dataclass(frozen=True)
class Expert:
    """A feed-forward block, or one expert of it.

    Attributes:
        gate: [neurons, hidden].
        up: [neurons, hidden].
        down: [hidden, neurons].
        activation: Its masks, if any, are this expert's.
        input_mask: The mask on the input of both its first projections.
        projections: Masks on what single projections read, and remainders, by the projection's name.
        proxies: Its int4 copies of gate and up, once they were used.
        group_router: What says which groups of neurons a token keeps.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    activation: FfnActivation
    input_mask: SiteMask | None = None
    projections: Mapping[str, ProjectionMask] = field(default_factory=dict)
    proxies: KeptBlocks = field(default_factory=lambda: KeptBlocks("int4"))
    group_router: GroupRouter | None = None

    def neurons(self, x: torch.Tensor) -> torch.Tensor:
        """Neuron activations [rows, neurons] of inputs [rows, hidden]."""
        mask = self.activation.inter_mask
        proxies = self._by_proxy(x) if mask is not None and mask.rule.by_proxy else None
        read = x if self.input_mask is None else self.input_mask(x)
        router = self.group_router
        options = {} if router is None else {"groups": router.factors(router(x))}
        return self.activation(
            self.project("gate_proj", read), self.project("up_proj", read), proxies=proxies, **options
        )

    def proxy_sizes(self, x: torch.Tensor) -> torch.Tensor:
        """What its int4 copies say of the magnitude of neuron activations, [rows, neurons]."""
        return self.activation.proxy_sizes(*self._by_proxy(x))

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        """The gate's factor before its mask, [rows, neurons]."""
        return self.activation.gate_factor(self._multiply("gate_proj", x))

    def ups(self, x: torch.Tensor) -> torch.Tensor:
        """The up factor before its mask, [rows, neurons]."""
        return self.activation.up_factor(self._multiply("up_proj", x))

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """What it adds to the residual stream, [rows, hidden] from inputs of that shape."""
        return self.project("down_proj", self.neurons(x))

    def project(self, projection: str, x: torch.Tensor) -> torch.Tensor:
        """A projection's output for what it reads, with its own mask and remainder."""
        own = self.projections.get(projection)
        weight = self.weight(projection)
        return x @ weight.T if own is None else own(x, lambda masked: masked @ weight.T)

    @property
    def constant(self) -> torch.Tensor | float:
        """What replaces dropped neurons in its output, [hidden]; 0 for nothing."""
        own = self.projections.get("down_proj")
        return 0.0 if own is None or own.remainder_constant is None else own.remainder_constant

    def weight(self, projection: str) -> torch.Tensor:
        return {"gate_proj": self.gate, "up_proj": self.up, "down_proj": self.down}[projection]

    def reads(self, projections: Sequence[str], x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What projections read with all masks, [rows, channels], for inputs [rows, hidden]: down, or gate and up."""
        read = self.neurons(x) if "down_proj" in projections else x if self.input_mask is None else self.input_mask(x)
        masks = {name: self.projections[name].input_mask if name in self.projections else None for name in projections}
        return {name: read if mask is None else mask(read) for name, mask in masks.items()}

    def with_activation(self, activation: FfnActivation) -> Expert:
        """The expert with another activation, and the masks of its own."""
        new = FfnActivation(activation.name, activation.gate_threshold).with_masks_of(self.activation)
        return replace(self, activation=new)

    def _by_proxy(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        exact = [self.gate, self.up]
        copies = self.proxies.of(0, exact, lambda: exact)
        return tuple(product(x, one, by_columns=False) for one in copies)

    def _multiply(self, projection: str, x: torch.Tensor) -> torch.Tensor:
        return self.project(projection, x if self.input_mask is None else self.input_mask(x))

    def with_mask(
        self, site: str, rule: SiteRule, parts: Mapping[str, torch.Tensor], *, is_turned: bool = False
    ) -> Expert:
        """The expert with a mask on one of its sites; `parts` are this expert's own, by the names of `site_parts`.

        Of a rotated site the projections that read it get the inverse rotation, unless they have it already (`is_turned`).
        """
        own = {part: values for part, values in parts.items() if "." not in part}
        if site == GROUP:
            return replace(self, group_router=GroupRouter.holding(rule, own))
        mask = _site_mask(rule, own)
        new = self
        if "basis" in own and not is_turned:
            weights = {name.removesuffix("_proj"): turned(self.weight(name), own["basis"]) for name in READERS[site]}
            new = replace(new, **weights)
        activation = FfnActivation(self.activation.name, self.activation.gate_threshold).with_masks_of(self.activation)
        if is_in_activation(site, rule):
            activation.threshold = own["threshold"]
        elif site in ("gate", "up", "inter"):
            setattr(activation, f"{site}_mask", mask)
        elif site == "ffn_in":
            new = replace(new, input_mask=mask)
        projections = dict(self.projections)
        for name in READERS.get(site, ()):
            remainders = {part.partition(".")[2]: parts[part] for part in parts if part.startswith(f"{name}.")}
            alone = site in INPUTS and len(READERS[site]) == 1
            if remainders or alone:
                projections[name] = _projection_mask(mask if alone else None, remainders)
        return replace(new, activation=activation, projections=projections)


def _site_mask(rule: SiteRule, parts: Mapping[str, torch.Tensor]) -> SiteMask:
    shapes = {part: tuple(values.shape) for part, values in parts.items()}
    return SiteMask(rule, shapes).put(parts)


def _projection_mask(mask: SiteMask | None, remainders: Mapping[str, torch.Tensor]) -> ProjectionMask:
    made = ProjectionMask(SiteRule(), {}, "", own_input=False)
    made.input_mask = mask
    for part, values in remainders.items():
        setattr(made, f"remainder_{part}", values)
    return made


@dataclass(frozen=True)
class Routes:
    """Which experts each token goes to; a dense block is one expert of weight 1.

    Attributes:
        experts: [tokens, experts per token].
        weights: Of the same shape.
    """

    experts: torch.Tensor
    weights: torch.Tensor

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of one expert, and their weights. [rows] each."""
        token, slot = torch.where(self.experts == expert)
        return token, self.weights[token, slot]


def ffn_output(x: torch.Tensor, routes: Routes, experts: Sequence[Expert]) -> torch.Tensor:
    """What a feed-forward block adds to the residual stream: [tokens, hidden] from inputs of that shape."""
    output = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        token, weight = routes.of(number)
        if len(token):
            output.index_add_(0, token, expert.output(x[token]) * weight[:, None])
    return output
