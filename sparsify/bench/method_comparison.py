"""`sparsify bench methods`: every mask on one model, at the same weight densities, calibrated on the same tokens.

For each method and density: the change of the held-out loss, paired with the dense model's sequence by sequence; the zeros at each site;
the weight density that they make; and decoding speed next to the dense model, where the kernels apply the mask. Every token is
masked, the first one too. `methods.json` gets the record of each variant as it finishes, so an interrupted benchmark resumes: with
the next variant, and inside that with the layer where its calibration stopped. Variants that were measured without their speed get it
when the same command asks for it.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field

from sparsify.bench.decode_models import WARM_UP_TOKENS
from sparsify.bench.timing import Clock, paired_ratios
from sparsify.commands.convert import own_activation
from sparsify.commands.report import paired_difference
from sparsify.conversion.convert import convert
from sparsify.conversion.manifest import recorded_files
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import ModelError, RecipeError, RunError, nearest
from sparsify.evaluation.metrics import Score
from sparsify.files import refuse_foreign_folder, write_text
from sparsify.metadata import read_record
from sparsify.methods.base import Mask, method_of, methods
from sparsify.methods.calibrated_checkpoint import convert_calibrated
from sparsify.methods.density import with_target_zeros
from sparsify.mixture.sequences.held_out import check_text_or_mixture, text_or_mixture_calibration
from sparsify.mixture.sequences.reader import PackedSequence, collate
from sparsify.models import SparseModel
from sparsify.recipe.model import ModelSection
from sparsify.recipe.recipe import CACHE_DIR
from sparsify.recipe.sparsification import ActivationSection, ConversionSection, check_conversion
from sparsify.recipe.training import SEED
from sparsify.runtime import accelerate
from sparsify.sparsity import SparsityProbe
from sparsify.sparsity.measure import FACTORS, realised_density, summed_loss
from sparsify.sparsity.schema import PairedDifference

logger = logging.getLogger(__name__)

RESULT_FILE = "methods.json"
MODELS = "models"
"""Folder of the kept models, in that of the result."""
OF_ANY_MASK = ("conversion.remainder", "conversion.allocation")
"""Settings that every mask has, given like those of a method."""
NOT_REQUESTED = "not requested"
TRIAL_ZEROS = 0.5
"""With which a method's settings are checked before anything is measured."""
REPEATS = 3
"""Interleaved repeats of decoding, after one that warms up."""
PROMPT_TOKENS = 32


class Decoding(BaseModel):
    """Decoding one sequence with the kernels, token by token; medians over REPEATS, interleaved with the dense model."""

    model_config = ConfigDict(frozen=True)

    tokens_per_second: float
    dense_tokens_per_second: float
    speed: float
    """Of the masked model over the dense one, median over pairs of repeats."""
    threads: int


class MethodPoint(BaseModel):
    """One method at one density, with or without reconstruction.

    Attributes:
        method: Its name, with the settings that were given.
        density: Weight density that was wanted.
        refit: Whether the reconstruction followed the mask.
        impossible: Why nothing was measured; empty otherwise.
        target_zeros: Solved for the density.
        weight_density: Realised on the held-out text.
        zeros: Share of exact zeros at each masked site, on the held-out text.
        loss: Nats per token.
        difference: From the dense model's loss, over sequences.
        decoding: None where the kernels do not apply the mask.
        not_decoded: Why not.
        seconds: Of calibration and measurement, in the session that finished it.
    """

    model_config = ConfigDict(frozen=True)

    method: str
    density: float
    refit: bool
    impossible: str = ""
    target_zeros: float | None = None
    weight_density: float | None = None
    zeros: dict[str, float] = Field(default_factory=dict)
    loss: float | None = None
    difference: PairedDifference | None = None
    decoding: Decoding | None = None
    not_decoded: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, float, bool]:
        return self.method, self.density, self.refit


class MethodsBench(BaseModel):
    """The result of the benchmark, with its conditions.

    Attributes:
        identity: What all points share: hashes of the model's files and of the tokens, and the settings.
        model: As it was given.
        text: Held-out text in words.
        num_sequences: Held-out ones; all of their tokens are masked.
        dense_scores: Summed loss and number of labels of the dense model in each of them.
        points: In the order in which they were measured.
    """

    identity: dict[str, str | int]
    model: str
    text: str
    num_tokens: int
    num_sequences: int
    threads: int
    device: str
    dense_loss: float
    dense_scores: list[tuple[float, float]]
    points: list[MethodPoint] = Field(default_factory=list)

    def point(self, method: str, density: float, refit: bool) -> MethodPoint | None:
        return next((one for one in self.points if one.key == (method, density, refit)), None)


@dataclass(frozen=True)
class MethodsPlan:
    """Settings of the benchmark.

    Attributes:
        model: A dense checkpoint, as `sparsify convert` takes it.
        on: Text or mixture; the held-out part is what calibration does not see.
        to: Folder of the result; an interrupted benchmark resumes there.
        methods: NAME or NAME:KEY=VALUE for a mask with settings, its own or those of OF_ANY_MASK; empty for every mask with its defaults.
        refit: Measure each with the reconstruction, too.
        decode_tokens: Tokens of each timed decoding; 0 for none.
        keep: Keep each converted model without reconstruction, `to`/models/NAME-DENSITY, so that it can be timed later.
    """

    model: str
    on: str
    to: Path
    methods: Sequence[str] = ()
    densities: Sequence[float] = (0.7, 0.5, 0.4, 0.3, 0.2, 0.1)
    refit: bool = False
    calibration_tokens: int = 32_768
    tokens: int = 32_768
    sequence_length: int = 512
    decode_tokens: int = 32
    keep: bool = False


def masks() -> list[str]:
    """Every method that is a mask whose zeros a density can be solved for."""
    return [
        name
        for name, method in methods().items()
        if "target_zeros" in method.Settings.model_fields and isinstance(_trial(method), Mask)
    ]


def _trial(method: Any) -> Any:
    return method(method.Settings(target_zeros=TRIAL_ZEROS))


def bench_methods(plan: MethodsPlan) -> MethodsBench:
    """Measures what is not measured yet.

    Raises:
        RecipeError: If a method or a density cannot be compared.
        RunError: If the folder holds another benchmark.
        UserError: If the model or the text cannot be read.
    """
    conversions = _conversions(plan)
    check_text_or_mixture(plan.on)
    refuse_foreign_folder(plan.to, RESULT_FILE, "benchmark of methods")
    work = plan.to.absolute().with_name(f".{plan.to.absolute().name}.methods")
    # Nothing of it is needed once it is read, and the next one may be of another model.
    shutil.rmtree(work / "dense", ignore_errors=True)
    bench = _Bench(plan, work)
    result = bench.begin()
    keys = [(name, density, refit) for density in plan.densities for name in conversions for refit in plan_refits(plan)]
    missing = [key for key in keys if result.point(*key) is None]
    if len(missing) < len(keys):
        logger.info(f"{len(keys) - len(missing)} of {len(keys)} variants are measured already")
    for number, key in enumerate(missing):
        logger.info(f"Variant {number + 1} of {len(missing)}: {words(*key)}")
        point = bench.measure(conversions[key[0]], *key)
        result.points.append(point)
        _save(result, plan)
        logger.info(_line(point))
    for key in keys:
        point = result.point(*key)
        if point is None or point.refit or point.not_decoded != NOT_REQUESTED:
            continue
        if plan.decode_tokens:
            logger.info(f"Timing {words(*key)}")
            result.points[result.points.index(point)] = bench.timed(conversions[key[0]], point)
            _save(result, plan)
        elif plan.keep:
            bench.converted(conversions[key[0]], point)
    shutil.rmtree(work, ignore_errors=True)
    return result


def _save(result: MethodsBench, plan: MethodsPlan) -> None:
    write_text(plan.to / RESULT_FILE, result.model_dump_json(indent=1) + "\n")


def plan_refits(plan: MethodsPlan) -> tuple[bool, ...]:
    return (False, True) if plan.refit else (False,)


def words(method: str, density: float, refit: bool) -> str:
    return f"{method} at density {density:g}{', reconstructed' if refit else ''}"


def _line(point: MethodPoint) -> str:
    if point.difference is None:
        return f"{words(*point.key)}: {point.impossible}"
    return (
        f"{words(*point.key)}: loss {point.difference.value:+.4f}, weight density {point.weight_density:.3f}, "
        f"{point.seconds:.0f} s"
    )


def _conversions(plan: MethodsPlan) -> dict[str, ConversionSection]:
    """The conversion of each method, without density; all are checked before the first is measured."""
    known = masks()
    for density in plan.densities:
        if not 0 < density <= 1:
            raise RecipeError(f"--densities has {density:g}.", allowed="Above 0, up to 1.")
    for option, values in (("--densities", plan.densities), ("--methods", plan.methods)):
        if len(set(values)) != len(values) or (option == "--densities" and not values):
            given = ", ".join(map(str, values)) or "empty"
            raise RecipeError(f"{option} is {given}.", allowed="One or more, each once.")
    found = {}
    for given in plan.methods or known:
        name, *pairs = given.split(":")
        if name not in known:
            raise RecipeError(
                f"--methods has {name!r}, which is not a mask whose zeros a density can be solved for.",
                allowed=f"{nearest(name, known)}Masks: {', '.join(known)}; with a setting: percentile:site=gate.",
            )
        if not all("=" in pair for pair in pairs):
            raise RecipeError(
                f"--methods has {given!r}.", allowed="NAME, or NAME:KEY=VALUE, such as percentile:site=gate."
            )
        settings = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}
        beyond = {key.partition(".")[2]: settings.pop(key) for key in OF_ANY_MASK if key in settings}
        found[given] = ConversionSection(
            calibration_tokens=plan.calibration_tokens, method=name, method_settings=settings, refit=False, **beyond
        )
        check_conversion(found[given])
        for refit in plan_refits(plan):
            method_of(_with(found[given], refit=refit, target_zeros=TRIAL_ZEROS))
    return found


def _with(conversion: ConversionSection, **fields: Any) -> ConversionSection:
    return ConversionSection(**(asdict(conversion) | fields))


class _Bench:
    """The dense model, the tokens, and how a variant is measured on them."""

    def __init__(self, plan: MethodsPlan, work: Path) -> None:
        self._plan, self._work = plan, work
        self._dense_folder = work / "dense"
        name, threshold = own_activation(plan.model)
        self._activation = ActivationSection(name, threshold)
        converted = convert(
            ModelSection(source=plan.model), self._activation, self._dense_folder, seed=0, dtype=torch.bfloat16
        )
        self._config = converted.config
        if self._config.sparsification:
            shutil.rmtree(work, ignore_errors=True)
            raise ModelError(
                f"{plan.model} stores a mask already, of {self._config.sparsification['method']}.",
                next_step="Give the dense model that it was made from.",
            )
        self._sequences, held_out = text_or_mixture_calibration(
            plan.on,
            load_tokenizer(self._dense_folder),
            num_tokens=plan.calibration_tokens,
            validation_tokens=plan.tokens,
            sequence_length=min(plan.sequence_length, self._config.max_position_embeddings),
            seed=SEED,
            cache_dir=Path(CACHE_DIR).expanduser(),
        )
        self._held_out = [sequence for sequences in held_out.values() for sequence in sequences]
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._dense = self._load(self._dense_folder)
        self._scores: list[Score] = []

    def _load(self, folder: Path) -> SparseModel:
        model = load_sparse(folder, dtype=None if self._device == "cuda" else torch.float32)
        return model.to(self._device)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def begin(self) -> MethodsBench:
        """What was measured before under the same conditions, or the dense model's record."""
        path, identity = self._plan.to / RESULT_FILE, self._identity()
        if path.is_file():
            result = read_record(path, MethodsBench, "a benchmark of methods", RunError, "Choose another folder.")
            different = [key for key, value in identity.items() if result.identity.get(key) != value]
            if different:
                raise RunError(
                    f"{self._plan.to} holds a benchmark with another {' and '.join(different)}.",
                    next_step="Choose another folder (--to), or remove this one.",
                )
            self._scores = [Score(*score) for score in result.dense_scores]
            return result
        logger.info(f"Measuring the dense model on {len(self._held_out)} sequences")
        self._scores, _ = self._measure(self._dense)
        labels = sum(score.weight for score in self._scores)
        sources = sorted({sequence.source for sequence in self._held_out})
        result = MethodsBench(
            identity=identity,
            model=self._plan.model,
            text=f"held out of {self._plan.on}: {', '.join(sources)}",
            num_tokens=sum(len(sequence.input_ids) for sequence in self._held_out),
            num_sequences=len(self._held_out),
            threads=torch.get_num_threads(),
            device=self._device,
            dense_loss=sum(score.value for score in self._scores) / labels,
            dense_scores=[(score.value, score.weight) for score in self._scores],
        )
        write_text(path, result.model_dump_json(indent=1) + "\n")
        return result

    def _identity(self) -> dict[str, str | int]:
        plan, files = self._plan, recorded_files(self._dense_folder)
        weights = {
            name: entry.xxh3_128 for name, entry in files.items() if name.endswith((".safetensors", "config.json"))
        }
        return {
            "model": _short_hash(repr(sorted(weights.items()))),
            "text": _digest([*self._sequences, *self._held_out]),
            "calibration_tokens": plan.calibration_tokens,
            "tokens": plan.tokens,
            "sequence_length": plan.sequence_length,
        }

    def measure(self, conversion: ConversionSection, method: str, density: float, refit: bool) -> MethodPoint:
        start = time.monotonic()
        point = partial(MethodPoint, method=method, density=density, refit=refit)
        folder = self._folder(method, density, refit)
        try:
            settings = self._convert(conversion, density, refit, folder)
        except RecipeError as error:
            return point(impossible=" ".join(part for part in (error.given, error.allowed) if part))
        model = self._load(folder)
        scores, found = self._measure(model)
        paired = paired_difference(scores, self._scores)
        assert paired is not None
        decoding, reason = (None, "as without reconstruction") if refit else self._decode(model)
        self._remove(folder)
        return point(
            target_zeros=settings.target_zeros,
            loss=sum(score.value for score in scores) / sum(score.weight for score in scores),
            difference=paired,
            decoding=decoding,
            not_decoded=reason,
            seconds=time.monotonic() - start,
            **found,
        )

    def timed(self, conversion: ConversionSection, point: MethodPoint) -> MethodPoint:
        """A point that was measured, with its speed: from the model that was kept, or else from one converted again."""
        folder = self.converted(conversion, point)
        decoding, reason = self._decode(self._load(folder))
        self._remove(folder)
        return point.model_copy(update={"decoding": decoding, "not_decoded": reason})

    def converted(self, conversion: ConversionSection, point: MethodPoint) -> Path:
        folder = self._folder(*point.key)
        if not folder.is_dir():
            self._convert(conversion, point.density, point.refit, folder)
        return folder

    def _folder(self, method: str, density: float, refit: bool) -> Path:
        kept = self._plan.to / MODELS / f"{re.sub(r'[^a-z0-9_.]+', '-', method.lower())}-{density:g}"
        if not refit and (self._plan.keep or kept.is_dir()):
            return kept
        return self._work / _short_hash(repr((method, density, refit)))

    def _remove(self, folder: Path) -> None:
        if folder.is_relative_to(self._work):
            shutil.rmtree(folder)

    def _convert(self, conversion: ConversionSection, density: float, refit: bool, folder: Path) -> ConversionSection:
        shutil.rmtree(folder, ignore_errors=True)  # converted, but not measured
        settings = with_target_zeros(_with(conversion, refit=refit, target_density=density), self._config)
        convert_calibrated(
            ModelSection(source=str(self._dense_folder)),
            self._activation,
            settings,
            folder,
            lambda *_: (self._sequences, {}),
            seed=0,
            dtype=torch.bfloat16,
            measure=False,
        )
        return settings

    def _measure(self, model: SparseModel) -> tuple[list[Score], dict[str, Any]]:
        """Summed loss and labels of each sequence; realised weight density, and zeros of the sites that are masked."""
        scores = []
        with torch.no_grad(), SparsityProbe(model) as probe:
            for sequence in self._held_out:
                batch = {key: value.to(model.device) for key, value in collate([sequence]).items()}
                labels = int((batch["labels"] >= 0).sum())
                if labels:
                    scores.append(Score(float(summed_loss(model, batch)), labels))
        statistics = probe.statistics()
        zeros = {
            site: statistics.zero_share(factor) for site, factor in FACTORS.items()
        } | statistics.site_zero_shares()
        masked = (model.config.sparsification or {"sites": {}})["sites"]
        density = realised_density(statistics, model.config)
        return scores, {"weight_density": density, "zeros": {site: zeros[site] for site in masked}}

    def _decode(self, model: SparseModel) -> tuple[Decoding | None, str]:
        if not self._plan.decode_tokens:
            return None, NOT_REQUESTED
        try:
            ours = accelerate(model)
        except ModelError as error:
            return None, error.given
        theirs = accelerate(self._dense, dense=True)
        tokens = torch.tensor(list(self._held_out[0].input_ids[: PROMPT_TOKENS + self._plan.decode_tokens]))
        seconds: dict[str, list[float]] = {"masked": [], "dense": []}
        for repeat in range(REPEATS + 1):
            for name, one in (("masked", model), ("dense", self._dense)):
                spent = _seconds_per_token(one, tokens.to(self._device).view(1, -1))
                if repeat:
                    seconds[name].append(spent)
        theirs.remove()
        ours.remove()
        return Decoding(
            tokens_per_second=1 / median(seconds["masked"]),
            dense_tokens_per_second=1 / median(seconds["dense"]),
            speed=median(paired_ratios(seconds["dense"], seconds["masked"])),
            threads=torch.get_num_threads(),
        ), ""


@torch.no_grad()
def _seconds_per_token(model: Any, ids: torch.Tensor) -> float:
    clock = Clock(ids.device.type)
    prompt = min(PROMPT_TOKENS, ids.shape[1] // 2)
    cache = model(ids[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
    rest = ids[0, prompt:]
    warm, start = min(WARM_UP_TOKENS, len(rest) - 1), clock.mark()
    for number, token in enumerate(rest):
        start = clock.mark() if number == warm else start
        cache = model(token.view(1, 1), past_key_values=cache, use_cache=True).past_key_values
    return clock.seconds(start, clock.mark()) / (len(rest) - warm)


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest(sequences: Sequence[PackedSequence]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for sequence in sequences:
        for values in collate([sequence]).values():
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()
