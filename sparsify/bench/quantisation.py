"""`sparsify bench quantisation`: quantised models next to the one that they were made from, on the same sequences: the loss when a whole
sequence is computed at once, and when it is decoded token by token.

Runtime smoothing divides by the largest activations among the tokens of one call, so it does most where there is only one: a loss on
whole sequences says nothing of decoding, and the other way round.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel
from rich.console import RenderableType
from torch import nn

from sparsify.commands.report import paired_difference
from sparsify.conversion.source_checkpoint import locate
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import RunError
from sparsify.evaluation.metrics import Score
from sparsify.mixture.sequences.held_out import sequences_from
from sparsify.mixture.sequences.reader import NO_LOSS, PackedSequence, collate
from sparsify.models import SparseModel
from sparsify.models.integer_linear import IntegerLinear, quantisation
from sparsify.reporting.numbers import percent
from sparsify.reporting.tables import Table
from sparsify.sparsity.integer_weights import projection_bytes
from sparsify.sparsity.measure import realised_density
from sparsify.sparsity.probe import SparsityProbe
from sparsify.sparsity.schema import PairedDifference
from sparsify.training.validation import sequence_losses

logger = logging.getLogger(__name__)


class QuantisedPoint(BaseModel):
    """One model. Differences are from the first one, which has none.

    Attributes:
        zeros: Share of exact zeros of the feed-forward activations.
        down_zeros: Share of zeros of what down multiplies: after rotation and rounding.
        bytes_read: Bytes of the linear projections that a token reads, scales included, with what zeros spare.
        bytes_share: That, as a share of the first model's without what zeros spare, in bf16.
        prefill_loss: Nats per token, sequences computed at once.
        decode_loss: Nats per token, one token at a time through the cache.
    """

    model: str
    words: str
    zeros: float
    down_zeros: float
    bytes_read: int
    bytes_share: float
    prefill_loss: float
    prefill: PairedDifference | None
    decode_loss: float
    decode: PairedDifference | None


class QuantisationBench(BaseModel):
    text: str
    num_tokens: int
    num_sequences: int
    decode_tokens: int
    decode_sequences: int
    points: list[QuantisedPoint]


def bench_quantisation(
    models: Sequence[str],
    *,
    on: str,
    num_tokens: int,
    sequence_length: int,
    decode_sequences: int,
    decode_length: int,
    cache_dir: Path,
    on_progress: Callable[[str], object],
) -> QuantisationBench:
    """Measures models on the same sequences, in fp32, one model in memory at a time.

    Args:
        models: Folders or Hub ids; the first is what the others are compared with.
        on: Text or mixture.
        num_tokens: Tokens of the sequences that are computed at once.
        sequence_length: Of these.
        decode_sequences: How many of them are decoded, too.
        decode_length: Tokens of each that are decoded: its first ones.
        cache_dir: For a mixture's tokens.
        on_progress: Gets a line about what is being done.

    Raises:
        ModelError: If a model is missing or damaged.
        RunError: If a number does not fit the others, or models have different vocabularies.
    """
    if decode_length > sequence_length:
        raise RunError(f"--decode-length is {decode_length}.", allowed=f"At most --sequence-length, {sequence_length}.")
    folders = [locate(one) for one in models]
    sequences, text = sequences_from(
        on, load_tokenizer(folders[0]), num_tokens=num_tokens, sequence_length=sequence_length, cache_dir=cache_dir
    )
    sequences = [one for one in sequences if len(one.input_ids) == sequence_length]
    if len(sequences) < decode_sequences:
        raise RunError(
            f"--on {on} gives {len(sequences)} sequences of {sequence_length} tokens.",
            allowed=f"At least --decode-sequences, {decode_sequences}.",
            next_step="Raise --tokens, or give a longer text.",
        )
    points: list[QuantisedPoint] = []
    first: tuple[list[Score], list[Score]] | None = None
    vocabulary, dense_bytes = None, 1
    for name, folder in zip(models, folders, strict=True):
        on_progress(f"Measuring {name}")
        model = load_sparse(folder, dtype=torch.float32)
        if vocabulary not in (None, model.config.vocab_size):
            raise RunError(
                f"{name} has {model.config.vocab_size:,} tokens, and {models[0]} {vocabulary:,}.",
                next_step="Give models that were made from the first one.",
            )
        vocabulary = model.config.vocab_size
        scores, zeros, down_zeros, density = prefill_scores(model, sequences)
        decoded = decode_scores(model, sequences[:decode_sequences], decode_length)
        stored, whole, dense = quantisation(model.config), *projection_bytes(model)
        if first is None:
            first, dense_bytes = (scores, decoded), dense
        points.append(
            QuantisedPoint(
                model=name,
                words="" if stored is None else stored.words,
                zeros=zeros,
                down_zeros=down_zeros,
                bytes_read=round(density * whole),
                bytes_share=density * whole / dense_bytes,
                prefill_loss=_mean(scores),
                prefill=paired_difference(scores, first[0]) if points else None,
                decode_loss=_mean(decoded),
                decode=paired_difference(decoded, first[1]) if points else None,
            )
        )
        logger.info(_said(points[-1]))
    return QuantisationBench(
        text=text,
        num_tokens=len(sequences) * sequence_length,
        num_sequences=len(sequences),
        decode_tokens=decode_sequences * decode_length,
        decode_sequences=decode_sequences,
        points=points,
    )


@torch.no_grad()
def prefill_scores(model: SparseModel, sequences: Sequence[PackedSequence]) -> tuple[list[Score], float, float, float]:
    """Losses of sequences computed at once; shares of zeros of activations and of what down multiplies; the weight density."""
    counts = torch.zeros(2, dtype=torch.int64)

    def count(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        read = module.read(args[0]) if isinstance(module, IntegerLinear) else args[0]
        counts.add_(torch.tensor([int((read == 0).sum()), read.numel()]))

    downs = [block.down_proj for block in model.ffn_blocks() if isinstance(block.down_proj, nn.Module)]
    hooks = [down.register_forward_pre_hook(count) for down in downs]
    scores = []
    with SparsityProbe(model) as probe:
        for sequence in sequences:
            batch = collate([sequence])
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            scores.append(_score(logits, batch["labels"]))
    for hook in hooks:
        hook.remove()
    statistics = probe.statistics()
    zeros, values = counts.tolist()
    share = statistics.zero_share("product")
    return scores, share, zeros / values if values else share, realised_density(statistics, model.config)


@torch.no_grad()
def decode_scores(model: SparseModel, sequences: Sequence[PackedSequence], length: int) -> list[Score]:
    """Losses of the first tokens of sequences, which are decoded one token at a time, all sequences together."""
    batch = collate(sequences)
    ids, labels, cache, logits = batch["input_ids"][:, :length], batch["labels"][:, :length], None, []
    for position in range(length):
        output = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    every = torch.cat(logits, dim=1)
    return [_score(every[row : row + 1], labels[row : row + 1]) for row in range(len(ids))]


def _score(logits: torch.Tensor, labels: torch.Tensor) -> Score:
    return Score(float(sequence_losses(logits, labels).sum()), float((labels != NO_LOSS).sum()))


def _mean(scores: Sequence[Score]) -> float:
    return sum(score.value for score in scores) / max(sum(score.weight for score in scores), 1)


def _interval(found: PairedDifference | None) -> str:
    if found is None:
        return "–"
    bounds = "" if found.low is None or found.high is None else f" [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.value:+.3f}{bounds}"


def _said(point: QuantisedPoint) -> str:
    return f"{point.model}: {point.prefill_loss:.3f} nats at once, {point.decode_loss:.3f} token by token"


def quantisation_table(bench: QuantisationBench) -> RenderableType:
    first = bench.points[0]
    table = Table(
        f"{bench.text}: loss over {first.model} ({first.prefill_loss:.3f} nats), 95% interval over {bench.num_sequences} sequences, "
        f"{bench.num_tokens:,} tokens; decoded over {bench.decode_sequences}, {bench.decode_tokens:,} tokens ({first.decode_loss:.3f} "
        "nats)",
        [
            "model",
            "",
            "sequences at once",
            "token by token",
            "perplexity",
            "zeros",
            "zeros at down",
            "MB a token",
            "of bf16",
        ],
        left=(0, 1),
    )
    for point in bench.points:
        table.add(
            point.model,
            point.words,
            _interval(point.prefill),
            _interval(point.decode),
            f"{math.exp(min(point.prefill_loss, 700)):,.2f} / {math.exp(min(point.decode_loss, 700)):,.2f}",
            percent(point.zeros),
            percent(point.down_zeros),
            f"{point.bytes_read / 1e6:,.2f}",
            percent(point.bytes_share),
        )
    return table
