"""What a report says of routers of groups: planted scores, density, and every form of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sparsify.models import FAMILIES, SparseMistralConfig, SparseMixtralConfig, SparseModel
from sparsify.sparsity import measure, write_report
from sparsify.sparsity.report import report_summary
from tests.sparsity.conftest import SHAPE
from tests.sparsity.test_masked_inputs import batch_of

GATES = ((0.9, 0.2, 0.45, 0.7), (0.3, 0.1, 0.2, 0.4), (0.65, 0.8, 0.9, 0.95))
"""sigmoid(score) of every token's groups, by layer: two, none and four of them are on."""


def planted_model(kind: str) -> SparseModel:
    neurons = SHAPE["intermediate_size"]
    stored = {"method": "lte", "sites": {"group": {"rule": "router", "group_size": neurons // 4}}}
    fields = SHAPE | {"sparsification": stored, "num_hidden_layers": 3}
    config = (
        SparseMistralConfig(**fields)
        if kind == "mistral"
        else SparseMixtralConfig(**fields, num_local_experts=4, num_experts_per_tok=2)
    )
    torch.manual_seed(0)
    model = FAMILIES[config.model_type].model(config).eval()
    for block, gates in zip(model.ffn_blocks(), GATES, strict=True):
        block.group_router.threshold.fill_(0.5)
        logits = torch.tensor([math.log(gate / (1 - gate)) for gate in gates])
        block.group_router.bias.data.copy_(logits.expand_as(block.group_router.bias))
    return model


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_the_planted_scores_are_in_every_form_of_the_report(kind: str, input_ids: torch.Tensor, tmp_path: Path) -> None:
    model = planted_model(kind)
    report, statistics = measure(model, [batch_of(input_ids)], name="planted", text="noise")
    write_report(report, statistics, tmp_path)
    said = json.loads((tmp_path / "report.json").read_text())
    assert [row["active"] for row in said["routers"]] == [0.5, 0.0, 1.0]
    assert [row["undecided"] for row in said["routers"]] == [0.25, 0.25, 0.0]
    assert [row["empty_tokens"] for row in said["routers"]] == [0.0, 1.0, 0.0]
    assert said["routers"][0]["gates"][4] == said["routers"][0]["gates"][9] == 0.25  # 0.2 and 0.45
    assert sum(said["routers"][2]["gates"]) == pytest.approx(1.0)
    assert said["site_zeros"] == {"group": pytest.approx(0.5)}
    assert [row["product_zeros"] for row in said["layers"] if row["expert"] is None] == pytest.approx([0.5, 1.0, 0.0])
    # Attention is read whole; of the block half in the mean, and the routers.
    hidden, neurons = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    layer = model.model.layers[0].self_attn
    attention = sum(getattr(layer, f"{name}_proj").weight.numel() for name in "qkvo")
    chosen = 2 if kind == "mixtral" else 1
    block = chosen * 3 * hidden * neurons
    read = attention + 0.5 * block + chosen * 4 * hidden
    assert report.weight_density == pytest.approx(read / (attention + block))
    assert "Scores of routers" in (tmp_path / "index.html").read_text()
    assert (tmp_path / "routers.png").is_file()
    console = Console(width=160, record=True)
    console.print(report_summary(report, tmp_path))
    assert "tokens without a group" in console.export_text()
