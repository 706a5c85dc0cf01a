"""Projections of integer weights that round what they read to integers, computed as such integers say, in fp32 (`config.quantisation`).

A weight is a code times the scale of its row. A projection's input x, [tokens, channels] of a sequence, is, in this order:

- multiplied by a Hadamard matrix (`hadamard.py`), if the weights hold its inverse: all of it in front of down (`rotated_down`), the
  heads among themselves in front of o (`rotated_heads`);
- divided by runtime scales at the `smoothed` projections: channels are sorted by their largest |x| among the tokens of the sequence
  (at least LEAST_PEAK; of equal ones the first one first), and of `smooth_group` neighbours all get the largest (RRS, arXiv 2409.20361);
- rounded to `activation_bits` symmetrically, a token by itself: to multiples of max |x| / (2^(bits - 1) - 1). Zeros stay zeros;
- multiplied by the runtime scales again.

A sequence is what one call of the model gets of one row of the batch, without its padding (`attention_mask`); documents that are packed
into a row, whose `position_ids` begin again, are sequences of their own. With one token, as in decoding, its own |x| are the
largest: then every group of channels has a scale of its own.

Keys and values are rounded as they enter the cache (`kv_bits`): a token's and a head's by themselves, KV_GROUP channels at most together,
to 2^bits - 1 equal steps from the least to the largest; keys after their positions, in the Hadamard coordinates of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, pad

from .hadamard import core_order, multiply
from .masking import FACTOR_SITES, has_experts, head_size, site_rules

WEIGHT_BITS = (4, 8)
INPUT_BITS = (4, 8, 16)
"""16 leaves the values as they are."""
LEAST_PEAK = 1e-5
KV_GROUP = 128
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CODES, SCALES = "weight_codes", "weight_scales"
"""What a projection has instead of `weight`."""


@dataclass(frozen=True)
class Quantisation:
    """`config.quantisation`.

    Attributes:
        method: That chose the integers.
        weight_bits: One of WEIGHT_BITS.
        activation_bits: One of INPUT_BITS.
        smooth_group: Channels that share a runtime scale; None for none.
        smoothed: The projections whose inputs have them.
        unquantised_inputs: The projections whose inputs are not rounded.
        rotated_down: Whether the input of down is rotated while the model runs.
        rotated_heads: Whether heads are mixed in front of o while the model runs.
        kv_bits: One of INPUT_BITS.
    """

    method: str
    weight_bits: int
    activation_bits: int = 16
    smooth_group: int | None = None
    smoothed: list[str] = field(default_factory=list)
    unquantised_inputs: list[str] = field(default_factory=list)
    rotated_down: bool = False
    rotated_heads: bool = False
    kv_bits: int = 16

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("weight_bits", self.weight_bits, WEIGHT_BITS),
            ("activation_bits", self.activation_bits, INPUT_BITS),
            ("kv_bits", self.kv_bits, INPUT_BITS),
        ):
            if value not in allowed:
                raise ValueError(f"quantisation has {name} {value!r}; allowed: {', '.join(map(str, allowed))}")
        if self.smooth_group is not None and not (isinstance(self.smooth_group, int) and self.smooth_group > 0):
            raise ValueError(f"quantisation has smooth_group {self.smooth_group!r}; allowed: 1 or more, or null")
        unknown = [name for name in (*self.smoothed, *self.unquantised_inputs) if name not in PROJECTIONS]
        if unknown:
            raise ValueError(f"quantisation names {unknown[0]!r}; projections: {', '.join(PROJECTIONS)}")

    def bits_of(self, projection: str) -> int:
        """Bits of what a projection reads."""
        return 16 if projection in self.unquantised_inputs else self.activation_bits

    def group_of(self, projection: str) -> int | None:
        """Channels of a projection's input that share a runtime scale; None without."""
        return self.smooth_group if projection in self.smoothed and self.bits_of(projection) < 16 else None

    @property
    def words(self) -> str:
        """Such as W4A4 by rrs."""
        cache = "" if self.kv_bits == 16 else f", keys and values in {self.kv_bits} bits"
        return f"W{self.weight_bits}A{self.activation_bits} by {self.method}{cache}"


def quantisation(config: Any) -> Quantisation | None:
    """Of a configuration, be it an object or the fields of config.json; None where weights are numbers.

    Raises:
        ValueError: If this code does not compute it.
    """
    stored = config.get("quantisation") if isinstance(config, dict) else getattr(config, "quantisation", None)
    if not stored:
        return None
    try:
        return Quantisation(**stored)
    except TypeError as error:
        raise ValueError(f"quantisation is {stored!r}: {error}") from error


def check_quantisation(config: Any) -> None:
    """Raises ValueError if a configuration has integers that this code does not compute."""
    if (stored := quantisation(config)) is not None and (problem := obstacle(config, stored)):
        raise ValueError(f"quantisation does not fit the model: {problem}")


def obstacle(config: Any, stored: Quantisation) -> str:
    """Why a model cannot have these integers, or nothing."""
    if has_experts(config):
        return "its experts are held as one tensor, and routed by code that multiplies numbers, not integers"
    for site, rule in site_rules(config).items():
        if rule.by_proxy:
            return "its mask ranks neurons by int4 copies of weights, which are numbers"
        if rule.remainder != "none":
            return f"its mask at {site} has a remainder, which adds to a projection of numbers"
        if site not in (*FACTOR_SITES, "attn_in", "ffn_in", "group"):
            return f"its mask at {site} is part of a projection of numbers"
    sizes = {
        "the number of neurons": config.intermediate_size if stored.rotated_down else 1,
        "the number of heads": config.num_attention_heads if stored.rotated_heads else 1,
        "the size of a head": head_size(config) if stored.kv_bits < 16 else 1,
    }
    for name, size in sizes.items():
        if core_order(size) is None:
            return f"{name} is {size}, and there is no Hadamard matrix of that size here"
    return ""


class Sequences:
    """Which tokens of the current call of a model belong together; set by it, read by its projections.

    Attributes:
        numbers: Number of each token's sequence within its row, [rows, tokens]; None where each row is one.
        padding: Which tokens are padding, bool [rows, tokens]; None for none.
    """

    def __init__(self) -> None:
        self.numbers: torch.Tensor | None = None
        self.padding: torch.Tensor | None = None

    def begin(self, kwargs: dict[str, Any]) -> None:
        """Takes them from the arguments of a call."""
        self.numbers = self.padding = None
        tokens = kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or tokens.shape[1] == 1:
            return
        rows, length = tokens.shape[:2]
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask[:, -length:].all()):
            self.padding = mask[:, -length:] == 0
        if isinstance(positions, torch.Tensor) and positions.dim() == 2:
            begins = pad(positions[:, 1:] <= positions[:, :-1], (1, 0))
            if bool(begins.any()):
                self.numbers = begins.cumsum(1).expand(rows, -1)

    def end(self) -> None:
        self.numbers = self.padding = None


def channel_peaks(x: torch.Tensor, sequences: Sequences | None = None) -> torch.Tensor:
    """Largest |x| of each channel among the tokens of a sequence, at least LEAST_PEAK.

    Args:
        x: [..., tokens, channels]; without sequences all but the last two dimensions are sequences.
        sequences: Of the current call, [rows, tokens].

    Returns:
        Of the shape of x, or with one token where all have the same.
    """
    sizes = x.abs()
    padding, numbers = (None, None) if sequences is None else (sequences.padding, sequences.numbers)
    if padding is not None and padding.shape == x.shape[:-1]:
        sizes = sizes.masked_fill(padding[..., None], 0.0)
    if numbers is not None and numbers.shape == x.shape[:-1]:
        places = numbers[..., None].expand_as(x)
        count = int(numbers.max()) + 1
        peaks = sizes.new_zeros(x.shape[0], count, x.shape[2]).scatter_reduce(1, places, sizes, "amax")
        return peaks.gather(1, places).clamp(min=LEAST_PEAK)
    return sizes.amax(-2, keepdim=True).clamp(min=LEAST_PEAK)


def runtime_scales(peaks: torch.Tensor, group: int) -> torch.Tensor:
    """What each channel is divided by, of the shape of the peaks, [..., channels]: the largest peak of its group."""
    ordered, order = peaks.sort(dim=-1, descending=True, stable=True)
    shared = ordered[..., ::group].repeat_interleave(group, dim=-1)[..., : peaks.shape[-1]]
    return torch.empty_like(peaks).scatter_(-1, order, shared)


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row of x, [..., channels], as integers of so many bits times one number, symmetrically; 16 bits leave it."""
    if bits >= 16:
        return x
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    step = torch.where(step == 0, 1.0, step)
    return (x / step).round() * step


def rounded_cache(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Keys or values, [..., channels of a head], as a cache of so many bits holds them."""
    group = min(KV_GROUP, x.shape[-1])
    parts = x.unflatten(-1, (-1, group)) if x.shape[-1] % group == 0 else x[..., None, :]
    least, largest = parts.aminmax(dim=-1, keepdim=True)
    step = (largest - least) / (2**bits - 1)
    step = torch.where(step == 0, 1.0, step)
    return (((parts - least) / step).round() * step + least).view_as(x)


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Codes of four bits, int8 [outputs, inputs], two in a byte: element 2i in the low four bits. uint8 [outputs, ⌈inputs / 2⌉]"""
    pairs = pad(codes, (0, codes.shape[1] % 2)).view(codes.shape[0], -1, 2) & 15
    return (pairs[..., 0] | pairs[..., 1] << 4).view(torch.uint8)


def unpacked(data: torch.Tensor, inputs: int) -> torch.Tensor:
    """The codes that `packed` was given, int8 [outputs, inputs]."""
    pairs = torch.stack([data & 15, data >> 4], dim=-1).view(torch.int8).flatten(1)
    return ((pairs ^ 8) - 8)[:, :inputs]


class IntegerLinear(nn.Module):
    """A linear projection of integer weights, computed in fp32 as the module's text says.

    Attributes:
        weight_codes: int8 [outputs, inputs] of 8 bits; of 4 bits uint8 [outputs, ⌈inputs / 2⌉], see `packed`.
        weight_scales: fp32 [outputs].
        bias: [outputs], or None.
        activation_bits: Bits of what it reads.
        smooth_group: Channels that share a runtime scale; None without.
        turned: How many equal parts of the input are mixed by a Hadamard matrix: as many as inputs for all of it; 1 for none.
        sequences: Of the current call of the model; None outside one.
    """

    weight_codes: torch.Tensor
    weight_scales: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight_bits: int,
        activation_bits: int = 16,
        smooth_group: int | None = None,
        turned: int = 1,
        bias: bool = False,
        sequences: Sequences | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.weight_bits = in_features, out_features, weight_bits
        self.activation_bits, self.smooth_group, self.turned = activation_bits, smooth_group, turned
        self.sequences = sequences
        columns, dtype = (in_features, torch.int8) if weight_bits == 8 else (-(-in_features // 2), torch.uint8)
        self.register_buffer(CODES, torch.zeros(out_features, columns, dtype=dtype, device=device))
        # Their dtype is said: a model is built in another default one.
        self.register_buffer(SCALES, torch.ones(out_features, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device), requires_grad=False) if bias else None
        self._weight: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., outputs] of x [..., inputs], in the dtype of x."""
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "A model of integer weights is not trained: train the one that it was made from, then quantise it"
            )
        bias = None if self.bias is None else self.bias.float()
        return linear(self.read(x), self.dequantised(), bias).to(x.dtype)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """What it multiplies its weights with, in fp32 and of the shape of x."""
        x = self.turn(x.float())
        if self.activation_bits >= 16 or self.smooth_group is None:
            return rounded(x, self.activation_bits)
        scales = runtime_scales(channel_peaks(x if x.dim() > 1 else x[None], self.sequences), self.smooth_group)
        return rounded(x / scales, self.activation_bits) * scales

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., inputs] in the coordinates of its weights."""
        if self.turned == 1:
            return x
        return multiply(x.unflatten(-1, (self.turned, -1)), -2).flatten(-2)

    def codes(self) -> torch.Tensor:
        """int8 [outputs, inputs]."""
        return self.weight_codes if self.weight_bits == 8 else unpacked(self.weight_codes, self.in_features)

    def dequantised(self) -> torch.Tensor:
        """fp32 [outputs, inputs]; made once, until the codes are others."""
        if self._weight is None or self._weight.device != self.weight_codes.device:
            self._weight = self.codes().float() * self.weight_scales[:, None]
        return self._weight

    @property
    def weight(self) -> torch.Tensor:
        """What multiplies its input as that comes, if nothing were rounded: fp32 [outputs, inputs], made on each call."""
        own = self.dequantised()
        return own if self.turned == 1 else multiply(own.unflatten(-1, (self.turned, -1)), -2, inverse=True).flatten(-2)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        scales, self._weight = self.weight_scales, None
        super()._apply(fn, recurse)
        if self.weight_scales.dtype != torch.float32:  # a cast of the model is not of the integers' scales
            self.weight_scales = scales.to(self.weight_scales.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._weight = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_weight": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, weight_bits={self.weight_bits}, "
            f"activation_bits={self.activation_bits}, smooth_group={self.smooth_group}, turned={self.turned}"
        )


class RoundedCache:
    """A cache of keys and values that holds them in few bits; of none it is one that forgets."""

    def __init__(self, cache: Any, bits: int) -> None:
        self._cache, self._bits = cache, bits

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        turned = rounded_cache(multiply(keys.float()), self._bits)
        keys, values = (
            multiply(turned, inverse=True).to(keys.dtype),
            rounded_cache(values.float(), self._bits).to(values.dtype),
        )
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def install_integers(model: Any) -> None:
    """Gives every layer of a finished decoder the projections that `config.quantisation` says; nothing without it."""
    stored = quantisation(model.config)
    if stored is None:
        return
    check_quantisation(model.config)
    model.sequences = Sequences()
    for layer in model.layers:
        for name in PROJECTIONS:
            home = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
            old = getattr(home, name)
            turned = {"down_proj": old.in_features if stored.rotated_down else 1}
            turned["o_proj"] = model.config.num_attention_heads if stored.rotated_heads else 1
            new = IntegerLinear(
                old.in_features,
                old.out_features,
                weight_bits=stored.weight_bits,
                activation_bits=stored.bits_of(name),
                smooth_group=stored.group_of(name),
                turned=turned.get(name, 1),
                bias=old.bias is not None,
                sequences=model.sequences,
                device=old.weight.device,
            )
            setattr(home, name, new)
        if stored.kv_bits < 16:
            layer.self_attn.kv_bits = stored.kv_bits
            layer.self_attn.register_forward_pre_hook(_round_cache, with_kwargs=True)
    model.register_forward_pre_hook(_begin_sequences, with_kwargs=True)
    model.register_forward_hook(_end_sequences, always_call=True)


# Hooks take what they need from the module that they are called with: a copy of the model must not share it.
def _begin_sequences(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    model.sequences.begin(({"input_ids": args[0]} if args else {}) | kwargs)


def _end_sequences(model: Any, args: tuple[Any, ...], output: Any) -> None:
    model.sequences.end()


def _round_cache(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, kwargs | {"past_key_values": RoundedCache(kwargs.get("past_key_values"), attention.kv_bits)}
