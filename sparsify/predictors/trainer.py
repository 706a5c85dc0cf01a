"""Trains predictors while text runs through the model; no activations are stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import ModelError, RunError
from sparsify.models import SparseModel
from sparsify.models.masking import num_experts, num_neurons
from sparsify.predictors.candidate import (
    Candidate,
    RankCost,
    candidate_ranks,
    choose_ranks,
    read_state,
    write_state,
)
from sparsify.predictors.format import (
    Block,
    BlockFacts,
    BlockPredictor,
    PredictorFacts,
    PredictorInput,
    Predictors,
    all_blocks,
    fingerprint,
    folded,
    norm_weight,
    prefix,
)
from sparsify.predictors.inputs import BlockInputs
from sparsify.predictors.scores import FiringScores
from sparsify.sparsity.probe import SparsityProbe, Tokens

PILOT_SHARE = 0.3
"""Share of the steps after which ranks are chosen; before that all candidates are trained in parallel."""
MOST_FIRING = 0.99

Batch = dict[str, torch.Tensor]
OnStep = Callable[[int, int, float], None]
"""Called after every step with the steps done, the total, and the mean recall at a score of 0."""


@dataclass(frozen=True)
class Settings:
    """Settings of predictor training.

    Attributes:
        input: Input that the engine will feed them.
        wanted_recall: Share of firing neurons to predict at a score of 0.
        budget_share: Largest size of all predictors, as a share of the feed-forward parameters.
        ranks: Ranks to try; by default 1/16, 1/8, 1/4 and 1/2 of the hidden size.
        passes: Epochs over the text.
        learning_rate: Initial learning rate; it decays linearly to 0.
        seed: Seed of the initial weights and the order of sequences.
    """

    input: PredictorInput = "residual"
    wanted_recall: float = 0.95
    budget_share: float = 0.1
    ranks: tuple[int, ...] = ()
    passes: int = 4
    learning_rate: float = 3e-3
    seed: int = 0


def train_predictors(
    model: SparseModel,
    batches: Sequence[Batch],
    validation: Sequence[Batch],
    settings: Settings,
    *,
    text: str,
    state_path: Path,
    on_step: OnStep | None = None,
    save_seconds: float = 60.0,
) -> Predictors:
    """Trains one predictor for every block, and chooses for each the rank with which a token reads least.

    Batches hold input_ids and position_ids, [1, tokens]; the ranks are chosen on `validation`. A state of the same settings in
    `state_path` is resumed.

    Raises:
        ModelError: If the model's activations are not sparse.
        RunError: If no choice of ranks is within the budget.
        StorageError: If the state cannot be written.
    """
    training = _Training(model, settings)
    key = _state_key(training, batches)
    try:
        step = training.restore(read_state(state_path, key))
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise RunError(
            f"The state of an interrupted training, {state_path}, is damaged: {error!r}.",
            next_step="Remove it to start over.",
        ) from error
    num_steps = settings.passes * len(batches)
    pilot = round(PILOT_SHARE * num_steps)
    saved = time.monotonic()
    while step < num_steps:
        if step >= pilot and not training.chosen:
            training.choose(validation)
        batch = batches[_order(settings.seed, step // len(batches), len(batches))[step % len(batches)]]
        training.step(batch, settings.learning_rate * (1 - step / num_steps))
        step += 1
        if on_step is not None:
            on_step(step, num_steps, training.recall)
        if time.monotonic() - saved >= save_seconds and step < num_steps:
            write_state(state_path, key, *training.state(step))
            saved = time.monotonic()
    if not training.chosen:
        training.choose(validation)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    sequence_length = max(batch["input_ids"].shape[1] for batch in batches)
    return training.finish(validation, text=text, tokens=tokens, sequence_length=sequence_length)


def _order(seed: int, number: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randperm(length, generator=generator).tolist()


def _state_key(training: _Training, batches: Sequence[Batch]) -> dict[str, Any]:
    """Values that must agree for a state to be resumed."""
    tokens = [batch["input_ids"].flatten() for batch in batches]
    return asdict(training.settings) | {
        "model": fingerprint(training.model),
        "tokens": sum(map(len, tokens)),
        "token_sum": int(sum((ids * torch.arange(1, len(ids) + 1)).sum() for ids in tokens)),
    }


class _Training:
    """The candidates of every block, and the passes that train and evaluate them."""

    def __init__(self, model: SparseModel, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.num_layers, self.num_experts = len(model.model.layers), num_experts(model.config)
        hidden, neurons = model.config.hidden_size, num_neurons(model.config)
        generator = torch.Generator().manual_seed(settings.seed)
        self.candidates: dict[Block, dict[int, Candidate]] = {
            block: {
                rank: Candidate((rank, hidden, neurons), settings.wanted_recall, generator, model.device)
                for rank in settings.ranks or candidate_ranks(hidden)
            }
            for block in all_blocks(self.num_layers, self.num_experts)
        }
        self.chosen = False
        self._rms_sums, self._rms_counts = [0.0] * self.num_layers, [0] * self.num_layers

    @property
    def recall(self) -> float:
        values = [one.recall for block in self.candidates.values() for one in block.values()]
        return sum(values) / len(values)

    def step(self, batch: Batch, learning_rate: float) -> None:
        def learn(block: Block, x: torch.Tensor, fired: torch.Tensor) -> None:
            for candidate in self.candidates[block].values():
                candidate.step(x, fired, learning_rate)

        self._run([batch], learn, learning=True)

    def choose(self, validation: Sequence[Batch]) -> None:
        """Keeps one candidate of every block."""
        ranks = {}
        if any(len(options) > 1 for options in self.candidates.values()) or self.settings.ranks:
            ranks = choose_ranks(self._costs(validation), self._budget())
        self.candidates = {
            block: {rank: options[rank] for rank in [ranks.get(block, next(iter(options)))]}
            for block, options in self.candidates.items()
        }
        self.chosen = True

    def finish(self, validation: Sequence[Batch], *, text: str, tokens: int, sequence_length: int) -> Predictors:
        """The predictors of the configured input, with their metrics on the validation text."""
        histograms = self._histograms(validation)
        blocks: dict[Block, BlockPredictor] = {}
        facts: dict[str, BlockFacts] = {}
        for block, options in self.candidates.items():
            (rank, candidate), *_ = options.items()
            predictor = candidate.predictor
            if self.settings.input == "residual":
                norm = norm_weight(self.model, block[0])
                scale = self._rms_sums[block[0]] / max(self._rms_counts[block[0]], 1)
                predictor = folded(predictor, norm, scale or 1.0)
            blocks[block] = predictor
            histogram = histograms[block, rank]
            recall, on_share = histogram.at(0.0)
            facts[prefix(block, self.num_experts)] = BlockFacts(
                rank=rank,
                recall=recall,
                on_share=on_share,
                firing_share=histogram.firing_share,
            )
        config, settings = self.model.config, self.settings
        return Predictors(
            PredictorFacts(
                input=settings.input,
                threshold=0.0,
                rank={name: fact.rank for name, fact in facts.items()},
                num_layers=self.num_layers,
                num_experts=self.num_experts,
                hidden=config.hidden_size,
                neurons=num_neurons(config),
                fingerprint=fingerprint(self.model),
                text=text,
                sequence_length=sequence_length,
                trained_tokens=tokens,
                passes=settings.passes,
                wanted_recall=settings.wanted_recall,
                blocks=facts,
                threshold_reason=f"trained so that the score 0 gives a recall of {settings.wanted_recall:.1%}",
            ),
            blocks,
        )

    def state(self, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors: dict[str, torch.Tensor] = {}
        numbers: dict[str, Any] = {}
        for (layer, expert), options in self.candidates.items():
            for rank, candidate in options.items():
                own, numbers[f"{layer}.{expert}.{rank}"] = candidate.state()
                tensors |= {f"{layer}.{expert}.{rank}.{key}": value for key, value in own.items()}
        rms = {"rms_sums": self._rms_sums, "rms_counts": self._rms_counts}
        return tensors, {"step": step, "chosen": self.chosen, "candidates": numbers} | rms

    def restore(self, state: tuple[dict[str, torch.Tensor], dict[str, Any]] | None) -> int:
        """Loads a state and returns the steps that are done."""
        if state is None:
            return 0
        tensors, numbers = state
        kept: dict[Block, dict[int, Candidate]] = {block: {} for block in self.candidates}
        for name, own in numbers["candidates"].items():
            layer, expert, rank = map(int, name.split("."))
            candidate = self.candidates[layer, expert][rank]
            start = f"{name}."
            candidate.restore({key[len(start) :]: v for key, v in tensors.items() if key.startswith(start)}, own)
            kept[layer, expert][rank] = candidate
        self.candidates, self.chosen = kept, numbers["chosen"]
        self._rms_sums, self._rms_counts = numbers["rms_sums"], numbers["rms_counts"]
        return numbers["step"]

    def _ffn_parameters(self) -> int:
        config = self.model.config
        return 3 * config.hidden_size * num_neurons(config)

    def _budget(self) -> int:
        return int(self.settings.budget_share * self._ffn_parameters() * len(self.candidates))

    def _costs(self, validation: Sequence[Batch]) -> dict[Block, list[RankCost]]:
        histograms = self._histograms(validation)
        costs: dict[Block, list[RankCost]] = {}
        for block, options in self.candidates.items():
            costs[block] = []
            for rank, candidate in options.items():
                histogram = histograms[block, rank]
                on_share = histogram.at(histogram.threshold(self.settings.wanted_recall))[1]
                size = candidate.predictor.num_parameters
                # An expert without validation tokens has no on_share; the smallest rank is the best guess for it.
                read = size + (1.0 if on_share is None else on_share) * self._ffn_parameters()
                costs[block].append(RankCost(rank, size, read))
        return costs

    def _histograms(self, batches: Sequence[Batch]) -> dict[tuple[Block, int], FiringScores]:
        histograms = {(block, rank): FiringScores() for block, options in self.candidates.items() for rank in options}

        def evaluate(block: Block, x: torch.Tensor, fired: torch.Tensor) -> None:
            for rank, candidate in self.candidates[block].items():
                histograms[block, rank].add(candidate.predictor.scores(x), fired)

        self._run(batches, evaluate)
        return histograms

    @torch.no_grad()
    def _run(
        self,
        batches: Sequence[Batch],
        use: Callable[[Block, torch.Tensor, torch.Tensor], None],
        *,
        learning: bool = False,
    ) -> None:
        with BlockInputs(self.model, "normed") as inputs:
            observer = _FiringObserver(inputs, use)
            with SparsityProbe(self.model, observer) as probe:
                for batch in batches:
                    batch = {key: value.to(self.model.device) for key, value in batch.items()}
                    # The decoder alone: the head's logits are not needed.
                    self.model.model(
                        input_ids=batch["input_ids"],
                        position_ids=batch["position_ids"],
                        use_cache=False,
                    )
                _check_sparse(probe)
        if learning:
            for layer, (total, count) in observer.rms.items():
                self._rms_sums[layer] += total
                self._rms_counts[layer] += count


class _FiringObserver:
    """Observer that passes every block's input and firing neurons to a function while the model runs."""

    def __init__(self, inputs: BlockInputs, use: Callable[[Block, torch.Tensor, torch.Tensor], None]) -> None:
        self._inputs, self._use = inputs, use
        self.rms: dict[int, tuple[float, int]] = {}

    def begin(self, tokens: Tokens) -> None:
        """Does nothing: every token counts."""

    def add(self, layer: int, expert: int, tokens: torch.Tensor, block: Any, product: torch.Tensor) -> None:
        if layer not in self.rms:
            self.rms[layer] = float(self._inputs.rms.double().sum()), len(self._inputs.rms)
        self._use((layer, expert), self._inputs.rows(expert), product != 0)


def _check_sparse(probe: SparsityProbe) -> None:
    values, _, _, fired = probe.layer_totals().sum(0).tolist()
    if fired > MOST_FIRING * values:
        raise ModelError(
            f"{fired / max(values, 1):.1%} of this model's neurons fire: there is nothing to predict.",
            allowed="A model whose activation gives exact zeros, such as drelu or reglu.",
            next_step="`sparsify convert MODEL --activation drelu --to DIR`, then `sparsify train`.",
        )
