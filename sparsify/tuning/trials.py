"""Proxy runs: the recipe with a smaller budget and other shares, each in its own folder, none run twice.

A trial's model is evaluated on held-out text of every domain, including those that it was not trained on.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from sparsify.commands.run import check_same, train_run
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import MixtureError, RecipeError, RunError
from sparsify.files import write_text
from sparsify.metadata import read_record, user_path
from sparsify.mixture.sequences.held_out import mixture_sequences
from sparsify.mixture.sequences.reader import NO_LOSS, PackedSequence, collate
from sparsify.mixture.sequences.schedule import SourceSchedule
from sparsify.mixture.sequences.shares import Shares
from sparsify.models import SparseModel
from sparsify.recipe.recipe import Recipe, validate
from sparsify.runs.load import find_trained, load_trained
from sparsify.runs.run_folder import RunFolder
from sparsify.sparsity.probe import SparsityProbe
from sparsify.training.validation import sequence_losses as cross_entropies

logger = logging.getLogger(__name__)

HeldOut = Mapping[str, Sequence[PackedSequence]]
"""Held-out sequences by domain."""


class Measurement(BaseModel):
    """Losses of one model, in nats per token.

    Attributes:
        zeros: Share of exact zeros among the neuron activations, over all domains' sequences.
        sequence_losses: Mean loss of each sequence of each domain, without sequences that have no labels.
        held_out_fingerprint: Hash of the sequences. Only measurements with equal hashes can be compared.
    """

    losses: dict[str, float]
    zeros: float
    sequence_losses: dict[str, list[float]]
    held_out_fingerprint: str


def held_out_halves(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, sequences_per_domain: int
) -> tuple[HeldOut, HeldOut]:
    """Held-out sequences of every source of the mixture, whatever its share: one half for trials, one for confirmation.

    Each half has up to `sequences_per_domain` sequences of each source. They do not depend on the shares, so they are
    the same for all trials.

    Raises:
        MixtureError: If a source holds out fewer than two sequences.
    """
    mixture = deepcopy(recipe.mixture)
    mixture.instruction_token_share, mixture.phases = None, []
    for source in mixture.sources.values():
        source.token_share = 1 / len(mixture.sources)
    sequence_length = recipe.training.sequence_length
    wanted = 2 * sequences_per_domain * len(mixture.sources)
    sequences: dict[str, list[PackedSequence]] = {name: [] for name in mixture.sources}
    for sequence in mixture_sequences(
        mixture,
        tokenizer,
        num_tokens=wanted * sequence_length,
        sequence_length=sequence_length,
        cache_dir=user_path(recipe.cache_dir),
    ):
        sequences[sequence.source].append(sequence)
    for name, held_out in sequences.items():
        if len(held_out) < 2:
            raise MixtureError(
                f"Source {name!r} holds out fewer than two sequences of {sequence_length} tokens.",
                allowed="At least one to evaluate the trials on, and another one for the confirmation.",
                next_step="Raise mixture.validation_fraction, add documents, or lower training.sequence_length.",
            )
    # Alternate, so that both halves cover all held-out documents.
    trial, confirmation = ({name: held_out[half::2] for name, held_out in sequences.items()} for half in (0, 1))
    return trial, confirmation


@torch.no_grad()
def measure_domains(model: SparseModel, held_out: HeldOut, micro_batch_size: int) -> Measurement:
    """Loss of a model on every domain, and its share of exact zeros, in one pass. Raises MixtureError if a domain's
    sequences have no labels.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()  # pyright: ignore[reportArgumentType]  (transformers decorates `to`)
    losses: dict[str, float] = {}
    sequence_losses: dict[str, list[float]] = {}
    with SparsityProbe(model) as probe:
        for name, sequences in held_out.items():
            sums, counts = _sequence_sums(model, sequences, micro_batch_size)
            if not counts.sum():
                raise MixtureError(
                    f"The held-out sequences of source {name!r} have no token that carries loss.",
                    next_step="Set mixture.instruction_loss=all, or raise training.sequence_length.",
                )
            losses[name] = float(sums.sum() / counts.sum())
            sequence_losses[name] = (sums / counts)[counts > 0].tolist()
    zeros = probe.statistics().zero_share("product")
    return Measurement(
        losses=losses,
        zeros=zeros,
        sequence_losses=sequence_losses,
        held_out_fingerprint=fingerprint(held_out),
    )


def _sequence_sums(
    model: SparseModel, sequences: Sequence[PackedSequence], micro_batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss and number of labels of each sequence. Two tensors [n], float64."""
    sums, counts = [], []
    for start in range(0, len(sequences), micro_batch_size):
        batch = collate(sequences[start : start + micro_batch_size])
        batch = {key: value.to(model.device) for key, value in batch.items()}
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        sums.append(cross_entropies(logits, batch["labels"]).double().cpu())
        counts.append((batch["labels"] != NO_LOSS).double().sum(dim=1).cpu())
    return torch.cat(sums), torch.cat(counts)


def fingerprint(held_out: HeldOut) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for name, sequences in held_out.items():
        digest.update(f"{name}/{len(sequences)}".encode())
        for sequence in sequences:
            digest.update(sequence.input_ids.tobytes() + sequence.labels.tobytes())
    return digest.hexdigest()


RESULT_FILE = "trial.json"
Half = Literal["trial", "confirmation"]


@dataclass(frozen=True)
class Proxy:
    """One proxy run."""

    title: str
    recipe: Recipe
    validation_sequences: int
    half: Half = "trial"

    @property
    def run(self) -> RunFolder:
        return RunFolder(Path(self.recipe.run_dir))

    @property
    def delivered_shares(self) -> dict[str, float]:
        """Shares of the delivered sequences; they differ from the requested ones by less than a sequence."""
        training = self.recipe.training
        num_sequences = self.recipe.num_steps * training.global_batch_size
        sources = self.recipe.mixture.sources
        shares = Shares.constant({name: one.token_share for name, one in sources.items()})
        counts = SourceSchedule(shares).counts(num_sequences)
        return {name: counts.get(name, 0) / num_sequences for name in sources}


def proxy_recipe(recipe: Recipe, shares: Mapping[str, float], num_tokens: int, folder: Path, seed: int) -> Recipe:
    """The recipe with another budget and other shares.

    Warm-up shrinks in proportion, and the decay ends with the budget as in every run. There is no baseline, and the
    run validates on only one sequence per source, because `measure_domains` evaluates trials.

    Raises:
        RecipeError: If the budget is less than a step.
    """
    if num_tokens < recipe.step_tokens:
        raise RecipeError(
            f"{num_tokens:,} tokens are less than one step of {recipe.step_tokens:,} tokens.",
            allowed="A trial needs several steps to change the initial model measurably.",
            next_step=f"Set --trial-tokens to {10 * recipe.step_tokens} or more, or lower training.global_batch_size.",
        )
    proxy = deepcopy(recipe)
    proxy.name, proxy.run_dir = f"{recipe.name}-{folder.name}", str(folder)
    proxy.mixture.instruction_token_share, proxy.mixture.phases = None, []
    for name, source in proxy.mixture.sources.items():
        source.token_share = shares.get(name, 0.0)
    scale = num_tokens / recipe.training.budget_tokens
    proxy.training.budget_tokens, proxy.training.seed = num_tokens, seed
    proxy.optimizer.warmup_tokens = int(recipe.optimizer.warmup_tokens * scale)
    proxy.eval.every_tokens, proxy.eval.validation_sequences_per_source = num_tokens, 1
    proxy.checkpoint.keep_last = 1
    proxy.baseline.ffn_activation = None
    return validate(proxy)


def run_proxy(proxy: Proxy) -> Measurement:
    """Trains and evaluates one proxy run, or reads its earlier measurement.

    Deletes the weights after the evaluation: they are large and not needed any more. Keeps recipe, lock, metrics and
    measurement.

    Raises:
        RunError: If the folder holds a run with other settings.
        sparsify.launch.child.Interrupted: After a clean save.
    """
    run, result = proxy.run, proxy.run.path / RESULT_FILE
    if result.is_file():
        check_same(run.load_recipe(), proxy.recipe, run)
        logger.info(f"{proxy.title}: already measured")
        measurement = _read(result)
    else:
        shares = (f"{name} {share:.1%}" for name, share in proxy.delivered_shares.items())
        logger.info(f"{proxy.title}: {', '.join(shares)}")
        train_run(proxy.recipe, run)
        measurement = _measure(proxy)
        write_text(result, measurement.model_dump_json(indent=2) + "\n")
    for folder in (run.initial, run.checkpoints):
        shutil.rmtree(folder, ignore_errors=True)
    return measurement


def _read(result: Path) -> Measurement:
    again = f"Remove {result.parent} and run the same command again: it repeats that trial."
    return read_record(result, Measurement, "what a trial measured", RunError, again)


def _measure(proxy: Proxy) -> Measurement:
    trained = find_trained(proxy.run.path)
    assert trained is not None, f"{proxy.run.path} was trained but has no recipe"
    halves = held_out_halves(proxy.recipe, load_tokenizer(proxy.run.initial), proxy.validation_sequences)
    held_out = halves[0] if proxy.half == "trial" else halves[1]
    return measure_domains(load_trained(trained), held_out, proxy.recipe.training.micro_batch_size)


def check_comparable(measured: Sequence[tuple[Proxy, Measurement]]) -> None:
    """Raises RunError, listing the runs that differ from the first, if proxy runs were evaluated on different text."""
    first, reference = measured[0]
    other = [
        str(proxy.run.path) for proxy, one in measured if one.held_out_fingerprint != reference.held_out_fingerprint
    ]
    if other:
        raise RunError(
            f"These trials were evaluated on other held-out text than {first.run.path}: {', '.join(other)}.",
            allowed="Files, tokenizer and the number of validation sequences must be the same for all trials.",
            next_step="Remove the folders of the older trials, or choose another place with run_dir=….",
        )
