"""Makes a model's decoding read only the weights of neurons that fire. `generate()`, its cache and its sampling stay as they are.

A block's own forward is replaced by one that calls the kernels for a few tokens, and the class's forward for all else: long
prompts, training, blocks whose activation is being watched. Nothing is copied: weights keep their names, shapes and values, and
those of down_proj get another order in memory (a neuron's column becomes contiguous), which moving and casting keep. Only int8
and int4 blocks are copies, beside weights that stay as they are.

How many bytes of weights a token's decoding reads when everything is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from torch import nn

from sparsify.errors import ModelError
from sparsify.models.activations import ACTIVATIONS, activation_names
from sparsify.models.masking import experts_per_token, is_fused, num_experts
from sparsify.runtime.ffn import backend_of
from sparsify.runtime.forwards import BlockForward, ExpertsForward, MlpForward, Options
from sparsify.runtime.quantised import BlockFormat
from sparsify.runtime.weights import LayerPredictors, RowsRead

WEIGHT_FORMATS = ("stored", *get_args(BlockFormat))
"""How decoding may read the feed-forward weights."""


@dataclass
class BlockReads:
    """What decoding has read of one layer since `reset`.

    Args:
        tokens: Tokens that went through the block, or through its experts together.
        bytes_read: Bytes of weights read, predictors included.
        rows: Rows read, and offered.
    """

    tokens: int = 0
    bytes_read: int = 0
    rows: RowsRead = field(default_factory=RowsRead)

    @property
    def offered(self) -> int:
        """Rows of one projection that could have been read."""
        return self.rows.offered

    @property
    def touched_share(self) -> float:
        """Share of the rows of all three projections that were read."""
        return self.rows.total / max(3 * self.offered, 1)


class Acceleration:
    """A model whose decoding was accelerated: what it reads, and the way back.

    Args:
        model: The accelerated model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def forwards(self) -> list[BlockForward]:
        """The forward of every layer's block, in order."""
        return [vars(block)["forward"] for block in self._model.ffn_blocks()]

    @property
    def reads(self) -> list[BlockReads]:
        """What was read of every layer since `reset`. On a GPU this waits for what was started there."""
        return [BlockReads(one.tokens, one.bytes_read, one.rows) for one in self.forwards]

    @property
    def backend(self) -> str:
        """`triton` where those kernels are used, `native` where the C++ kernel is, else `torch`."""
        in_blocks = any(one.kept is not None for one in self.forwards)
        return backend_of(next(self._model.parameters()), in_blocks=in_blocks)

    @property
    def kept_bytes(self) -> int:
        """Memory that int8 or int4 blocks take beside the stored weights."""
        return sum(one.kept.num_bytes for one in self.forwards if one.kept is not None)

    def reset(self) -> None:
        """Forgets what was read."""
        for forward in self.forwards:
            forward.reset()

    def remove(self) -> None:
        """Gives the model its own forward back. The order of down_proj in memory stays."""
        for forward in self.forwards:
            forward.remove()


def accelerate(
    model: Any,
    *,
    weights: str = "stored",
    predictors: LayerPredictors | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
) -> Acceleration:
    """Makes the decoding of a sparse model read only what counts.

    Masks that the model stores are applied on every path. Those on `gate` and `inter` save rows of up and down projections; those on
    the inputs of projections save nothing here, as the kernels read whole rows.

    Args:
        model: A Sparse Mistral or Sparse Mixtral: an exported bundle as transformers loads it, or one of this package.
        weights: One of WEIGHT_FORMATS. `stored` reads the model's own weights; `int8` and `int4` round them into blocks of 32 for decoding, which
            takes 8.5 or 4.5 bits a weight beside them. When the weights change, or are moved or cast, the next step makes
            the blocks anew; only what is written through `.data` is not seen.
        predictors: Of this model: `read_predictors(folder).for_decoding(model)`. Without, decoding is exact.
        max_tokens: Most tokens of a step, over the whole batch, that go through the kernels; more go the dense way. Unless
            given, 8, or 4 where a CPU reads weights as stored in bf16: torch's dense product is the faster there from about six
            tokens on.
        threads: Of the C++ kernels; torch's own number unless given.

    Returns:
        What counts the reads. The model itself is changed in place.

    Raises:
        ModelError: If the model has no blocks of ours, or has no zeros that could be skipped, or int8 or int4 blocks are asked for elsewhere than on a CPU.
    """
    check_acceleratable(model)
    blocks = block_format(weights)
    if blocks is not None:
        _check_device(model, weights)
    for layer, block in enumerate(model.ffn_blocks()):
        if "forward" in vars(block):
            vars(block)["forward"].remove()
        own = None if predictors is None else predictors.layers[layer]
        options = Options(max_tokens, threads, own, blocks)
        kind = ExpertsForward if is_fused(block) else MlpForward
        block.forward = kind(block, options)
        block.forward.prepare()
        if predictors is not None and predictors.input == "residual":
            block.forward.watch(model.model.layers[layer].post_attention_layernorm)
    return Acceleration(model)


def block_format(weights: str) -> BlockFormat | None:
    """The blocks that a choice of WEIGHT_FORMATS means; None for weights as they are stored.

    Raises:
        ModelError: If it is none of them.
    """
    if weights not in WEIGHT_FORMATS:
        raise ModelError(
            f"Weights cannot be read as {weights!r}.", allowed=f"{', '.join(WEIGHT_FORMATS)}."
        )
    return next((one for one in get_args(BlockFormat) if one == weights), None)


def _check_device(model: Any, weights: str) -> None:
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ModelError(
            f"The model is on {device}, and {weights} blocks are read on a CPU alone.",
            next_step="Move the model to the CPU, or leave weights= out.",
        )


def check_acceleratable(model: Any) -> None:
    """Refuses a model that the kernels cannot serve.

    Raises:
        ModelError: With the reason.
    """
    if not hasattr(model, "ffn_blocks"):
        raise ModelError(
            f"{type(model).__name__} has no blocks with a named activation.",
            allowed="A bundle that `sparsify export` wrote, or a folder that `sparsify convert` wrote.",
            next_step="Convert the checkpoint first: sparsify convert MODEL --activation drelu --to DIR",
        )
    for layer, block in enumerate(model.ffn_blocks()):
        activation = block.ffn_activation
        if activation.name not in ACTIVATIONS:
            raise ModelError(
                f"Layer {layer} has the activation {activation.name!r}, which no kernel knows.",
                allowed=f"Activations: {', '.join(ACTIVATIONS)}.",
            )
        # Bundles from before there were other masks have `threshold` alone.
        masks = [getattr(activation, name, None) for name in ("threshold", "gate_mask")]
        row = ACTIVATIONS[activation.name]
        if not row.makes_zeros and masks == [None, None]:
            sparse = activation_names(lambda row: row.makes_zeros)
            stored = getattr(model.config, "sparsification", None) or {"sites": {}}
            elsewhere = f" Its masks on {', '.join(stored['sites'])} save no rows in these kernels."
            raise ModelError(
                f"The model is dense: {row.name} makes no zeros, so there is nothing to skip."
                + (elsewhere if stored["sites"] else ""),
                allowed=f"{', '.join(sparse)}, or a mask on `inter` or `gate`.",
                next_step="Convert it and train it first: sparsify train RECIPE",
            )
        for name, part in block.named_children():
            if name.endswith("_proj") and (type(part) is not nn.Linear or part.bias is not None):
                raise ModelError(
                    f"{name} of layer {layer} is {part}, which the kernels cannot read.",
                    allowed="Plain linear layers without biases in fp32, bf16 or fp16.",
                    next_step="Merge adapters into the weights, or load the model without quantisation.",
                )


__all__ = [
    "WEIGHT_FORMATS",
    "Acceleration",
    "BlockReads",
    "accelerate",
    "block_format",
    "check_acceleratable",
]


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of weights by where they are read.

    Args:
        ffn_per_token: Feed-forward blocks; of a mixture, the experts that one token is sent to.
        other: Attention, norms, routers and the output layer. Of the input embedding a token reads one row, which is left out.
    """

    ffn_per_token: float
    other: int

    @property
    def total(self) -> float:
        """What a dense token reads."""
        return self.ffn_per_token + self.other


def model_bytes(model: Any) -> ModelBytes:
    """Counts a Sparse Mistral's or Sparse Mixtral's weights."""
    ffn = sum(_bytes(block) for block in model.ffn_blocks())
    embedding = model.get_input_embeddings()
    tied = model.get_output_embeddings().weight is embedding.weight
    other = _bytes(model) - ffn - (0 if tied else _bytes(embedding))
    config = model.config
    experts = num_experts(config)
    return ModelBytes(ffn * experts_per_token(config) / experts, other)


def _bytes(module: Any) -> int:
    return sum(one.numel() * one.element_size() for one in module.parameters())
