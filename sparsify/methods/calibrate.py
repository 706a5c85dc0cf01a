"""The calibrated replacement: a bare replacement's checkpoint in, the same model repaired layer by layer without training out.

Layers are calibrated in order, each on the output of the converted layers before it; the dense model runs in parallel, layer by
layer as well. Memory holds one layer and one Gram matrix. A state folder holds the residual streams before the current layer
and the results for those before it, so that an interrupted calibration resumes with the current layer.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional

from sparsify.conversion.layout import mask_names
from sparsify.conversion.source_tensors import check_base_loss
from sparsify.conversion.weight_files import in_dtype
from sparsify.errors import MixtureError, StorageError
from sparsify.files import atomic_folder, storage_errors, write_json
from sparsify.metadata import holds_json, read_json
from sparsify.methods.attention_refit import AttentionLayer, Sequences
from sparsify.methods.base import (
    LayerRewrite,
    Mask,
    Rewritten,
    SiteValues,
    Upcycling,
    method_of,
    sparsification,
)
from sparsify.methods.calibrated_replacement import HELD_OUT_EVERY, RECONSTRUCTED, MaskedWeights
from sparsify.methods.layer_expert import Expert, ffn_output
from sparsify.methods.layerwise import (
    Attention,
    Inputs,
    Layer,
    LayerReader,
    Streams,
    as_stored,
    chunks,
    ffn_names,
    tensor,
)
from sparsify.methods.remainder import ConstantRemainder
from sparsify.methods.sites import ATTENTION_SITES, BlockValues, MaskParts, Parts, with_masks
from sparsify.mixture.sequences.reader import NO_LOSS, PackedSequence, collate
from sparsify.models import FfnActivation, site_rules
from sparsify.models.masking import READERS
from sparsify.recipe.sparsification import REFIT_TARGETS, ConversionSection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationStage:
    """One stage of the activation replacement, measured on the watched sequences.

    Attributes:
        name: `dense`, or `source` where that is sparse already; `bare replacement`; then what the method's steps are called.
        losses: Nats per token of each source.
    """

    name: str
    losses: dict[str, float | None]
    loss: float
    zeros: float


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        stages: None where they were not to be measured.
        layers: What each layer's record says: `layer`, `zeros`, and what the method says of it.
        num_tokens: Calibration tokens, held-out ones included.
    """

    stages: list[CalibrationStage]
    layers: list[dict[str, Any]]
    num_tokens: int
    method: str = "calibrated_replacement"


def rewrite_of(conversion: ConversionSection) -> LayerRewrite:
    """The conversion's method as a rewrite of weights: a mask with the reconstruction that follows it.

    Raises:
        RecipeError: If there is no such method, or a setting is invalid.
    """
    assert conversion.target_density is None, "not solved for target_zeros"
    method = method_of(conversion)
    assert not isinstance(method, Upcycling), f"{method.name} does not go through layers"
    if not isinstance(method, Mask):
        return method
    mask: Any = ConstantRemainder(method) if conversion.remainder == "constant" else method
    return MaskedWeights(mask, conversion.refit)


class Calibrator:
    """Takes a method through the checkpoint of a bare replacement.

    Args:
        folder: The checkpoint: the dense model's weights, `ffn_activation` the new one.
        state: Folder for the state of an interrupted run; the caller removes it once the result is written.
        sequences: Calibration sequences, all of one length.
        watched: Sequences to measure the stages on, of the same length, by source.
        zeros_by_layer: `target_zeros` of each layer, where they are not the same in all.
        measure: Whether the stages and what each layer's mask does are measured. Otherwise only what the result depends on is
            computed: for a mask without reconstruction no dense stream, for one that looks at no values no stream at all.

    Raises:
        MixtureError: If there are too few sequences.
    """

    def __init__(
        self,
        folder: Path,
        state: Path,
        sequences: Sequence[PackedSequence],
        watched: dict[str, list[PackedSequence]],
        settings: ConversionSection,
        zeros_by_layer: Sequence[float] | None = None,
        *,
        measure: bool = True,
    ) -> None:
        self._zeros_by_layer, self._measure = zeros_by_layer, measure
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._state, self._settings = state, settings
        self.method = rewrite_of(settings)
        self._result, self._mask = self.method.last_stage, self.method.mask
        fitted_mask = None if self._mask is None else sparsification(self._mask)
        self._reader = LayerReader(folder, fitted_mask, self.device)
        self.method.check_model(self._reader.config)
        self._watched = watched = watched if measure else {}
        self._num_fit = len(sequences)
        if self._num_fit < HELD_OUT_EVERY:
            raise MixtureError(
                f"There are {self._num_fit} sequence(s) of {len(next(iter(sequences)).input_ids)} tokens to calibrate on.",
                allowed=f"At least {HELD_OUT_EVERY}: one of them is held out for evaluation.",
                next_step="Give more calibration tokens, or a longer text.",
            )
        self._batch = collate([*sequences, *(w for held in watched.values() for w in held)])
        config = self._reader.config
        self._dense = FfnActivation(config.base_ffn_activation, config.base_ffn_gate_threshold)
        self._replaced = FfnActivation(config.ffn_activation, config.ffn_gate_threshold)
        self._stored_rules = {} if fitted_mask else site_rules(config)
        self._source_is_sparse = bool(config.sparsification or config.weight_sparsity)
        self._masked_config = deepcopy(config)
        self._masked_config.sparsification = fitted_mask
        self._dtype = torch.float32 if self.method.in_fp32 else self._reader.stored_dtype()
        self._needs_dense = measure or self._result == RECONSTRUCTED
        self._needs_streams = self._needs_dense or getattr(self._mask or self.method, "reads_values", True)

    @torch.no_grad()
    def run(self) -> Calibration:
        """Calibrates every layer that is not done yet, and measures the stages.

        Raises:
            StorageError: If the state cannot be written.
        """
        with storage_errors(self._state):
            self._begin()
            num_layers = self._reader.config.num_hidden_layers
            for layer in range(num_layers):
                if not self._record(layer).is_file():
                    self._calibrate(layer, num_layers)
            again = f"Remove {self._state}, then run the same command again."
            records = [read_json(self._record(n), StorageError, again) for n in range(num_layers)]
            stages = self._stages(records) if self._measure else []
        tokens = self._num_fit * self._sequence_length
        return Calibration(stages, records, tokens, self._settings.method)

    def tensors_of(self, layer: int) -> Path:
        """File with a layer's new tensors, by their names on disk."""
        return self._state / f"layer-{layer:04d}.safetensors"

    @property
    def _sequence_length(self) -> int:
        return self._batch["input_ids"].shape[1]

    def _record(self, layer: int) -> Path:
        return self._state / f"layer-{layer:04d}.json"

    def _streams(self, layer: int) -> Streams:
        return Streams(self._state / f"streams-{layer:04d}")

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=16)
        for values in self._batch.values():
            digest.update(values.numpy().tobytes())
        activations = [repr(self._dense), repr(self._replaced)]
        return {
            "settings": asdict(self._settings),
            "zeros_by_layer": self._zeros_by_layer,
            "measure": self._measure,
            "activations": activations,
            "sequences": digest.hexdigest(),
        }

    def _begin(self) -> None:
        identity = self._state / "identity.json"
        if holds_json(identity, self._identity()):
            return
        for old in [*self._state.glob("layer-*"), *self._state.glob("streams-*")]:
            Streams(old).remove() if old.is_dir() else old.unlink()
        shape = (*self._batch["input_ids"].shape, self._reader.config.hidden_size)
        if self._needs_streams:
            with atomic_folder(self._streams(0).folder) as partial_folder:
                stream = Streams(partial_folder).create("dense", shape)
                for part in chunks(shape[0], shape[1]):
                    ids = self._batch["input_ids"][part].to(self.device)
                    stream[part] = self._reader.embed(ids).cpu().numpy()
        write_json(identity, self._identity())

    def _calibrate(self, layer: int, num_layers: int) -> None:
        if self._zeros_by_layer is not None:
            self.method = rewrite_of(replace(self._settings, target_zeros=self._zeros_by_layer[layer]))
            self._mask = self.method.mask
        attention, old = self._reader.attention(layer), self._streams(layer)
        work = Streams(self._state / "work")
        work.remove()
        dense = self._reader.experts(layer, self._dense)
        dense = with_masks(dense, self._stored_rules, self._reader.stored_masks(layer), is_turned=True)
        replaced = [expert.with_activation(self._replaced) for expert in dense]
        with atomic_folder(self._streams(layer + 1).folder) as partial_folder:
            new = Streams(partial_folder)
            counts = self._advance(attention, dense, old, "dense", new) if self._needs_dense else [0, 0]
            masks, mask_record = self._fit_attention(attention, replaced, old)
            rewritten, said = self._rewrite_attention(layer, attention, old)
            mask_record |= rewritten
            attention.use(masks=True, refits=True)
            if self._needs_streams:
                self._prepare(attention, dense, old, new, work)
            inputs = partial(self._inputs, attention, work)
            found = self.method.rewrite(
                Layer(dense, replaced, layer, self._dtype, inputs, self._measure), self._settings
            )
            zeros, masked = {"dense": counts if self._source_is_sparse else [0, 1]}, False
            for name, experts in found.stages.items():
                if name != "dense" and (self._measure or (self._needs_streams and name == self._result)):
                    masked = masked or (self._mask is not None and name == self._mask.name)
                    attention.use(masks=masked, refits=name == self._result)
                    known = work.open("residual") if name == self._result else None
                    zeros[name] = self._advance(attention, experts, old, name, new, known)
        self._save(layer, found, zeros, attention, masks, mask_record)
        work.remove()
        old.remove()
        line = f"{found.line}; {said}" if said else found.line
        logger.info(f"Layer {layer + 1} of {num_layers}: {line}")

    def _fit_attention(self, attention: Attention, experts: list[Expert], old: Streams) -> tuple[Parts, dict[str, Any]]:
        """Fits the mask's sites in the attention, each with those before it applied, as stored; and what is recorded."""
        record: dict[str, Any] = {}
        masks: Parts = {}
        for site in (site for site in ATTENTION_SITES if self._mask and site in self._mask.sites):
            assert self._mask is not None
            fitted = self._mask.fit(site, AttentionValues(self, attention, experts, old))
            record |= fitted.record
            masks[site] = as_stored(fitted.parts, self._dtype)
            attention.fit(site, masks[site], self._dtype)
        return masks, record

    def _rewrite_attention(self, layer: int, attention: Attention, old: Streams) -> tuple[dict[str, Any], str]:
        def sequences() -> Iterator[Sequences]:
            converted = self._before(old, self._result)[0][: self._num_fit]
            dense = self._before(old, "dense")[0] if self._needs_dense else None
            for part in chunks(*converted.shape[:2]):
                yield Sequences(
                    None if dense is None else tensor(dense[part], self.device),
                    tensor(converted[part], self.device),
                    self._batch["position_ids"][part].to(self.device),
                    *self._parts(part),
                )

        return self.method.rewrite_attention(AttentionLayer(layer, attention, self._dtype, sequences), self._settings)

    def attention_values(self, site: str, attention: Attention, old: Streams) -> Iterator[SiteValues]:
        """The values of a site in the attention, on the tokens that methods may look at."""
        before = self._before(old, self._result)[0][: self._num_fit]
        for part in chunks(*before.shape[:2]):
            hidden = tensor(before[part], self.device)
            positions = self._batch["position_ids"][part].to(self.device)
            values = attention.values(site, hidden, positions).flatten(0, -2)
            values = values[self._parts(part)[0]]
            yield SiteValues(values, values.new_ones(len(values)), 0, None)

    def layer_output(
        self, attention: Attention, experts: list[Expert], old: Streams, masks: MaskParts, num_tokens: int
    ) -> torch.Tensor:
        """The stream after a layer with these masks, [tokens, hidden], on the first tokens that methods may look at."""
        assert self._mask is not None
        before = self._before(old, self._result)[0]
        before = before[: min(self._num_fit, ceil(num_tokens / before.shape[1]))]
        experts = with_masks(experts, self._mask.sites, masks)
        outputs: list[torch.Tensor] = []
        with attention.trying({site: masks[site] for site in ATTENTION_SITES if site in masks}, self._dtype):
            for part in chunks(*before.shape[:2]):
                residual = self._residual(attention, before, part, 0)
                x = attention.ffn_inputs(residual)
                output = attention.behind_block(residual.flatten(0, 1), ffn_output(x, attention.routes(x), experts))
                outputs.append(output[self._parts(part)[0]])
        return torch.cat(outputs)[:num_tokens]

    def inputs_behind(self, attention: Attention, old: Streams) -> Iterator[Inputs]:
        """What the block reads behind the attention as it is masked so far; there is nothing that it should add."""
        before = self._before(old, self._result)[0][: self._num_fit]
        for part in chunks(*before.shape[:2]):
            with attention.trying({}, self._dtype):
                x = attention.ffn_inputs(self._residual(attention, before, part, 0))
            yield Inputs(x, attention.routes(x), torch.zeros_like(x), *self._parts(part))

    def _parts(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens of some sequences methods may look at, and which are held out. Bool [tokens] each."""
        # Padding has position 0 and no label.
        labels, positions = (self._batch[key][part] for key in ("labels", "position_ids"))
        is_text = ((labels != NO_LOSS) | (positions > 0)).flatten().to(self.device)
        held_out = torch.arange(part.start, part.stop) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        held_out = held_out.repeat_interleave(labels.shape[1]).to(self.device)
        return is_text & ~held_out, is_text & held_out

    def _advance(
        self,
        attention: Attention,
        experts: list[Expert],
        old: Streams,
        name: str,
        new: Streams,
        residuals: np.ndarray | None = None,
    ) -> list[int]:
        """Computes a stage's stream behind a layer, from that before its block where it is known; counts zeros and neurons."""
        before, start = self._before(old, name)
        after = new.create(name, before.shape)
        counts = [0, 0]
        for part in self._chunks(before, start):
            if residuals is None:
                residual = self._residual(attention, before, part, start)
            else:
                residual = tensor(residuals[part], self.device)
            x = attention.ffn_inputs(residual)
            routes = attention.routes(x)
            output = ffn_output(x, routes, experts)
            after[part] = attention.behind_block(residual, output.view_as(residual)).cpu().numpy()
            if part.stop + start > self._num_fit and (name != "dense" or self._source_is_sparse):
                first = max(0, self._num_fit - start - part.start) * before.shape[1]
                _count_zeros(x, routes, experts, first, counts)
        return counts

    def _chunks(self, stream: np.ndarray, start: int = 0) -> Iterator[slice]:
        """Parts of a stream that begins with a sequence. None has both calibration and watched ones: bits depend on what is
        computed together, and so the result would depend on what watches it.
        """
        num_fit, length = max(0, self._num_fit - start), stream.shape[1]
        yield from chunks(num_fit, length)
        for part in chunks(len(stream) - num_fit, length):
            yield slice(num_fit + part.start, num_fit + part.stop)

    def _before(self, old: Streams, name: str) -> tuple[np.ndarray, int]:
        """A stage's stream before the layer, and which sequence it begins with: all but two hold only watched sequences."""
        start = 0 if name in ("dense", self._result) else self._num_fit
        if (old.folder / f"{name}.npy").is_file():
            return old.open(name), start
        return old.open("dense")[start:], start  # before the first layer they are all the same

    def _residual(self, attention: Attention, stream: np.ndarray, part: slice, start: int) -> torch.Tensor:
        hidden = tensor(stream[part], self.device)
        first = part.start + start
        positions = self._batch["position_ids"][first : first + len(hidden)]
        return attention(hidden, positions.to(self.device))

    def _prepare(self, attention: Attention, dense: list[Expert], old: Streams, new: Streams, work: Streams) -> None:
        """Writes the converted model's stream before the block, and what its outputs should add to the dense block's."""
        before = self._before(old, self._result)[0]
        residuals = work.create("residual", before.shape)
        for part in self._chunks(before):
            residuals[part] = self._residual(attention, before, part, 0).cpu().numpy()
        if not self._needs_dense:
            return
        after, gaps = new.open("dense"), work.create("gap", (self._num_fit, *before.shape[1:]))
        repaired = REFIT_TARGETS[self._settings.refit_target]
        for part in self._chunks(gaps):
            residual = tensor(residuals[part], self.device)
            x = attention.ffn_inputs(residual)
            own = ffn_output(x, attention.routes(x), dense).view_as(residual)
            gap = attention.block_gap(tensor(after[part], self.device), residual, own)
            gaps[part] = (repaired * gap).cpu().numpy()

    def _inputs(self, attention: Attention, work: Streams) -> Iterator[Inputs]:
        assert self._needs_streams, f"{self.method} looks at values although it says that it reads none"
        residuals = work.open("residual")[: self._num_fit]
        gaps = work.open("gap") if self._needs_dense else None
        for part in chunks(*residuals.shape[:2]):
            x = attention.ffn_inputs(tensor(residuals[part], self.device))
            gap = torch.zeros_like(x) if gaps is None else tensor(gaps[part], self.device).flatten(0, 1)
            yield Inputs(x, attention.routes(x), gap, *self._parts(part))

    def _save(
        self,
        layer: int,
        found: Rewritten,
        zeros: dict[str, list[int]],
        attention: Attention,
        attention_masks: Parts,
        mask_record: dict[str, Any],
    ) -> None:
        config, tensors = self._masked_config, {}
        for number, (old, expert) in enumerate(zip(found.stages["dense"], found.stages[self._result], strict=True)):
            gate, up, down = ffn_names(config, layer, number)
            tensors[up], tensors[down] = expert.up, expert.down
            if expert.gate is not old.gate:
                tensors[gate] = expert.gate
        for name, weight in attention.changed.items():
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = weight
        names = mask_names(config, layer)
        for site, parts in (attention_masks | found.masks).items():
            tensors |= {names[site][part]: values for part, values in parts.items()}
        stored = self.method.stored(config, layer, tensors).items()
        stored = {k: in_dtype(k, v, self._dtype).cpu().contiguous() for k, v in stored}
        save_file(stored, self.tensors_of(layer))
        record = {"layer": layer, "zeros": zeros, **mask_record, **found.record}
        write_json(self._record(layer), record)

    def _stages(self, records: list[dict[str, Any]]) -> list[CalibrationStage]:
        streams = self._streams(len(records))
        head = self._reader.head()
        stages = []
        for name in records[0]["zeros"]:
            zero, values = (sum(record["zeros"][name][i] for record in records) for i in (0, 1))
            totals = self._losses(self._before(streams, name), head)
            losses = {source: total / labels if labels else None for source, (total, labels) in totals.items()}
            loss_sum, labels = (sum(column) for column in zip(*totals.values(), strict=True))
            loss = loss_sum / max(labels, 1)
            if not stages:
                check_base_loss(loss, "the source model")
            said = "source" if name == "dense" and self._source_is_sparse else name
            stages.append(CalibrationStage(said, losses, loss, zero / values))
        return stages

    def _losses(
        self, stream: tuple[np.ndarray, int], head: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, tuple[float, int]]:
        hidden, start = stream
        totals, first = {}, self._num_fit
        for source, sequences in self._watched.items():
            total, count = 0.0, 0
            for index in range(first, first + len(sequences)):
                state = tensor(hidden[index - start], self.device)
                logits = head(state)
                labels = self._batch["labels"][index].to(self.device)
                loss = functional.cross_entropy(logits, labels, ignore_index=NO_LOSS, reduction="sum")
                total += float(loss)
                count += int((labels != NO_LOSS).sum())
            totals[source] = total, count
            first += len(sequences)
        return totals


def _count_zeros(x: torch.Tensor, routes: Any, experts: list[Expert], first: int, counts: list[int]) -> None:
    for number, expert in enumerate(experts):
        token, _ = routes.of(number)
        neurons = expert.neurons(x[token[token >= first]])
        counts[0] += int((neurons == 0).sum())
        counts[1] += neurons.numel()


class AttentionValues:
    """The values of the attention's sites, from calibration inputs (`methods.base.LayerValues`)."""

    def __init__(self, calibrator: Calibrator, attention: Attention, behind: list[Expert], streams: Streams) -> None:
        self.experts: list[Expert] = []
        self.device = calibrator.device
        self._calibrator, self._attention, self._behind, self._streams = calibrator, attention, behind, streams

    def values(self, site: str) -> Iterator[SiteValues]:
        if site not in ATTENTION_SITES:
            return self._block().values(site)
        return self._calibrator.attention_values(site, self._attention, self._streams)

    def weights(self, site: str) -> dict[str, list[torch.Tensor]]:
        if site not in ATTENTION_SITES:
            return self._block().weights(site)
        return {name: [self._attention.weight(name)] for name in READERS[site]}

    def output(self, masks: MaskParts, num_tokens: int) -> torch.Tensor:
        return self._calibrator.layer_output(self._attention, self._behind, self._streams, masks, num_tokens)

    def _block(self) -> BlockValues:
        inputs = partial(self._calibrator.inputs_behind, self._attention, self._streams)
        return BlockValues(self._behind, inputs, {})
