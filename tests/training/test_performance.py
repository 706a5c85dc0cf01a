"""What a step's line says of its speed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from torch.utils.flop_counter import FlopCounterMode

from sparsify.plan.cost import training_flops_per_token
from sparsify.plan.hardware import GPUS, known_gpu
from sparsify.plan.parameters import Architecture, count_parameters
from sparsify.training.performance import Performance
from sparsify.training.telemetry import progress_line
from sparsify.training.tracker import heat_map
from tests.conftest import stock_model

SEQUENCE_TOKENS = 64


@pytest.mark.parametrize("kind", ["mistral", "mistral_tied"])
def test_counted_operations_are_those_that_the_model_does(kind: str) -> None:
    model = stock_model(kind).train()
    model.set_attn_implementation("eager")  # the counter does not know the fused one of the CPU
    tokens = torch.randint(2048, (2, SEQUENCE_TOKENS))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.float().logsumexp(-1).sum().backward()
    architecture = Architecture.of(model.config.to_dict(), None, 1)
    counted = training_flops_per_token(architecture, count_parameters(architecture), SEQUENCE_TOKENS)
    # Norms, which are counted as they multiply too, are what the counter leaves out.
    assert counted * tokens.numel() == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_a_mixture_counts_only_the_experts_that_a_token_meets() -> None:
    dense = Architecture.of(stock_model("mistral").config.to_dict(), None, 1)
    fields = stock_model("mixtral").config.to_dict()
    one, two = (Architecture.of(fields | {"num_experts_per_tok": n}, None, 1) for n in (1, 2))
    flops = [training_flops_per_token(a, count_parameters(a), SEQUENCE_TOKENS) for a in (dense, one, two)]
    expert = 6 * dense.num_hidden_layers * 3 * dense.hidden_size * dense.intermediate_size
    router = 6 * dense.num_hidden_layers * 4 * dense.hidden_size
    assert flops[1] - flops[0] == router
    assert flops[2] - flops[1] == expert


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24gb"),
        ("Some other device", None),
    ],
)
def test_devices_are_known_by_what_their_driver_calls_them(device: str, gpu: str | None) -> None:
    assert known_gpu(device) == (None if gpu is None else GPUS[gpu])


def test_a_line_gives_recent_speed_and_fits_beside_the_bar() -> None:
    performance = Performance(
        stock_model("mistral"), SEQUENCE_TOKENS, num_devices=2, precision="bf16", left_tokens=3000
    )
    performance.step(1000, seconds=2.0, data_seconds=1.0)
    values = performance.step(1000, seconds=2.0, data_seconds=0.0)
    assert values["tokens_per_second"] == 500
    assert values["data_share"] == 0.25
    assert values["mfu"] is None  # no GPU is known here, or none is at hand
    record = {"tokens": 2000, "loss": 12.345, **values}
    record |= {"tokens_per_second": 1_234_567.8, "left_seconds": 400_000, "memory_bytes": 79.9e9}
    line = progress_line(record, 150_000_000_000, 0.5)
    assert "loss 12.345  zeros 50.0%  1.235M tokens/s" in line
    assert line.endswith("data 25%  79.9 GB  111:06:40 left")
    assert cell_len(line) <= 109  # 120 columns with the bar


def test_the_heat_map_has_layers_as_rows_and_validations_as_columns() -> None:
    picture = heat_map([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])
    cell = picture.shape[0] // 3
    assert picture.shape == (3 * cell, 2 * cell)
    assert np.array_equal(picture[::cell, ::cell], [[255, 0], [128, 128], [0, 255]])
