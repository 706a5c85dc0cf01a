"""A constant in place of what a mask drops: the mean of the dropped elements, multiplied by the matrix that reads the site.

Any mask may have it (`conversion.remainder=constant`). For inputs it is W · E[x - masked x]; inside a feed-forward block, for masks on the
factors too, W_down · (E[h] - E[masked h]). It costs a vector for each projection and is the untrained form of what SPON (arXiv
2512.12744) learns; SCAP (arXiv 2412.07174) does the same around the mode of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from sparsify.methods.base import Fitted, LayerValues, Mask, MethodSettings, SiteValues
from sparsify.models import SiteMask, SiteRule
from sparsify.models.masking import ALL_SITES, FACTOR_SITES, GROUP, READERS

IN_BLOCK = (GROUP, *FACTOR_SITES)
"""Sites whose masks change what the down projection reads."""


class ConstantRemainder:
    """A mask whose dropped elements are replaced by their mean.

    Args:
        mask: A mask without remainders at the sites that projections read, or with low-rank ones, which stay.
    """

    def __init__(self, mask: Mask) -> None:
        self._mask = mask
        self.name, self.paper, self.reconstructs = mask.name, mask.paper, mask.reconstructs
        self.Settings: type[MethodSettings] = mask.Settings
        self._whole: dict[int, torch.Tensor] = {}

    @property
    def sites(self) -> dict[str, SiteRule]:
        sites = dict(self._mask.sites)
        if any(site in sites for site in IN_BLOCK):
            sites.setdefault("inter", SiteRule())  # drops nothing; its constant replaces what the factors' masks drop
        with_constant = {site for site, rule in sites.items() if site in READERS and rule.remainder == "none"}
        return {
            site: replace(sites[site], remainder="constant") if site in with_constant else sites[site]
            for site in ALL_SITES
            if site in sites
        }

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        rule = self.sites[site]
        if site == next((one for one in IN_BLOCK if one in self.sites), None):
            self._whole = _means(layer, "inter", lambda chunk: chunk.values)
        if site in self._mask.sites:
            fitted = self._mask.fit(site, layer)
        else:
            fitted = Fitted({"threshold": torch.tensor([-torch.inf], device=layer.device)})
        if fitted.order is not None:
            self._whole = {number: mean[fitted.order[number]] for number, mean in self._whole.items()}
        if rule.remainder != "constant":
            return fitted
        mask = SiteMask(rule, {part: tuple(values.shape) for part, values in fitted.parts.items()}).put(fitted.parts)
        of_experts = site == "inter" or "." in site

        def masked(chunk: SiteValues) -> torch.Tensor:
            return mask(chunk.values, chunk.number if of_experts else None, chunk.sizes)

        if site == "inter":
            kept = _means(layer, site, masked)
            dropped = {number: self._whole[number] - mean for number, mean in kept.items()}
        else:
            dropped = _means(layer, site, lambda chunk: mask.rotate(chunk.values) - masked(chunk))
        constants = {}
        for name, weights in layer.weights(site).items():
            turned = [weight if mask.basis is None else weight @ mask.basis for weight in weights]
            own = [
                weight @ dropped[number if of_experts else 0]
                if (number if of_experts else 0) in dropped
                else weight.new_zeros(len(weight))
                for number, weight in enumerate(turned)
            ]
            constants[f"{name}.constant"] = torch.stack(own) if layer.experts else own[0]
        return Fitted(fitted.parts | constants, fitted.record)


def _means(layer: LayerValues, site: str, value: Callable[[SiteValues], torch.Tensor]) -> dict[int, torch.Tensor]:
    """Mean over the rows of a site, [channels], by expert."""
    sums: dict[int, torch.Tensor] = {}
    rows: dict[int, int] = {}
    for chunk in layer.values(site):
        total = value(chunk).double().sum(0)
        sums[chunk.number] = sums.get(chunk.number, 0) + total
        rows[chunk.number] = rows.get(chunk.number, 0) + len(chunk.values)
    return {number: (total / rows[number]).float() for number, total in sums.items()}
