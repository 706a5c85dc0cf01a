"""Activation statistics: exact integer counts of which neurons fired, from which every measure is derived.

Counts are sums over tokens, so they do not depend on the order or the size of batches, they merge exactly, and
they sum over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import torch
import torch.distributed as dist

from sparsify.models.masking import COUNTED_SITES

Factor = Literal["gate", "up", "product"]
Cause = Literal["gate_only", "up_only", "both", "underflow"]

POSITION_STARTS = (0, *(2**power for power in range(20)))
"""First position of each bucket of positions: 0, 1, 2 to 3, 4 to 7, and so on; the last bucket is open."""
MAX_BYTE = 255
BYTE_SUM = 128
"""Values added by one sum in bytes: a power of two within MAX_BYTE."""
OF_LAYERS = ("site_values", "site_zeros")
"""Counts of a layer, which its experts share."""


@dataclass(frozen=True)
class ActivationStatistics:
    """How often neurons fired. A value is zero if the model, in its own dtype, computed exactly 0.

    A dense model has one expert per layer. All tensors are int64 on one device.

    Attributes:
        num_tokens: Counted tokens of text, a scalar.
        routed_tokens: Tokens that each expert computed, [layers, experts]; equal to num_tokens in a dense model.
        gate_fired: Tokens whose gate factor was not zero, [layers, experts, neurons].
        up_fired: The same for the up factor.
        product_fired: The same for their product, the neuron activation.
        tokens_by_zeros: [layers, experts, neurons + 1]. Entry z counts the tokens with exactly z zero products.
        underflows: Zero products of two factors that are not zero, [layers, experts].
        position_tokens: Tokens by their position in the document, [layers, experts, buckets] as in POSITION_STARTS.
        position_fired: Products of these tokens that were not zero, [layers, experts, buckets].
        site_values: Values at each of COUNTED_SITES, 0 where the model has no mask there, [layers, sites].
        site_zeros: Those of them that were zero after the mask.
    """

    num_tokens: torch.Tensor
    routed_tokens: torch.Tensor
    gate_fired: torch.Tensor
    up_fired: torch.Tensor
    product_fired: torch.Tensor
    tokens_by_zeros: torch.Tensor
    underflows: torch.Tensor
    position_tokens: torch.Tensor
    position_fired: torch.Tensor
    site_values: torch.Tensor
    site_zeros: torch.Tensor

    @classmethod
    def empty(
        cls,
        num_layers: int,
        num_experts: int,
        num_neurons: int,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Statistics of no tokens. `num_neurons` is the width of one expert."""

        def counts(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        per_expert = (num_layers, num_experts)
        return cls(
            num_tokens=counts(),
            routed_tokens=counts(*per_expert),
            gate_fired=counts(*per_expert, num_neurons),
            up_fired=counts(*per_expert, num_neurons),
            product_fired=counts(*per_expert, num_neurons),
            tokens_by_zeros=counts(*per_expert, num_neurons + 1),
            underflows=counts(*per_expert),
            position_tokens=counts(*per_expert, len(POSITION_STARTS)),
            position_fired=counts(*per_expert, len(POSITION_STARTS)),
            site_values=counts(num_layers, len(COUNTED_SITES)),
            site_zeros=counts(num_layers, len(COUNTED_SITES)),
        )

    def add(
        self,
        layer: int,
        expert: int,
        gate: torch.Tensor,
        up: torch.Tensor,
        product: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Counts the tokens of one block in place: gate and up factors and their product, [tokens, neurons], and each
        token's position in its document. `num_tokens` does not change, since every layer sees the same text.
        """
        # A cast to torch.bool is the same as `!= 0`, and many times faster on a CPU.
        fired, gate_fired, up_fired = product.bool(), gate.bool(), up.bool()
        fired_of_token = count_rows(fired)
        zeros = fired.shape[1] - fired_of_token
        starts = torch.tensor(POSITION_STARTS[1:], device=positions.device)
        bucket = torch.bucketize(positions, starts, right=True)
        self.routed_tokens[layer, expert] += len(fired)
        self.gate_fired[layer, expert] += count_columns(gate_fired)
        self.up_fired[layer, expert] += count_columns(up_fired)
        self.product_fired[layer, expert] += count_columns(fired)
        self.tokens_by_zeros[layer, expert].index_add_(0, zeros, torch.ones_like(zeros))
        underflow = gate_fired & up_fired & fired.logical_not()
        self.underflows[layer, expert] += count_rows(underflow).sum()
        self.position_tokens[layer, expert].index_add_(0, bucket, torch.ones_like(zeros))
        self.position_fired[layer, expert].index_add_(0, bucket, fired_of_token)

    def add_site(self, layer: int, site: str, values: torch.Tensor) -> None:
        """Counts the values at one of COUNTED_SITES, after its mask, in place; of any shape."""
        column = COUNTED_SITES.index(site)
        self.site_values[layer, column] += values.numel()
        self.site_zeros[layer, column] += values.numel() - values.count_nonzero()

    def merge(self, other: Self) -> Self:
        """Statistics of both texts combined; exact, commutative and associative."""
        return type(self)(*(mine + theirs for mine, theirs in zip(self._counts(), other._counts(), strict=True)))

    def reduce(self) -> Self:
        """Statistics summed over ranks, on every rank; those of this process without torch.distributed."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        counts = self._counts()
        flat = torch.cat([count.flatten() for count in counts])
        if dist.get_backend() == "nccl":
            flat = flat.cuda()
        dist.all_reduce(flat)
        parts = flat.to(self.num_tokens.device).split([count.numel() for count in counts])
        return type(self)(*(part.view_as(count) for part, count in zip(parts, counts, strict=True)))

    @property
    def num_layers(self) -> int:
        return self.routed_tokens.shape[0]

    @property
    def num_experts(self) -> int:
        return self.routed_tokens.shape[1]

    @property
    def num_neurons(self) -> int:
        return self.product_fired.shape[2]

    def select(self, layer: int, expert: int | None = None) -> Self:
        """Statistics of one layer, or of one expert of a layer, in the shape of a model with one layer."""
        experts = slice(None) if expert is None else slice(expert, expert + 1)
        counts = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        of_layer = {name: count[layer : layer + 1] for name, count in counts.items()}
        selected = {name: count if name in OF_LAYERS else count[:, experts] for name, count in of_layer.items()}
        return type(self)(self.num_tokens, **selected)

    def zero_share(self, factor: Factor = "product") -> float:
        """Share of exact zeros among all computed values; experts are weighted by their routed tokens.

        Returns:
            A share between 0 and 1; NaN if no token was counted.
        """
        values = int(self.routed_tokens.sum()) * self.num_neurons
        return 1 - int(self._fired(factor).sum()) / values if values else float("nan")

    def zero_causes(self) -> dict[Cause, float]:
        """Why products are zero, as shares of all values; they sum to `zero_share("product")`.

        Returns:
            `gate_only`: only the gate factor is zero; `up_only`; `both`; `underflow`: neither is, but their product is
            too small for the dtype. NaN if no token was counted.
        """
        values = int(self.routed_tokens.sum()) * self.num_neurons
        gate, up, product = (int(count.sum()) for count in (self.gate_fired, self.up_fired, self.product_fired))
        underflows = int(self.underflows.sum())
        both_fired = product + underflows
        zeros: dict[Cause, int] = {
            "gate_only": up - both_fired,
            "up_only": gate - both_fired,
            "both": values - gate - up + both_fired,
            "underflow": underflows,
        }
        return {cause: count / values if values else float("nan") for cause, count in zeros.items()}

    def union_of_unrelated_tokens(self, num_tokens: int) -> float:
        """Share of all neurons (of all experts) that fire on at least one of `num_tokens` tokens: the exact mean over every
        choice of that many different tokens of the text.

        This is what a batch of unrelated sequences needs. A neuron that fired on f of N tokens fires on none of n chosen
        tokens with probability C(N - f, n) / C(N, n).

        Returns:
            A share between 0 and 1; NaN if the text is shorter than `num_tokens`.
        """
        total = self.num_tokens.double().cpu()
        if num_tokens > int(total):
            return float("nan")
        silent = total - self.product_fired.double().cpu()
        log_missing = (
            torch.lgamma(silent + 1)
            - torch.lgamma((silent - num_tokens).clamp(min=0) + 1)
            + torch.lgamma(total - num_tokens + 1)
            - torch.lgamma(total + 1)
        )
        missing = torch.where(silent >= num_tokens, log_missing.exp(), 0.0)
        return 1 - float(missing.mean())

    def position_zero_shares(self) -> dict[int, tuple[int, float]]:
        """Tokens and share of zero products, by first position of the bucket; only buckets with tokens."""
        tokens = self.position_tokens.sum((0, 1)).tolist()
        fired = self.position_fired.sum((0, 1)).tolist()
        return {
            start: (count // self.num_layers, 1 - hits / (count * self.num_neurons))
            for start, count, hits in zip(POSITION_STARTS, tokens, fired, strict=True)
            if count
        }

    def firing_rate_bound(self) -> float:
        """95% upper bound on the firing rate of a dead neuron: 1 - 0.05^(1/n), about 3/n, for n tokens.

        Assumes independent tokens, and takes the expert with the fewest tokens. The same bound holds for the share of tokens
        on which an always-on neuron does not fire.

        Returns:
            The bound; NaN if no token was counted.
        """
        routed = self.routed_tokens[self.routed_tokens > 0]
        return 1 - 0.05 ** (1 / int(routed.min())) if len(routed) else float("nan")

    def layer_zero_shares(self, factor: Factor = "product") -> list[float]:
        return [self.select(layer).zero_share(factor) for layer in range(self.num_layers)]

    def site_zero_shares(self) -> dict[str, float]:
        """Share of exact zeros at each of COUNTED_SITES that the model masks; empty without such a mask."""
        values, zeros = (count.sum(0).tolist() for count in (self.site_values, self.site_zeros))
        return {site: zeros[i] / values[i] for i, site in enumerate(COUNTED_SITES) if values[i]}

    def firing_rates(self) -> torch.Tensor:
        """Share of its routed tokens on which each neuron fired, float64 [layers, experts, neurons]; NaN for experts
        that no token was routed to.
        """
        return self.product_fired.double() / self.routed_tokens.unsqueeze(-1)

    def dead_neurons(self) -> torch.Tensor:
        """Neurons that fired on no routed token, bool [layers, experts, neurons]; none of an expert without tokens."""
        return (self.product_fired == 0) & (self.routed_tokens > 0).unsqueeze(-1)

    def always_on_neurons(self) -> torch.Tensor:
        """Neurons that fired on every routed token, bool [layers, experts, neurons]; none of an expert without tokens."""
        routed = self.routed_tokens.unsqueeze(-1)
        return (self.product_fired == routed) & (routed > 0)

    def zero_share_percentile(self, percent: int) -> float:
        """Percentile over routed tokens of a single token's share of zeros in one block.

        Returns:
            The smallest share that at least `percent` % of the tokens do not exceed (the inverse of the empirical
            distribution, exact); NaN if no token was counted.
        """
        cumulative = self.tokens_by_zeros.sum((0, 1)).cumsum(0)
        total = int(cumulative[-1])
        if total == 0:
            return float("nan")
        rank = -(-total * percent // 100)
        return int(torch.searchsorted(cumulative, rank)) / self.num_neurons

    def summary(self) -> dict[str, Any]:
        """The numbers of a line of sparsity.jsonl; shares are between 0 and 1."""
        sites = [self.select(layer).site_zero_shares() for layer in range(self.num_layers)]
        return {
            "num_tokens": int(self.num_tokens),
            "zeros": self.zero_share("product"),
            "gate_zeros": self.zero_share("gate"),
            "up_zeros": self.zero_share("up"),
            "layers": self.layer_zero_shares("product"),
            "sites": {site: [layer[site] for layer in sites] for site in self.site_zero_shares()},
            "dead_neurons": int(self.dead_neurons().sum()),
        }

    def _counts(self) -> list[torch.Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def _fired(self, factor: Factor) -> torch.Tensor:
        return {"gate": self.gate_fired, "up": self.up_fired, "product": self.product_fired}[factor]


def count_rows(mask: torch.Tensor) -> torch.Tensor:
    """Number of true values in each row of [rows, columns], int64 [rows].

    Sums of bytes over few enough values to fit are many times faster than sums of torch.bool, which torch converts first.
    """
    values = mask.view(torch.uint8)
    whole = values.shape[1] // BYTE_SUM * BYTE_SUM
    sums = values[:, :whole].unflatten(1, (-1, BYTE_SUM)).sum(-1, dtype=torch.uint8).sum(-1)
    return sums + values[:, whole:].sum(-1, dtype=torch.uint8)


def count_columns(mask: torch.Tensor) -> torch.Tensor:
    """Number of true values in each column of [rows, columns], int64 [columns]; in bytes if there are few enough rows."""
    fits = len(mask) <= MAX_BYTE
    return mask.view(torch.uint8).sum(0, dtype=torch.uint8 if fits else torch.int32).long()
