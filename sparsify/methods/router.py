"""Where the tokens of a mixture of experts go: load of every expert, the router's entropy, its auxiliary loss, under-utilised experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist

from sparsify.errors import RecipeError
from sparsify.methods.objective import MicroBatch, Objective, TrainingRun, objective
from sparsify.models.masking import has_experts, num_experts
from sparsify.models.sparse_mohd import SparseMohdConfig
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.training import StabilitySection

LOAD_DECIMALS = 5


@dataclass(frozen=True)
class RouterRecord:
    """What the routers of all layers did in one step, over all ranks.

    Attributes:
        load: Share of each layer's routed tokens that each expert got; a layer's shares sum to 1. [layers][experts]
        entropy: Mean entropy of each layer's router over all experts, in nats; at most log(experts). [layers]
        aux_loss: Load-balancing loss before its coefficient, mean over micro-batches; experts per token when all is even.
    """

    load: list[list[float]]
    entropy: list[float]
    aux_loss: float


class RouterMeter:
    """Adds up on the device what the routers do in one step; nothing is read before `reduce`."""

    def __init__(self, config: Any, device: torch.device) -> None:
        self._experts_per_token = config.num_experts_per_tok
        shape = config.num_hidden_layers, num_experts(config)
        self._load = torch.zeros(shape, dtype=torch.float64, device=device)
        self._entropy = torch.zeros(shape[0], dtype=torch.float64, device=device)
        self._totals = torch.zeros(3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, router_logits: Sequence[torch.Tensor], aux_loss: torch.Tensor) -> None:
        """Counts one micro-batch from the logits of each layer, [tokens, experts] each, and the model's balancing loss."""
        log_shares = torch.stack([logits.float() for logits in router_logits]).log_softmax(-1)
        chosen = log_shares.topk(self._experts_per_token, dim=-1).indices.flatten(1)
        self._load.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
        self._entropy -= (log_shares.exp() * log_shares).sum((-1, -2))
        self._totals += torch.stack(
            [
                aux_loss.double(),
                aux_loss.new_ones(()).double(),
                aux_loss.new_full((), log_shares.shape[1]).double(),
            ]
        )

    def reduce(self) -> RouterRecord:
        numbers = torch.cat([self._load.flatten(), self._entropy, self._totals])
        dist.all_reduce(numbers)
        load, entropy, (aux_loss, passes, tokens) = numbers.split([self._load.numel(), self._entropy.numel(), 3])
        load = load.view_as(self._load)
        return RouterRecord(
            load=[[round(x, LOAD_DECIMALS) for x in row] for row in (load / load.sum(1, keepdim=True)).tolist()],
            entropy=[round(x, LOAD_DECIMALS) for x in (entropy / tokens).tolist()],
            aux_loss=float(aux_loss / passes),
        )


class LoadBalance(Objective):
    """A balancing loss with its coefficient, and the alarm for whatever routers choose that gets too few tokens.

    Its state is for how many steps in a row each has had too few.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run, self._underused_steps = run, list[list[int]]()
        self._coefficient = aux_loss_coefficient(run.recipe, run.engine.module.config)

    def _underused(self, loads: list[list[float]]) -> list[tuple[int, int]]:
        """Takes in the loads of a step, [routers][choices], and returns for which the alarm sounds: router and choice."""
        settings = self._run.recipe.stability
        self._underused_steps, alarms = underused_steps(settings, self._underused_steps, loads)
        return alarms

    def state(self) -> dict[str, Any]:
        return {"underused_steps": self._underused_steps} if self._underused_steps else {}

    def load_state(self, state: dict[str, Any]) -> None:
        self._underused_steps = state.get("underused_steps", [])


@objective
class RouterBalance(LoadBalance):
    """The routers' load-balancing loss, and the alarm for experts that get too few tokens: loads are [layers][experts]."""

    name: ClassVar[str] = "router"
    forward_options: ClassVar[Mapping[str, Any]] = {"output_router_logits": True}

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self._meter = self._new_meter()

    @classmethod
    def of(cls, run: TrainingRun) -> Self | None:
        return cls(run) if has_experts(run.engine.module.config) else None

    @contextmanager
    def step(self) -> Iterator[None]:
        self._meter = self._new_meter()
        yield

    def loss(self, batch: MicroBatch, output: Any) -> torch.Tensor:
        self._meter.add(output.router_logits, output.aux_loss)
        return self._coefficient * output.aux_loss / batch.per_step

    def after_step(self, loss: float) -> dict[str, Any]:
        record, steps = self._meter.reduce(), self._run.recipe.stability.underused_expert_steps
        for layer, expert in self._underused(record.load):
            load = record.load[layer][expert]
            self._run.record(
                "underused_expert",
                f"expert {expert} of layer {layer} is under-utilised at step {self._run.state.step:,}: {load:.2%} of "
                f"its layer's tokens, too few for {steps} steps in a row; a higher "
                "training.router_aux_loss_coefficient spreads them more evenly",
                steps=steps,
                layer=layer,
                expert=expert,
                load=load,
            )
        return {self.name: asdict(record)}

    def _new_meter(self) -> RouterMeter:
        return RouterMeter(self._run.engine.module.config, self._run.engine.device)


def is_routed(config: Any) -> bool:
    """Whether a model of some configuration, or of the fields of one, has routers whose load is balanced."""
    if has_experts(config):
        return True
    if getattr(config, "model_type", None) != SparseMohdConfig.model_type:
        return False
    names = ("shared_sub_dimensions", "active_sub_dimensions", "sub_dimensions")
    shared, active, parts = (getattr(config, name, getattr(SparseMohdConfig, name)) for name in names)
    return shared < active < parts


def aux_loss_coefficient(recipe: Recipe, config: Any) -> float:
    """What the auxiliary loss is multiplied by: the recipe's coefficient, else the checkpoint's."""
    own = recipe.training.router_aux_loss_coefficient
    return config.router_aux_loss_coef if own is None else own


def check_router(recipe: Recipe, config: Any) -> None:
    """Refuses settings of a router that the model does not have.

    Raises:
        RecipeError: Naming the setting.
    """
    coefficient = recipe.training.router_aux_loss_coefficient
    if coefficient is not None and not is_routed(config):
        raise RecipeError(
            f"training.router_aux_loss_coefficient is {coefficient}, but a {config.model_type} has no router.",
            next_step="Set training.router_aux_loss_coefficient=null.",
        )


def underused_steps(
    settings: StabilitySection, before: list[list[int]], load: list[list[float]]
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """For how many steps in a row each expert has been underused, and which reach the alarm with this step.

    Args:
        settings: From what load on, and after how many steps.
        before: The same before this step; empty at the first. [layers][experts]
        load: Of this step. [layers][experts]

    Returns:
        The counts, [layers][experts], and layer and expert of each alarm: once each time that an expert becomes under-utilised.
    """
    counts, alarms = [], []
    for layer, shares in enumerate(load):
        least = settings.underused_expert_load / len(shares)
        old = before[layer] if before else [0] * len(shares)
        counts.append([count + 1 if share < least else 0 for count, share in zip(old, shares, strict=True)])
        alarms += [
            (layer, expert) for expert, count in enumerate(counts[-1]) if count == settings.underused_expert_steps
        ]
    return counts, alarms
