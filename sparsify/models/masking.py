"""Masks that a model stores: which elements of which vector are set to zero for a token, and what takes their place.

`config.sparsification` names the method that fitted them and, for each site, the rule:

    {"method": "percentile", "sites": {"inter": {"rule": "threshold", "per": "layer"}}}

A site is the vector that a mask multiplies. Rules, for an element x and its weight w (1 unless `weighted`):

- `threshold` keeps an element where |x| exceeds a stored number (`per: layer`) or a number of its own (`per: channel`; in fused
  experts, of its expert and its own). A threshold of -inf keeps everything, bit by bit.
- `top_k` keeps a stored share of the elements, at least one: those with the largest |x| · w.
- `top_p` keeps the fewest elements, largest |x| · w first, whose scores add up to the sum of all but a stored share of it.

NaN is kept, so that it shows. With `by_proxy`, |x| in these rules is not that of the neuron itself but what int4 copies of its gate and
up rows (`quantised.py`) say it is: then the exact rows of what is dropped need not be read. The copies are made of the weights that the
model has, never stored. With `rotated` the vector is multiplied by a stored orthogonal matrix first; the projections that read
it have the inverse in their weights. What was dropped may be replaced (`remainder`): `constant` adds a stored vector to the output of
the projections that read the site, `low_rank` adds left @ right @ (dropped elements). All these numbers are buffers: stored with the
weights, never trained.

One more site, `group`, holds no elements but groups of a block's neurons; a stored router chooses among them (`group_router.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

INPUTS = {
    "attn_in": ("q_proj", "k_proj", "v_proj"),
    "attn_in.q": ("q_proj",),
    "attn_in.k": ("k_proj",),
    "attn_in.v": ("v_proj",),
    "attn_out": ("o_proj",),
    "ffn_in": ("gate_proj", "up_proj"),
    "ffn_in.gate": ("gate_proj",),
    "ffn_in.up": ("up_proj",),
}
"""Sites that are inputs of linear projections, in the order in which a layer computes them, and the projections that read them."""
INPUT_SITES = tuple(INPUTS)
FACTOR_SITES = ("gate", "up", "inter")
"""Sites inside a feed-forward block: the gate's factor, the up factor, and the product of both."""
SITES = (*INPUT_SITES, *FACTOR_SITES)
"""The sites that are vectors, whose elements are chosen by their size."""
GROUP = "group"
"""The site of groups of neurons, which are chosen by a router before any of them is computed."""
COUNTED_SITES = (*INPUT_SITES, GROUP)
"""Sites whose zeros are counted by themselves; those of the factors and their product are counted without a mask, too."""
ALL_SITES = (*COUNTED_SITES, *FACTOR_SITES)
"""All sites, in the order in which a layer decides what it drops."""
READERS = {**INPUTS, "inter": ("down_proj",)}
"""The projections that read a site; the factors are not read by any."""
RULES = ("threshold", "top_k", "top_p")
"""Of vectors."""
GROUP_RULES = ("router", "router_top_k")
"""Of groups."""
NUMBERS = {"threshold": "threshold", "top_k": "kept_share", "top_p": "dropped_mass"}
"""What the number of each rule is called. Not a kept mass: that is near 1, where bf16 has steps of 0.4%."""
GRANULARITIES = ("layer", "channel")
REMAINDERS = ("none", "constant", "low_rank")


@dataclass(frozen=True)
class SiteRule:
    """How the elements of one site are chosen.

    Attributes:
        rule: One of RULES, or at `group` one of GROUP_RULES.
        per: `layer` for one number, `channel` for one for each element (of each expert, inside experts). Thresholds only.
        weighted: Whether scores are multiplied by a stored weight for each element. Thresholds need none: theirs is in `per: channel`.
        rotated: Whether the site is masked in coordinates of its own. Inputs only.
        by_proxy: Whether int4 copies of gate and up say how large the elements are. `inter` only.
        remainder: One of REMAINDERS.
        rank: Of a `low_rank` remainder.
        rank_share: Instead of a rank: the share of a projection's weights that both factors together hold at most. It makes a rank for
            each projection, of its own shape.
        group_size: Neighbouring neurons in one group. `group` only.
    """

    rule: str = "threshold"
    per: str = "layer"
    weighted: bool = False
    rotated: bool = False
    by_proxy: bool = False
    remainder: str = "none"
    rank: int = 0
    rank_share: float = 0.0
    group_size: int = 0

    def rank_of(self, rows: int, columns: int) -> int:
        """Rank of the remainder of a projection of that shape, at least 1."""
        return self.rank or max(1, int(self.rank_share * rows * columns / (rows + columns)))

    @property
    def words(self) -> str:
        """What reports call it: the granularity of a threshold, or the rule."""
        return (self.per if self.rule == "threshold" else self.rule) + (" by proxy" if self.by_proxy else "")

    def problem(self, site: str) -> str:
        """Why this rule cannot be applied to a site, or nothing."""
        for what, given, known in (
            ("site", site, ALL_SITES),
            ("rule", self.rule, GROUP_RULES if site == GROUP else RULES),
            ("granularity", self.per, GRANULARITIES),
            ("remainder", self.remainder, REMAINDERS),
        ):
            if given not in known:
                return f"the {what} {given!r}, which this model does not apply; known: {', '.join(known)}"
        if (site == GROUP) != (self.group_size > 0):
            return f"groups of {self.group_size} neurons at {site}"
        if site == GROUP and self.weighted:
            return "weighted scores of groups"
        if self.rule == "threshold" and self.weighted:
            return "weighted thresholds, which are thresholds per channel"
        if self.rule != "threshold" and self.per != "layer":
            return f"{self.rule} per channel; its number is one of a layer"
        if self.rotated and site not in INPUT_SITES:
            return f"a rotation of {site}, which is not the input of a projection"
        if self.by_proxy and site != "inter":
            return f"proxies of {site}; they are of inter"
        if self.remainder != "none" and site not in READERS:
            return f"a remainder at {site}, which no projection reads"
        if self.remainder == "low_rank" and (site not in INPUT_SITES or len(INPUTS[site]) > 1 or self.rotated):
            return f"a low-rank remainder at {site}; it needs an unrotated input of one projection"
        if (self.remainder == "low_rank") != (self.rank > 0 or self.rank_share > 0) or (self.rank and self.rank_share):
            return f"a {self.remainder} remainder of rank {self.rank} and of a share of {self.rank_share:g}"
        return ""


def site_rules(config: Any) -> dict[str, SiteRule]:
    """The rule of each masked site of a model, in the order of ALL_SITES; empty without a mask.

    Raises:
        ValueError: If the configuration names a site or a rule that this code does not apply.
    """
    stored = getattr(config, "sparsification", None)
    if not stored:
        return {}
    rules = {site: SiteRule(**fields) for site, fields in stored["sites"].items()}
    problems = [problem for site, rule in rules.items() if (problem := rule.problem(site))]
    shared = [site for site in rules if "." in site and site.partition(".")[0] in rules]
    if shared:
        problems.append(f"masks on {shared[0]} and on {shared[0].partition('.')[0]}, which holds it")
    inputs = [site for site in rules if site.startswith("ffn_in")]
    if inputs and ranks_by_proxy(rules):
        problems.append(f"proxies of inter with a mask on {inputs[0]}; they read the input as it is")
    if GROUP in rules and num_neurons(config) % max(1, rules[GROUP].group_size):
        problems.append(
            f"groups of {rules[GROUP].group_size} among {num_neurons(config)} neurons, which they do not divide"
        )
    if GROUP in rules and ranks_by_proxy(rules):
        problems.append("proxies of inter with a router of groups; both choose before anything is read")
    if problems:
        raise ValueError(f"sparsification has {problems[0]}")
    return {site: rules[site] for site in ALL_SITES if site in rules}


def ranks_by_proxy(rules: Mapping[str, SiteRule]) -> bool:
    """Whether neurons are chosen by int4 copies of gate and up."""
    return any(rule.by_proxy for rule in rules.values())


def is_in_activation(site: str, rule: SiteRule) -> bool:
    """Whether a mask is `FfnActivation.threshold`, not a module of its own."""
    return site == "inter" and rule.rule == "threshold" and not rule.by_proxy


def read_mask(config: Any, other_fields: dict[str, Any]) -> None:
    """Checks a configuration's mask, which older bundles write as `ffn_thresholds: neuron`; takes that out of the other fields.

    Raises:
        ValueError: If this code does not apply it.
    """
    old = other_fields.pop("ffn_thresholds", "none")
    if old not in ("none", "neuron"):
        raise ValueError(f"ffn_thresholds is {old!r}; allowed: none, neuron")
    if old == "neuron":
        config.sparsification = {"method": "thresholds", "sites": {"inter": {"rule": "threshold", "per": "channel"}}}
    site_rules(config)


def num_experts(config: Any) -> int:
    """Experts of one layer; 1 in a dense model."""
    return getattr(config, "num_local_experts", None) or 1


def has_experts(config: Any) -> bool:
    """Whether a model is a mixture of experts, be it of one."""
    return bool(getattr(config, "num_local_experts", None))


def experts_per_token(config: Any) -> int:
    """Experts that a token is routed to; 1 in a dense model."""
    return config.num_experts_per_tok if num_experts(config) > 1 else 1


def num_neurons(config: Any) -> int:
    """Neurons of a feed-forward block; in a mixture of experts, of one expert."""
    return getattr(config, "moe_intermediate_size", None) or config.intermediate_size


def hidden_share(config: Any) -> float:
    """Share of the hidden size that a token uses in blocks; below 1 in a mixture of hidden dimensions."""
    parts = getattr(config, "sub_dimensions", None)
    return config.active_sub_dimensions / parts if parts else 1.0


def head_size(config: Any) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def is_fused(block: Any) -> bool:
    """Whether a feed-forward block holds all experts of its layer in one parameter."""
    return hasattr(block, "gate_up_proj")


def projection_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each projection of a layer; in a mixture of experts, of one expert."""
    hidden, neurons, head_dim = config.hidden_size, num_neurons(config), head_size(config)
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (neurons, hidden),
        "up_proj": (neurons, hidden),
        "down_proj": (hidden, neurons),
    }


def site_parts(config: Any, site: str, rule: SiteRule) -> dict[str, tuple[int, ...]]:
    """Shape of each stored part of one site of one layer, by its name: the mask's own, and `PROJECTION.PART` of remainders.

    Parts: `threshold`, `kept_share` or `dropped_mass` as the rule says; `weight`; `basis`; `constant`; `left` and `right`; of groups
    `router` and `bias`, and a number.
    """
    projections = projection_shapes(config)
    if site == GROUP:
        groups = (*((config.num_local_experts,) if has_experts(config) else ()), num_neurons(config) // rule.group_size)
        number = "kept_share" if rule.rule == "router_top_k" else "threshold"
        return {"router": (*groups, config.hidden_size), "bias": groups, number: (1,)}
    channels = projections[READERS[site][0]][1] if site in READERS else num_neurons(config)
    experts = getattr(config, "num_local_experts", None)
    # The input of all experts has one mask; what one expert computes, or reads by itself, has one for each.
    own = (experts,) if experts and site not in ("attn_out", "ffn_in") and not site.startswith("attn_in") else ()
    per_channel = (*own, channels)
    parts: dict[str, tuple[int, ...]] = {NUMBERS[rule.rule]: per_channel if rule.per == "channel" else (1,)}
    if rule.weighted:
        parts["weight"] = per_channel
    if rule.rotated:
        parts["basis"] = (channels, channels)
    for name in READERS.get(site, ()):
        rows, columns = projections[name]
        of_expert = (experts,) if experts and name in ("gate_proj", "up_proj", "down_proj") else ()
        if rule.remainder == "constant":
            parts[f"{name}.constant"] = (*of_expert, rows)
        elif rule.remainder == "low_rank":
            parts[f"{name}.left"], parts[f"{name}.right"] = (
                (*of_expert, rows, rule.rank_of(rows, columns)),
                (*of_expert, rule.rank_of(rows, columns), columns),
            )
    return parts


def mask_tensors(config: Any) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """For each masked site, the parts that are stored (see `site_parts`): name inside a layer, and shape."""
    found = {}
    for site, rule in site_rules(config).items():
        mask = mask_name(config, site, rule)
        found[site] = {}
        for part, shape in site_parts(config, site, rule).items():
            projection, _, own = part.rpartition(".")
            name = f"{_projection_name(config, projection)}.remainder_{own}" if projection else f"{mask}{part}"
            found[site][part] = (name, shape)
    return found


def mask_name(config: Any, site: str, rule: SiteRule) -> str:
    """What the names of a mask's own tensors begin with, inside a layer."""
    block = "mlp.experts." if has_experts(config) else "mlp."
    if is_in_activation(site, rule):
        return f"{block}ffn_activation."
    if site == GROUP:
        return f"{block}group_router."
    if site in FACTOR_SITES:
        return f"{block}ffn_activation.{site}_mask."
    if site in ("attn_in", "ffn_in"):
        return f"{'self_attn.' if site == 'attn_in' else block}input_mask."
    return f"{_projection_name(config, INPUTS[site][0])}.input_mask."


def _projection_name(config: Any, projection: str) -> str:
    if projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return f"self_attn.{projection}"
    # Experts are one parameter, which holds no modules: what masks their projections is next to it.
    return f"mlp.experts.{projection}_mask" if has_experts(config) else f"mlp.{projection}"


def drop_small(
    x: torch.Tensor,
    threshold: torch.Tensor,
    experts: int | torch.Tensor | None = None,
    sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """x, set to zero where its magnitude does not exceed the threshold.

    Args:
        x: [..., channels].
        threshold: [1] or [channels], or [experts, channels].
        experts: The expert of all rows, or of each row: [rows]. Needed for thresholds of experts.
        sizes: What is compared instead of its magnitude, of the shape of x.

    Raises:
        ValueError: If it is needed and not given.
    """
    sizes = x.detach().abs() if sizes is None else sizes
    return torch.where(sizes <= of_experts(threshold, 1, experts), 0.0, x)


def of_experts(tensor: torch.Tensor, dimensions: int, experts: int | torch.Tensor | None) -> torch.Tensor:
    """Those of a tensor's values that belong to an expert, where it has some for each: then it has more than so many dimensions.

    Raises:
        ValueError: If experts are needed and not given.
    """
    if tensor.dim() <= dimensions:
        return tensor
    if experts is None:
        raise ValueError("These thresholds are of experts: say which expert each row belongs to")
    return tensor[experts]


class SiteMask(nn.Module):
    """Sets the elements of a vector to zero that a rule does not keep (see the module's text).

    It keeps everything until its buffers are filled.
    """

    threshold: torch.Tensor
    kept_share: torch.Tensor
    dropped_mass: torch.Tensor
    weight: torch.Tensor | None
    basis: torch.Tensor | None

    def __init__(self, rule: SiteRule, parts: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.rule = rule
        number = NUMBERS[rule.rule]
        # Not -inf: what a checkpoint lacks is filled by this, and must not pass for a mask that keeps everything.
        self.register_buffer(number, torch.full(parts[number], 1.0 if number == "kept_share" else 0.0))
        self.register_buffer("weight", torch.ones(parts["weight"]) if rule.weighted else None)
        self.register_buffer("basis", torch.eye(*parts["basis"]) if rule.rotated else None)

    def forward(
        self, x: torch.Tensor, experts: int | torch.Tensor | None = None, sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The masked vector, of the shape of x, [..., channels], in its rotated coordinates if there are any.

        Args:
            x: The vector as the layer computes it.
            experts: The expert of all rows, or of each row: [rows]. Needed for numbers of experts.
            sizes: Magnitudes by proxy, of the shape of x, for a mask that chooses by them.
        """
        return self.choose(self.rotate(x), experts, sizes)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.basis is None else x @ self.basis

    def choose(
        self, x: torch.Tensor, experts: int | torch.Tensor | None = None, sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`forward` for a vector that is rotated already."""
        if self.rule.by_proxy != (sizes is not None):
            raise ValueError("A mask by proxy needs magnitudes by proxy, and no other mask takes them")
        if self.rule.rule == "threshold":
            return drop_small(x, self.threshold, experts, sizes)
        scores = x.detach().abs() if sizes is None else sizes
        if self.weight is not None:
            scores = scores * of_experts(self.weight, 1, experts)
        if self.rule.rule == "top_k":
            kept = largest(scores, kept_count(float(self.kept_share), x.shape[-1]))
        else:
            kept = _heaviest(scores, float(self.dropped_mass))
        return torch.where(kept | scores.isnan(), x, 0.0)

    def of_expert(self, expert: int) -> SiteMask:
        """The mask of one expert, on the same tensors."""
        own = SiteMask.__new__(SiteMask)
        nn.Module.__init__(own)
        own.rule = self.rule
        for name, values in self._buffers.items():
            own.register_buffer(name, values if values is None else _own(name, values, expert))
        return own

    def keep_all(self) -> SiteMask:
        """Fills its buffers so that it keeps every element, in the coordinates in which it is given; returns itself."""
        for name, value in (("threshold", -torch.inf), ("kept_share", 1.0), ("dropped_mass", 0.0), ("weight", 1.0)):
            if getattr(self, name, None) is not None:
                getattr(self, name).fill_(value)
        if self.basis is not None:
            nn.init.eye_(self.basis)
        return self

    def put(self, parts: Mapping[str, torch.Tensor]) -> SiteMask:
        """Replaces its tensors by those of these names; returns itself."""
        for name, values in parts.items():
            setattr(self, name, values)
        return self


def _own(name: str, values: torch.Tensor, expert: int) -> torch.Tensor:
    return values[expert] if values.dim() > (2 if name == "basis" else 1) else values


def kept_count(share: float, channels: int) -> int:
    """How many of so many elements `top_k` keeps: the share of them, rounded, and at least one."""
    return min(channels, max(1, round(share * channels)))


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Bool of the shape of scores: the so many largest of each row; NaN counts as largest."""
    if count == scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count, dim=-1).indices, True)


def _heaviest(scores: torch.Tensor, dropped_mass: float) -> torch.Tensor:
    if dropped_mass <= 0.0:
        return torch.ones_like(scores, dtype=torch.bool)
    ordered, places = scores.float().sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = before < (1 - dropped_mass) * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter_(-1, places, kept)
