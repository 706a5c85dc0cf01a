"""An accelerated model says what it said before, whatever is done to it."""

from __future__ import annotations

import copy
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.conversion.sparse_folder import load_sparse, write_config
from sparsify.errors import ModelError
from sparsify.models import FfnActivation
from sparsify.predictors import read_predictors, write_predictors
from sparsify.predictors.format import PredictorInput
from sparsify.runtime import accelerate
from tests.conftest import stock_model
from tests.predictors.untrained import random_predictors
from tests.runtime.blocks import IDS, decoded_logits

KINDS = ("mistral", "mixtral")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _compiled(native: str) -> None:
    """Models here are accelerated by the compiled kernel."""


@pytest.fixture(scope="module")
def folders(stock: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints as an export writes them, with the code that belongs to them."""
    root = tmp_path_factory.mktemp("bundles")
    for kind in KINDS:
        model = load_sparse(stock[kind], "drelu")
        model.save_pretrained(root / kind)
        write_config(model.config, root / kind, model.dtype)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture
def load(folders: dict[str, Path]) -> Callable[[str], Any]:
    return lambda kind: load_sparse(folders[kind])


def generate(model: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(IDS.repeat(3, 1), max_new_tokens=12, min_new_tokens=12, pad_token_id=2, **options)


@kinds
@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 20}])
def test_generate_is_unchanged(kind: str, options: dict, load: Callable) -> None:
    model = load(kind)
    expected, logits = generate(model, **options), decoded_logits(model)
    acceleration = accelerate(model)
    assert torch.equal(generate(model, **options), expected)
    acceleration.reset()
    torch.testing.assert_close(decoded_logits(model), logits, rtol=1e-4, atol=1e-5)
    for reads in acceleration.reads:
        assert reads.tokens == IDS.numel()
        assert 0 < reads.rows.down < reads.rows.up < reads.rows.gate == reads.offered
        experts = 2 if kind == "mixtral" else 1
        assert reads.offered == IDS.numel() * experts * model.config.intermediate_size
        assert reads.bytes_read == reads.rows.total * model.config.hidden_size * 4


STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM
# Before this package is imported: it registers its own classes, which transformers then prefers to the bundle's.
models = [AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval() for folder in sys.argv[1:]]
from sparsify.runtime import accelerate
for model in models:
    assert type(model).__module__.startswith("transformers_modules")
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 2}
    expected = model.generate(torch.arange(3, 15)[None], **options)
    acceleration = accelerate(model)
    assert torch.equal(model.generate(torch.arange(3, 15)[None], **options), expected)
    assert all(reads.tokens == 8 for reads in acceleration.reads)
"""


@pytest.mark.slow
def test_bundles_loaded_by_transformers_alone_are_accelerated(folders: dict[str, Path]) -> None:
    command = [sys.executable, "-c", STRANGER, *map(str, folders.values())]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@kinds
def test_long_prompts_training_and_probes_go_the_dense_way(kind: str, load: Callable) -> None:
    model = load(kind)
    expected = model(IDS).logits
    acceleration = accelerate(model)
    torch.testing.assert_close(model(IDS).logits, expected)
    model(IDS[:, :1]).logits.sum().backward()
    assert all(p.grad is not None for p in model.ffn_blocks()[0].parameters())
    seen = []
    hook = model.ffn_blocks()[0].ffn_activation.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output)
    )
    with torch.no_grad():
        model(IDS[:, :1])
    hook.remove()
    assert seen
    assert [reads.tokens for reads in acceleration.reads] == [0, 1]


@kinds
def test_moved_cast_copied_reloaded_and_saved(kind: str, load: Callable, tmp_path: Path) -> None:
    model = load(kind)
    expected, state = decoded_logits(model), copy.deepcopy(model.state_dict())
    accelerate(model)
    decoded_logits(model)
    for changed in (copy.deepcopy(model), copy.deepcopy(model).double().float()):
        assert decoded_logits(changed).sub(expected).abs().max() < 1e-4
        assert changed.ffn_blocks()[0].forward.tokens > model.ffn_blocks()[0].forward.tokens
    half = copy.deepcopy(model).bfloat16()
    torch.testing.assert_close(decoded_logits(half), decoded_logits(load(kind).bfloat16()), rtol=0.1, atol=0.1)
    model.save_pretrained(tmp_path)
    assert torch.equal(decoded_logits(load_sparse(tmp_path)), decoded_logits(load(kind)))
    doubled = {name: 1.1 * value for name, value in state.items()}
    model.load_state_dict(doubled)
    fresh = load(kind)
    fresh.load_state_dict(doubled)
    torch.testing.assert_close(decoded_logits(model), decoded_logits(fresh), rtol=1e-4, atol=1e-5)


def decode_in_child(model: Any, queue: Any) -> None:
    queue.put(decoded_logits(model).tolist())


@kinds
def test_a_forked_child_decodes_the_same(kind: str, load: Callable) -> None:
    model = load(kind)
    accelerate(model, threads=2)
    expected = decoded_logits(model)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=decode_in_child, args=(model, queue), daemon=True)
    child.start()
    assert torch.equal(torch.tensor(queue.get(timeout=60)), expected)


@pytest.mark.slow
def test_a_spawned_child_decodes_the_same(load: Callable) -> None:
    model = load("mistral")
    accelerate(model, threads=2)
    expected = decoded_logits(model)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=decode_in_child, args=(model, queue), daemon=True)
    child.start()
    assert torch.equal(torch.tensor(queue.get(timeout=120)), expected)


@kinds
def test_removing_gives_the_model_back(kind: str, load: Callable) -> None:
    model = load(kind)
    expected = decoded_logits(model)
    accelerate(model)
    acceleration = accelerate(model)  # twice is once
    acceleration.remove()
    assert not any("forward" in vars(block) for block in model.ffn_blocks())
    torch.testing.assert_close(decoded_logits(model), expected)


class MaskedActivation(FfnActivation):
    """The activation with unpredicted neurons set to zero: what a predictor means, by torch's operators."""

    mask: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs) * self.mask


@pytest.mark.parametrize("seen", ["normed", "residual"])
def test_predictors_mask_neurons(seen: PredictorInput, load: Callable, tmp_path: Path) -> None:
    model, masked = load("mistral"), load("mistral")
    write_predictors(random_predictors(model, 1.0, seen, rank=8), tmp_path / "predictors")
    predictors = read_predictors(tmp_path / "predictors")

    def mask(layer: int) -> Callable:
        a, b = predictors.blocks[layer, 0]

        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            activation.mask = ((inputs[0] @ a.T).relu() @ b.T > 1.0).float()

        activation = MaskedActivation("drelu")
        masked.model.layers[layer].mlp.ffn_activation = activation
        return hook

    for layer, parts in enumerate(masked.model.layers):
        place = parts.mlp if seen == "normed" else parts.post_attention_layernorm
        place.register_forward_pre_hook(mask(layer))
    acceleration = accelerate(model, predictors=predictors.for_decoding(model, "predictors"))
    torch.testing.assert_close(decoded_logits(model), decoded_logits(masked), rtol=1e-4, atol=1e-5)
    assert all(reads.rows.gate < reads.offered for reads in acceleration.reads)


@kinds
def test_predictors_that_want_all_change_nothing(kind: str, load: Callable) -> None:
    model = load(kind)
    expected = decoded_logits(model)
    inputs: tuple[PredictorInput, ...] = ("normed", "residual")
    for seen in inputs:
        predictors = random_predictors(model, -1e9, seen, rank=8)
        accelerate(model, predictors=predictors.for_decoding(model, "predictors"))
        torch.testing.assert_close(decoded_logits(model), expected, rtol=1e-4, atol=1e-5)
        decoded_logits(model.bfloat16())  # predictors follow a model that is cast
        model = load(kind)


def test_predictors_of_another_model_are_refused(load: Callable) -> None:
    predictors = random_predictors(load("mixtral"), 0.5)
    with pytest.raises(ModelError, match="mine belongs to another model"):
        predictors.for_decoding(load("mistral"), "mine")
    retrained = load("mixtral")
    retrained.ffn_blocks()[0].gate_up_proj.data.mul_(1.5)
    with pytest.raises(ModelError, match="mine was trained for other weights"):
        predictors.for_decoding(retrained, "mine")


def test_models_with_nothing_to_skip_are_refused(stock: dict[str, Path], load: Callable) -> None:
    with pytest.raises(ModelError, match="has no blocks with a named activation"):
        accelerate(stock_model("mistral"))
    with pytest.raises(ModelError, match="swiglu makes no zeros"):
        accelerate(load_sparse(stock["mistral"]))
    biased = load("mistral")
    biased.model.layers[1].mlp.up_proj = nn.Linear(32, 64)
    with pytest.raises(ModelError, match=r"up_proj of layer 1 is Linear.*cannot read"):
        accelerate(biased)
