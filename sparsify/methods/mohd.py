"""MoHD (arXiv 2412.05644): a dense model upcycled to hidden-dimension routing, the load-balancing loss, and the routers' statistics.

The balancing loss of a router that sends each token to k of N_spec specialised sub-dimensions is N_spec · Σ_i f_i p_i, with f_i the share of
all choices that fell on i and p_i its mean probability among the specialised ones; 1 when even. What is added to the loss is
the mean over routers, times `training.router_aux_loss_coefficient` or the model's own 0.01.

Upcycling sorts the channels of the residual stream, which does not change what a dense model computes: those with the most energy on the
calibration text become the shared sub-dimensions, the others are dealt out in turn, so that each sub-dimension has about the same energy.
Fusions start as the identity. A router's centroid points to where its sub-dimension has the most energy, without the direction that all
tokens share, and is short, so that gates begin near 1; where nothing is chosen it is zero, and the model computes what the dense one does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn
from torch.utils.hooks import RemovableHandle

from sparsify.conversion.convert import DENSE_ONLY_FIELDS, UPCYCLED
from sparsify.errors import ModelError
from sparsify.methods.base import MethodSettings, register
from sparsify.methods.live_model import ForwardMeter
from sparsify.methods.objective import MicroBatch, TrainingRun, objective
from sparsify.methods.router import LOAD_DECIMALS, LoadBalance
from sparsify.models import SparseConfig, SparseModel
from sparsify.models.masking import has_experts
from sparsify.models.sparse_mohd import HiddenRouter, SparseMohdConfig, SparseMohdForCausalLM

ROUTER_DEVIATION = 0.1
"""Standard deviation of an upcycled router's logits on the calibration tokens: gates begin within a tenth of 1."""
BLOCKS: tuple[Literal["attention", "ffn"], ...] = ("attention", "ffn")
"""What a layer's two routers are in front of."""
NORMS = ("input_layernorm", "post_attention_layernorm")


class MohdSettings(MethodSettings):
    sub_dimensions: int = Field(default=16, ge=1, description="Equal parts of the hidden size, such as 16.")
    shared_sub_dimensions: int = Field(default=6, ge=0, description="Of these, how many every token uses.")
    active_sub_dimensions: int = Field(default=8, ge=1, description="How many a token uses, the shared ones included.")
    gate_scale: Literal["sum", "mean"] = Field(
        default="mean", description="mean, so that an upcycled model begins near the dense one; sum, as published."
    )


@register
class Mohd:
    name = "mohd"
    paper = "arXiv 2412.05644"
    Settings = MohdSettings

    def __init__(self, settings: MohdSettings) -> None:
        self._settings = settings

    def held_as(self, dense: SparseConfig) -> SparseMohdConfig:
        """The configuration of the upcycled model.

        Raises:
            ModelError: If the dense model cannot be upcycled, or its hidden size not be divided so.
        """
        if dense.model_type not in UPCYCLED or has_experts(dense):
            raise ModelError(
                f"conversion.method is mohd, and the model is {dense.model_type}.",
                allowed=f"Dense models whose layers are Mistral's: {', '.join(UPCYCLED)}.",
                next_step="Choose another model, or another conversion.method.",
            )
        fields = {key: value for key, value in dense.to_dict().items() if key not in DENSE_ONLY_FIELDS}
        fields.setdefault("sliding_window", None)
        try:
            return SparseMohdConfig(**fields | self._settings.model_dump())
        except Exception as error:  # transformers wraps what its checks raise
            reason = str(error).strip().splitlines()[-1].strip()
            raise ModelError(
                f"conversion.method_settings do not fit the model: {reason}.",
                next_step="Give sub_dimensions that divide the hidden size, and shared <= active <= all of them.",
            ) from error

    @torch.no_grad()
    def upcycle(self, dense: SparseModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> SparseMohdForCausalLM:
        """A model with the weights of a dense one, in its dtype; `batches` of input_ids and position_ids are iterated three times."""
        config = self.held_as(dense.config)
        width = config.hidden_size // config.sub_dimensions
        order = channel_order(_energy(dense, batches), config)
        model = SparseMohdForCausalLM(config)
        model.to(dtype=dense.dtype, device=dense.device)  # pyright: ignore[reportCallIssue]
        state = model.state_dict()
        for name, value in dense.state_dict().items():
            state[name].copy_(in_order(name, value, order))
        for one in routers_of(model):
            one.centroids.weight.zero_()
        if config.chooses:
            for one, rows in zip(routers_of(model), _centroids(dense, batches, order, width, config), strict=True):
                one.centroids.weight[config.shared_sub_dimensions :] = rows.to(dense.dtype)
        return model.eval()


def channel_order(energy: torch.Tensor, config: SparseMohdConfig) -> torch.Tensor:
    """Which channel of the dense model takes each place, [hidden], from their energy: the shared ones by falling energy, then the
    others dealt out in turn.
    """
    width = config.hidden_size // config.sub_dimensions
    ranked = energy.argsort(descending=True, stable=True)
    shared, others = ranked.split(
        [config.shared_sub_dimensions * width, len(ranked) - config.shared_sub_dimensions * width]
    )
    return torch.cat([shared, others.view(width, -1).T.flatten()])


def in_order(name: str, value: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A dense model's tensor with the channels of the residual stream in another order."""
    if name.endswith(("o_proj.weight", "down_proj.weight")) or value.dim() == 1:
        return value[order]
    return value[:, order]


def routers_of(model: Any) -> list[HiddenRouter]:
    """Both routers of every layer, in the order in which they run."""
    return [getattr(layer, f"{block}_router") for layer in model.model.layers for block in BLOCKS]


def _block_inputs(
    dense: SparseModel, batches: Iterable[Mapping[str, torch.Tensor]]
) -> Iterator[tuple[int, torch.Tensor]]:
    """What each block reads, [tokens, hidden] in fp64, by its number in the order in which they run."""
    seen: list[tuple[int, torch.Tensor]] = []

    def keep(number: int, module: nn.Module, args: object, output: torch.Tensor) -> None:
        seen.append((number, output.flatten(0, -2).double()))

    norms = [getattr(layer, name) for layer in dense.model.layers for name in NORMS]
    hooks = [norm.register_forward_hook(partial(keep, number)) for number, norm in enumerate(norms)]
    try:
        for batch in batches:
            inputs = {key: batch[key].to(dense.device) for key in ("input_ids", "position_ids")}
            dense.model(**inputs, use_cache=False)
            yield from seen
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()


def _energy(dense: SparseModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Each channel's share of the energy of what blocks read, mean over blocks. [hidden]"""
    sums = torch.zeros(2 * dense.config.num_hidden_layers, dense.config.hidden_size, dtype=torch.float64)
    for number, x in _block_inputs(dense, batches):
        sums[number] += x.square().sum(0).cpu()
    return (sums / sums.sum(1, keepdim=True)).mean(0)


def _centroids(
    dense: SparseModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    order: torch.Tensor,
    width: int,
    config: SparseMohdConfig,
) -> torch.Tensor:
    """Centroids of the specialised sub-dimensions of every router, fp64 [routers, specialised, hidden].

    Each is the mean input of the tokens whose energy in that sub-dimension, relative to its mean over tokens, is the largest; without
    the component along the mean of all tokens, and as long as makes the deviation of its logits ROUTER_DEVIATION.
    """
    first, routers = config.shared_sub_dimensions * width, 2 * config.num_hidden_layers
    shape = routers, config.sub_dimensions - config.shared_sub_dimensions
    energies, means = torch.zeros(shape, dtype=torch.float64), torch.zeros(routers, len(order), dtype=torch.float64)
    tokens = 0
    for number, x in _block_inputs(dense, batches):
        x = x[:, order]
        energies[number] += _by_part(x[:, first:], width).sum(0).cpu()
        means[number] += x.sum(0).cpu()
        tokens += len(x) if number == 0 else 0
    sums = torch.zeros(*shape, len(order), dtype=torch.float64)
    for number, x in _block_inputs(dense, batches):
        x = x[:, order]
        strongest = (_by_part(x[:, first:], width) / energies[number].clamp(min=1e-30).to(x.device)).argmax(-1)
        sums[number].index_add_(0, strongest.cpu(), x.cpu())
    along = nn.functional.normalize(means, dim=-1)[:, None]
    rows = nn.functional.normalize(sums - (sums * along).sum(-1, keepdim=True) * along, dim=-1)
    squares = torch.zeros(shape, dtype=torch.float64)
    for number, x in _block_inputs(dense, batches):
        squares[number] += (x[:, order].cpu() @ rows[number].T).square().sum(0)
    deviations = (squares / max(tokens, 1)).sqrt()[..., None]
    return torch.where(deviations > 0, ROUTER_DEVIATION * rows / deviations, 0.0)


def _by_part(x: torch.Tensor, width: int) -> torch.Tensor:
    return x.unflatten(-1, (-1, width)).square().sum(-1)


@dataclass(frozen=True)
class HiddenRecord:
    """What the routers of all layers did, over all ranks. Each layer has two, in front of its attention and of its feed-forward block.

    Attributes:
        load: Share of a router's choices that fell on each specialised sub-dimension; sums to 1. [layers][2][specialised]
        entropy: Mean entropy of each router over the specialised ones, in nats; at most log(specialised). [layers][2]
        aux_loss: Load-balancing loss before its coefficient, mean over routers and micro-batches; 1 when all is even.
    """

    load: list[list[list[float]]]
    entropy: list[list[float]]
    aux_loss: float


class HiddenRouterMeter(ForwardMeter):
    """Counts what the routers choose in the forward passes while it is on, and takes their balancing loss."""

    def __init__(self, model: SparseModel, device: torch.device) -> None:
        super().__init__(model)
        config = model.config
        assert isinstance(config, SparseMohdConfig), "it has no routers of hidden dimensions"
        self._shared, self._chosen = (
            config.shared_sub_dimensions,
            config.active_sub_dimensions - config.shared_sub_dimensions,
        )
        self._layers, specialised = config.num_hidden_layers, config.sub_dimensions - config.shared_sub_dimensions
        self._load = torch.zeros(2 * self._layers, specialised, dtype=torch.float64, device=device)
        self._entropy = torch.zeros(2 * self._layers, dtype=torch.float64, device=device)
        self._totals = torch.zeros(3, dtype=torch.float64, device=device)
        self._losses: list[torch.Tensor] = []

    def _watch(self) -> Iterator[RemovableHandle]:
        for number, router in enumerate(routers_of(self._model)):
            yield router.register_forward_hook(partial(self._take, number))

    def loss(self) -> torch.Tensor:
        """The balancing loss of the forward pass that has just ended, with its gradient. []"""
        loss = torch.stack(self._losses).mean()
        with torch.no_grad():
            self._totals[0] += loss
            self._totals[1] += 1
        return loss

    def record(self) -> HiddenRecord:
        """What was counted by this rank alone."""
        load = self._load / self._load.sum(1, keepdim=True).clamp(min=1)
        aux_loss, passes, tokens = self._totals.tolist()
        return HiddenRecord(
            load=[[_rounded(row) for row in pair] for pair in load.view(self._layers, 2, -1)],
            entropy=[_rounded(pair) for pair in (self._entropy / max(tokens, 1)).view(-1, 2)],
            aux_loss=aux_loss / max(passes, 1),
        )

    def reduce(self) -> HiddenRecord:
        for numbers in (self._load, self._entropy, self._totals):
            dist.all_reduce(numbers)
        return self.record()

    def _begin(self) -> None:
        self._losses = []

    def _take(
        self, number: int, router: HiddenRouter, _: object, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> None:
        logs = output[2][..., self._shared :].flatten(0, -2).float().log_softmax(-1)
        on = output[1][..., self._shared :].flatten(0, -2)
        loss = balancing_loss(on, logs.exp())
        if not self._in_forward:
            return
        self._losses.append(loss)
        with torch.no_grad():
            self._load[number] += on.sum(0)
            self._entropy[number] -= (logs.exp() * logs).sum()
            if number == 0:
                self._totals[2] += len(on)


def is_hidden_routed(config: SparseConfig) -> bool:
    """Whether the tokens of a model differ in which sub-dimensions they use."""
    return isinstance(config, SparseMohdConfig) and config.chooses


def balancing_loss(on: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """N · Σ f_i p_i of choices, bool [tokens, N] with as many in each row, and probabilities of that shape. []"""
    chosen = on.float().sum(0)
    return on.shape[-1] * (chosen / chosen.sum() * shares.mean(0)).sum()


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, LOAD_DECIMALS) for value in values.tolist()]


@objective
class HiddenBalance(LoadBalance):
    """The balancing loss of a MoHD, and the alarm for sub-dimensions that get too few tokens: loads are [routers][specialised]."""

    name: ClassVar[str] = "hidden_router"

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self._meter = self._new_meter()

    @classmethod
    def of(cls, run: TrainingRun) -> Self | None:
        return cls(run) if is_hidden_routed(run.engine.module.config) else None

    @contextmanager
    def step(self) -> Iterator[None]:
        self._meter = self._new_meter()
        with self._meter:
            yield

    def loss(self, batch: MicroBatch, output: Any) -> torch.Tensor:
        return self._coefficient * self._meter.loss() / batch.per_step

    def after_step(self, loss: float) -> dict[str, Any]:
        record, settings = self._meter.reduce(), self._run.recipe.stability
        loads = [router for layer in record.load for router in layer]
        for number, place in self._underused(loads):
            layer, block = divmod(number, len(BLOCKS))
            self._run.record(
                "underused_sub_dimension",
                f"sub-dimension {place + self._run.engine.module.config.shared_sub_dimensions} is under-utilised by the "
                f"{BLOCKS[block]} of layer {layer} at step {self._run.state.step:,}: {loads[number][place]:.2%} of its choices, too "
                f"few for {settings.underused_expert_steps} steps in a row; a higher training.router_aux_loss_coefficient "
                "spreads them more evenly",
                steps=settings.underused_expert_steps,
                layer=layer,
                block=BLOCKS[block],
                sub_dimension=place + self._run.engine.module.config.shared_sub_dimensions,
                load=loads[number][place],
            )
        return {self.name: asdict(record)}

    def _new_meter(self) -> HiddenRouterMeter:
        return HiddenRouterMeter(self._run.engine.module, self._run.engine.device)
