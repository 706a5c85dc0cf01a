"""The spike rule on healthy runs, where it must stay silent, and on planted spikes and divergence, which it must find.

The healthy runs are synthetic series of sequence losses with the statistics of real ones, or the losses of real runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from sparsify.recipe.training import StabilitySection
from sparsify.reporting.tables import Table
from sparsify.runs.history import read_lines
from sparsify.runs.run_folder import RunFolder
from sparsify.training.spikes import spike_rule
from sparsify.training.stability import remember

SHARES = {
    1: [1.0],
    3: [0.6, 0.25, 0.15],
    5: [0.45, 0.25, 0.17, 0.1, 0.03],
}
SEQUENCE_LABELS = 255
START, SETTLED, FALL_STEPS = 4.0, [2.6, 1.2, 3.1, 0.9, 2.0], 300
"""Nats at the first step, of each source in the end, and how fast the one becomes the other."""
DOCUMENT_SEQUENCES, BETWEEN_DOCUMENTS, WITHIN_DOCUMENT = 4, 0.18, 0.12
"""Sequences of a document in a row, and the standard deviations of the logarithm of their losses."""
ODD_SHARE, RANDOM_NATS = 0.001, 10.4
"""Sequences of odd content, with any loss up to that of random tokens."""
MEMORISED_NATS, MEMORISED_SPREAD, STILL_NEW = 0.08, 0.9, 0.1
"""Loss of a memorised sequence, the spread of its logarithm, and the share that is still new in the end."""
CHUNK = 1 << 16
FOUND_WITHIN = 64
KINDS = ("one step", "five steps", "divergence")


@dataclass(frozen=True)
class Step:
    """One step of a run: mean loss of each source in nats, and its labels and sequences."""

    losses: dict[str, float]
    labels: dict[str, int]
    sequences: dict[str, int]


class Planted(BaseModel):
    planted: int
    found: int
    steps_to_find: float | None
    """Median number of steps until it was found, the first one included; of those that were found."""


class SpikeCount(BaseModel):
    """What the rule did on one kind of healthy run."""

    run: str
    sequences: int
    """Sequences a step."""
    steps: int
    false_alarms: int
    planted: dict[str, Planted]


class SpikeBench(BaseModel):
    seed: int
    spike_deviations: float
    runs: list[SpikeCount]


class Judge:
    """The rule with what it remembers, as in the training loop."""

    def __init__(self, settings: StabilitySection) -> None:
        self._settings = settings
        self._recent: list[dict[str, float] | None] = []
        self._rises: list[float | None] = []

    def is_spike(self, step: Step) -> bool:
        settings = self._settings
        rule = spike_rule(settings, self._recent, self._rises, step.labels, step.sequences)
        spike, rise = False, 0.0
        if rule is not None:
            total = sum(step.losses[source] * step.labels[source] for source in rule.sources)
            rise = total / rule.num_labels - rule.expected
            spike = total > rule.limit * rule.num_labels
        self._recent = remember(settings, self._recent, None if spike else step.losses)
        self._rises = remember(settings, self._rises, rise)
        return spike

    def copy(self) -> Judge:
        other = Judge(self._settings)
        other._recent, other._rises = list(self._recent), list(self._rises)
        return other


class _Source:
    """Endless sequence losses of one source, as a factor on its level; odd and memorised ones as they are."""

    def __init__(self, generator: np.random.Generator, *, memorising: bool) -> None:
        self._random, self._memorising = generator, memorising
        self._factors, self._fixed, self._place = np.empty(0), np.empty(0), 0

    def mean(self, count: int, level: float, known: float) -> float:
        if self._place + count > len(self._factors):
            self._draw(max(CHUNK, count))
        part = slice(self._place, self._place + count)
        self._place += count
        losses = self._factors[part] * level
        if self._memorising:
            memorised = self._random.random(count) < known
            noise = self._random.standard_normal(count)
            losses = np.where(memorised, MEMORISED_NATS * np.exp(MEMORISED_SPREAD * noise), losses)
        fixed = self._fixed[part]
        return float(np.where(fixed > 0, np.maximum(losses, fixed), losses).mean())

    def _draw(self, count: int) -> None:
        lengths = self._random.geometric(1 / DOCUMENT_SEQUENCES, size=count)
        documents = np.repeat(self._random.standard_normal(count) * BETWEEN_DOCUMENTS, lengths)[:count]
        self._factors = np.exp(documents + WITHIN_DOCUMENT * self._random.standard_normal(count))
        odd = self._random.random(count) < ODD_SHARE
        self._fixed = np.where(odd, self._random.uniform(0, RANDOM_NATS, count), 0.0)
        self._place = 0


def healthy_run(seed: int, sequences: int, sources: int, num_steps: int, *, memorising: bool) -> Iterator[Step]:
    """A synthetic healthy run of `num_steps` steps, each of `sequences` sequences of `sources` sources."""
    names = [f"source{index}" for index in range(sources)]
    shares = np.array(SHARES[sources])
    streams = [_Source(np.random.default_rng([seed, index]), memorising=memorising) for index in range(sources)]
    owed = np.zeros(sources)
    for number in range(num_steps):
        owed += shares * sequences
        counts = np.floor(np.maximum(owed, 0)).astype(int)
        while counts.sum() > sequences:
            counts[counts.argmax()] -= 1
        while counts.sum() < sequences:
            counts[(owed - counts).argmax()] += 1
        owed -= counts
        left = 1 / math.sqrt(1 + number / FALL_STEPS)
        known = (1 - STILL_NEW) * (1 - left)
        losses = {}
        for index, (name, count) in enumerate(zip(names, counts, strict=True)):
            if count:
                level = SETTLED[index] + (START - SETTLED[index]) * left
                losses[name] = streams[index].mean(int(count), level, known)
        given = dict(zip(names, map(int, counts), strict=True))
        yield Step(losses, {name: count * SEQUENCE_LABELS for name, count in given.items()}, given)


def real_run(run: RunFolder) -> Iterator[Step]:
    """The good steps of a run that was trained, from its metrics.jsonl."""
    size = run.load_recipe().training.global_batch_size
    for line in read_lines(run.metrics):
        if line.get("kind") == "train":
            labels, total = line["source_labels"], max(1, sum(line["source_labels"].values()))
            sequences = {name: max(1, round(size * count / total)) for name, count in labels.items() if count}
            yield Step(line["sources"], labels, sequences)


def count_spikes(
    name: str, steps: Iterator[Step], sequences: int, settings: StabilitySection, plant_every: int | None
) -> SpikeCount:
    """Runs the rule over a healthy run; every `plant_every` steps also over each kind of planted fault, on the side."""
    judge, count = Judge(settings), SpikeCount(run=name, sequences=sequences, steps=0, false_alarms=0, planted={})
    pending: dict[str, list[tuple[Judge, int]]] = {kind: [] for kind in KINDS}
    found: dict[str, list[int | None]] = {kind: [] for kind in KINDS}
    for step in steps:
        count.steps += 1
        if plant_every and count.steps > settings.recent_steps and count.steps % plant_every == 0:
            for kind in KINDS:
                pending[kind].append((judge.copy(), 0))
        for kind in KINDS:
            pending[kind] = _advance(pending[kind], kind, step, found[kind])
        count.false_alarms += judge.is_spike(step)
    for kind, ages in found.items():
        if ages:
            seen = [age for age in ages if age is not None]
            middle = float(np.median(seen)) if seen else None
            count.planted[kind] = Planted(planted=len(ages), found=len(seen), steps_to_find=middle)
    return count


def _advance(
    pending: Sequence[tuple[Judge, int]], kind: str, step: Step, found: list[int | None]
) -> list[tuple[Judge, int]]:
    going = []
    for judge, age in pending:
        added = {"one step": 6.0 * (age < 1), "five steps": 6.0 * (age < 5), "divergence": min(6.0, 0.5 * (age + 1))}[
            kind
        ]
        if judge.is_spike(_raised(step, added)):
            found.append(age + 1)
        elif age + 1 == (1 if kind == "one step" else 5 if kind == "five steps" else FOUND_WITHIN):
            found.append(None)
        else:
            going.append((judge, age + 1))
    return going


def _raised(step: Step, by: float) -> Step:
    return Step({name: loss + by for name, loss in step.losses.items()}, step.labels, step.sequences)


def bench_spikes(
    num_steps: int, batches: Sequence[int], runs: Sequence[Path], seed: int, *, planted: int = 100
) -> SpikeBench:
    """Counts the rule's false alarms with its default settings.

    Args:
        num_steps: Steps of each synthetic run.
        batches: Sequences a step of the synthetic runs.
        runs: Folders of real runs; every step that they trained counts as healthy.
        seed: Of the synthetic runs.
        planted: Faults of each kind to plant in each run.
    """
    settings, counts = StabilitySection(), []
    sizes = [RunFolder(path).load_recipe().training.global_batch_size for path in runs]  # refuses what is not a run
    for sequences in batches:
        for sources in SHARES:
            for memorising in (False, True):
                name = f"{sources} source{'s' * (sources > 1)}" + ", memorising" * memorising
                steps = healthy_run(seed, sequences, sources, num_steps, memorising=memorising)
                counts.append(count_spikes(name, steps, sequences, settings, max(1, num_steps // planted)))
    for path, size in zip(runs, sizes, strict=True):
        steps = list(real_run(RunFolder(path)))
        counts.append(count_spikes(str(path), iter(steps), size, settings, max(1, len(steps) // planted)))
    assert settings.spike_deviations is not None
    return SpikeBench(seed=seed, spike_deviations=settings.spike_deviations, runs=counts)


def spikes_table(result: SpikeBench) -> Table:
    table = Table(
        f"The spike rule at {result.spike_deviations:g} deviations, seed {result.seed}; planted faults found, and after how many steps",
        ["sequences a step", "healthy run", "steps", "false alarms", *KINDS],
    )
    for run in result.runs:
        table.add(
            f"{run.sequences:,}",
            run.run,
            f"{run.steps:,}",
            f"{run.false_alarms:,}",
            *(_found(run.planted, kind) for kind in KINDS),
        )
    return table


def _found(planted: Mapping[str, Planted], kind: str) -> str:
    one = planted.get(kind)
    if one is None:
        return "–"
    after = "" if one.steps_to_find is None else f", {one.steps_to_find:g}"
    return f"{one.found} of {one.planted}{after}"
