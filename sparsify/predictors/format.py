"""Predictors of the neurons that fire, and the folder that holds them.

One predictor belongs to one feed-forward block, or to one expert of it: two matrices without biases, as in PowerInfer
(arXiv 2312.12456) and Deja Vu (arXiv 2310.17157). It is far smaller than the block, and an engine reads only the weights
of the neurons that it switches on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import xxhash
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparsify.errors import ModelError
from sparsify.files import atomic_folder, refuse_foreign_folder
from sparsify.metadata import read_record
from sparsify.models import SparseModel, family_of
from sparsify.models.masking import is_fused, num_experts, num_neurons
from sparsify.runtime.weights import LayerPredictors, Predictor

WEIGHTS_FILE = "predictors.safetensors"
FACTS_FILE = "predictors.json"
FORMAT = 1
FINGERPRINT_VALUES = 256

Block = tuple[int, int]
"""Layer and expert; the expert is 0 in a dense model."""
PredictorInput = Literal["residual", "normed"]
INPUTS: tuple[PredictorInput, ...] = ("residual", "normed")


class BlockPredictor(NamedTuple):
    """Predictor of one block. `A`: [rank, hidden], `B`: [neurons, rank]."""

    A: torch.Tensor
    B: torch.Tensor

    @property
    def num_parameters(self) -> int:
        return self.A.numel() + self.B.numel()

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of the neurons, [rows, neurons], for inputs [rows, hidden]; one is predicted to fire where its score
        exceeds the threshold.
        """
        return torch.relu(x.to(self.A.dtype) @ self.A.T) @ self.B.T


class BlockFacts(BaseModel):
    """Metrics of a predictor on validation text, at a score of 0."""

    rank: int
    recall: float | None
    on_share: float | None
    firing_share: float | None


class EvaluationFacts(BaseModel):
    """Result of the last evaluation for one engine.

    Attributes:
        threshold: The chosen one; None if none could be chosen.
        verdict: What was chosen and why, or why not.
        loss: Of the model as trained, nats per token.
        loss_rise: With predicted masks at the chosen threshold, in the engine's arithmetic, above that.
        dropped_thresholds: Whether the model stores thresholds that the engine does not apply.
        num_tokens: Tokens measured on.
        text: What they are.
    """

    threshold: float | None
    verdict: str
    loss: float
    loss_rise: float | None
    dropped_thresholds: bool
    num_tokens: int
    text: str


class PredictorFacts(BaseModel):
    """Contents of predictors.json. Only `input`, `threshold`, `rank` and `evaluations` matter to an engine.

    Attributes:
        input: `normed`: the input of the feed-forward block; `residual`: the input of its RMS norm.
        threshold: A neuron is predicted to fire where its score exceeds it; other engines have their own in `evaluations`.
        rank: Rank of every predictor, by the prefix of its tensors.
        blocks: Metrics of each predictor on validation text, by the same prefix.
        evaluations: The last evaluation for each engine, by its key in ENGINES.
    """

    model_config = ConfigDict(extra="ignore")

    format: int = FORMAT
    input: PredictorInput
    threshold: float
    rank: dict[str, int]
    num_layers: int
    num_experts: int
    hidden: int
    neurons: int
    fingerprint: str
    text: str
    sequence_length: int
    trained_tokens: int
    passes: int
    wanted_recall: float
    blocks: dict[str, BlockFacts]
    threshold_reason: str
    evaluations: dict[str, EvaluationFacts] = {}
    command: str = ""

    def open_question(self, engine: str) -> str:
        """Why no evaluation for an engine supports a threshold of these predictors; empty if one does."""
        evaluation = self.evaluations.get(engine)
        if evaluation is None:
            return "They were not evaluated: how much they raise the loss is not known."
        if evaluation.threshold is None:
            return f"Their evaluation refused every threshold: {evaluation.verdict}"
        return ""


class Predictors(NamedTuple):
    facts: PredictorFacts
    blocks: dict[Block, BlockPredictor]

    @property
    def num_parameters(self) -> int:
        return sum(block.num_parameters for block in self.blocks.values())

    def to(self, device: torch.device) -> Predictors:
        """The same predictors in fp32 on another device."""
        moved = {
            key: BlockPredictor(*(matrix.to(device, torch.float32) for matrix in block))
            for key, block in self.blocks.items()
        }
        return self._replace(blocks=moved)

    def for_decoding(
        self, model: SparseModel, where: str, gates: Iterable[torch.Tensor] | None = None
    ) -> LayerPredictors:
        """Converts to the structure that the decoding kernels take.

        Args:
            model: The model.
            where: What messages call the predictors.
            gates: The values of `fingerprinted` of every layer, if the model's own weights are not in memory.

        Raises:
            ModelError: If they were trained for another model.
        """
        self.check_model(model, where, gates)
        facts = self.facts
        return LayerPredictors(
            facts.input,
            [
                [Predictor(*self.blocks[layer, expert], facts.threshold) for expert in range(facts.num_experts)]
                for layer in range(facts.num_layers)
            ],
        )

    def check_model(self, model: SparseModel, where: str, gates: Iterable[torch.Tensor] | None = None) -> None:
        """Raises ModelError if these predictors were not trained for a model: shapes or weights differ. `gates` as above."""
        config, facts = model.config, self.facts
        shape = [len(model.model.layers), num_experts(model.config)]
        shape += [config.hidden_size, num_neurons(config)]
        own = [facts.num_layers, facts.num_experts, facts.hidden, facts.neurons]
        if shape != own:
            raise ModelError(
                f"{where} belongs to another model: it has {own} layers, experts, hidden size and neurons; the model {shape}.",
                next_step="Train predictors for this model: `sparsify predictors train`.",
            )
        self.check_fingerprint(fingerprint(model) if gates is None else _fingerprint_of_values(gates), where)

    def check_fingerprint(self, of_model: str, where: str) -> None:
        """Raises ModelError if these predictors were not trained for the weights."""
        if self.facts.fingerprint != of_model:
            raise ModelError(
                f"{where} was trained for other weights of the same shape than these: it would switch the wrong neurons off.",
                next_step="Train predictors for this checkpoint: `sparsify predictors train`.",
            )


def prefix(block: Block, num_experts: int) -> str:
    layer, expert = block
    return f"layers.{layer}" if num_experts == 1 else f"layers.{layer}.experts.{expert}"


def all_blocks(num_layers: int, num_experts: int) -> Iterator[Block]:
    return ((layer, expert) for layer in range(num_layers) for expert in range(num_experts))


def fingerprint(model: SparseModel) -> str:
    """Hash of some values of every layer's gate, rounded to bf16: the same in any dtype that holds bf16."""
    return fingerprint_of(
        block.gate_up_proj if is_fused(block) else block.gate_proj.weight for block in model.ffn_blocks()
    )


def fingerprint_of(gates: Iterable[torch.Tensor]) -> str:
    """Fingerprint from every layer's gate projection, or fused gate and up projection."""
    return _fingerprint_of_values(gate.detach().flatten()[fingerprinted(gate.numel())] for gate in gates)


def fingerprinted(count: int) -> slice:
    """Which of so many values of a layer's gate projection, or fused gate and up projection, are in the fingerprint."""
    return slice(None, None, max(1, count // FINGERPRINT_VALUES))


def _fingerprint_of_values(values: Iterable[torch.Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for chosen in values:
        digest.update(chosen.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def norm_weight(model: SparseModel, layer: int) -> torch.Tensor:
    """What the norm in front of a layer's feed-forward block multiplies each channel by, fp32 [hidden]; ones without a norm."""
    family = family_of(model.config)
    if family.ffn_norm is None:
        return torch.ones(model.config.hidden_size)
    weight = getattr(model.model.layers[layer], family.ffn_norm).weight.detach().float()
    return 1 + weight if family.unit_offset else weight


def folded(predictor: BlockPredictor, norm: torch.Tensor, scale: float) -> BlockPredictor:
    """A predictor of the normed input as one of the residual before the norm, given that norm's `norm_weight`.

    The norm multiplies by its weight and divides by a positive number of the token. Without biases that number goes through both
    matrices, so the sign of every score stays exactly what it was; a score of s becomes s times the token's RMS over `scale`.
    """
    return BlockPredictor(predictor.A * norm.to(predictor.A.device) / scale, predictor.B)


def write_predictors(predictors: Predictors, to: Path) -> None:
    """Writes predictors.safetensors and predictors.json, in place of predictors that are there already."""
    refuse_foreign_folder(to, FACTS_FILE, "folder of predictors")
    experts = predictors.facts.num_experts
    tensors = {
        f"{prefix(key, experts)}.{name}": matrix.detach().float().cpu().contiguous()
        for key, block in predictors.blocks.items()
        for name, matrix in zip("AB", block, strict=True)
    }
    with atomic_folder(to) as fresh:
        save_file(tensors, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        facts = predictors.facts.model_dump_json(indent=2)
        (fresh / FACTS_FILE).write_text(facts + "\n", encoding="utf-8")


def read_predictors(folder: Path) -> Predictors:
    """Raises ModelError if the folder holds no predictors, or damaged ones."""
    if not (folder / FACTS_FILE).is_file():
        raise ModelError(
            f"{folder} holds no predictors: it has no {FACTS_FILE}.",
            next_step="`sparsify predictors train CHECKPOINT` makes them.",
        )
    again = "Copy the folder again, or train the predictors again."
    facts = read_record(folder / FACTS_FILE, PredictorFacts, "what predictors say of themselves", ModelError, again)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (ValueError, OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} cannot be read: {error}", next_step=again) from error
    blocks: dict[Block, BlockPredictor] = {}
    for key in all_blocks(facts.num_layers, facts.num_experts):
        name = prefix(key, facts.num_experts)
        pair = [tensors.pop(f"{name}.{matrix}", None) for matrix in "AB"]
        rank = facts.rank.get(name)
        shapes = [None if matrix is None else tuple(matrix.shape) for matrix in pair]
        if rank is None or shapes != [(rank, facts.hidden), (facts.neurons, rank)]:
            raise ModelError(
                f"The predictors in {folder} are damaged: {name} has A and B of the shapes {shapes}, and rank {rank}.",
                allowed=f"A [rank, {facts.hidden}] and B [{facts.neurons}, rank].",
            )
        blocks[key] = BlockPredictor(*pair)  # pyright: ignore[reportArgumentType]
    if tensors:
        raise ModelError(f"{folder / WEIGHTS_FILE} holds tensors that belong to no block: {sorted(tensors)[:3]}.")
    return Predictors(facts, blocks)
