"""Models of integers decode with the kernels: the simulated model's values, and its text."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from sparsify.conversion.architecture import sparse_config
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import ModelError
from sparsify.models import SparseModel, family_of
from sparsify.models.integer_linear import IntegerLinear, Sequences, packed
from sparsify.runtime import accelerate
from sparsify.runtime.accelerate import model_bytes
from sparsify.runtime.build import find_compiler
from sparsify.runtime.integer_projections import IntegerForward

MODES = {
    "rrs": {
        "weight_bits": 4,
        "activation_bits": 4,
        "smooth_group": 16,
        "smoothed": ["o_proj", "gate_proj", "down_proj"],
    },
    "w8a8": {"weight_bits": 8, "activation_bits": 8},
    "w4a16": {"weight_bits": 4, "activation_bits": 16},
}


@pytest.fixture(autouse=True, scope="module")
def compiler() -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler")


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projection(bits: int, **settings: object) -> IntegerLinear:
    layer = IntegerLinear(24, 41, weight_bits=bits, bias=True, **settings)
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (41, 24), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    layer.weight_codes.copy_(packed(codes) if bits == 4 else codes)
    layer.weight_scales.copy_(seeded(41).abs() / top)
    assert layer.bias is not None
    layer.bias.data.copy_(seeded(41))
    return layer.eval()


@pytest.mark.parametrize("shape", [(24,), (5, 24), (1, 1, 24), (3, 1, 24), (1, 7, 24), (2, 7, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "settings", [{}, {"activation_bits": 4}, {"activation_bits": 4, "smooth_group": 8, "turned": 12}]
)
def test_a_projection_computes_what_the_simulated_one_does(
    shape: tuple[int, ...], bits: int, settings: dict[str, int]
) -> None:
    layer, x = projection(bits, **settings), seeded(*shape)
    forward = IntegerForward(layer, threads=2)
    assert torch.allclose(forward(x), layer(x), atol=2e-5)
    assert forward(x.bfloat16()).dtype == torch.bfloat16


def test_padding_stays_out_of_runtime_scales() -> None:
    layer, x = projection(4, activation_bits=4, smooth_group=8), seeded(2, 5, 24)
    x[0, :2] *= 100
    layer.sequences = Sequences()
    layer.sequences.padding = torch.tensor([[True, True, False, False, False], [False] * 5])
    assert torch.equal(IntegerForward(layer, None)(x), layer(x))


@pytest.fixture(scope="module", params=MODES)
def model(request: pytest.FixtureRequest, family_stock: dict[str, Path]) -> SparseModel:
    fields = load_sparse(family_stock["qwen2"]).config.to_dict()
    stored = {"method": "rtn", **MODES[request.param], "rotated_heads": True, "kv_bits": 4}
    config = sparse_config(fields | {"quantisation": stored}, "swiglu", "")
    made = family_of(config).model(config)
    torch.manual_seed(0)
    for name, buffer in made.named_buffers():
        if name.endswith("weight_codes"):
            low, high = (0, 256) if buffer.dtype == torch.uint8 else (-127, 128)
            buffer.copy_(torch.randint(low, high, buffer.shape))
        elif name.endswith("weight_scales"):
            buffer.copy_(torch.rand(buffer.shape) * (0.02 if stored["weight_bits"] == 4 else 0.001))
    return made.eval()


@torch.no_grad()
def test_a_model_gives_the_same_logits_and_text(model: SparseModel) -> None:
    ids = torch.randint(3, 2000, (1, 9), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    logits, text = model(input_ids=ids).logits, model.generate(ids, **settings)
    ours = copy.deepcopy(model)
    handle = accelerate(ours)
    assert handle.backend == "integers"
    assert torch.allclose(ours(input_ids=ids).logits, logits, atol=1e-3)
    assert torch.equal(ours.generate(ids, **settings), text)
    size = model_bytes(ours)
    codes = sum(one.weight_codes.nbytes for one in ours.modules() if isinstance(one, IntegerLinear))
    assert size.total > codes
    assert handle.kept_bytes >= codes
    assert handle.reads == []
    handle.reset()
    handle.remove()
    assert torch.equal(ours(input_ids=ids).logits, logits)


def test_what_would_read_less_is_refused(model: SparseModel) -> None:
    for settings in ({"weights": "int4"}, {"dense": True}, {"packed": True}):
        with pytest.raises(ModelError, match=f"integers instead of weights.*given: {next(iter(settings))}"):
            accelerate(model, **settings)
    assert not any("forward" in vars(one) for one in model.modules())
