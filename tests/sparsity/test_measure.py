from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sparsify.errors import RunError
from sparsify.models import SparseModel
from sparsify.sparsity import SparsityProbe, measure

BuildModel = Callable[..., SparseModel]


def batch_of(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    labels = input_ids.roll(-1, dims=1)
    labels[:, -1] = -100
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return {"input_ids": input_ids, "position_ids": positions, "labels": labels}


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_measures_zeros_and_loss_in_one_pass(build_model: BuildModel, input_ids: torch.Tensor, kind: str) -> None:
    model = build_model(kind).train()
    scores: list[tuple[float, int]] = []
    batches = [batch_of(rows) for rows in input_ids.split(3)]
    report, statistics = measure(
        model, batches, name="tiny", text="noise", on_batch=lambda *score: scores.append(score)
    )
    assert model.training

    model.eval()
    with torch.no_grad(), SparsityProbe(model) as probe:
        expected_loss = float(model(input_ids, labels=input_ids).loss)
    expected = probe.statistics()
    assert report.loss == pytest.approx(expected_loss, rel=1e-5)
    assert report.num_labels == input_ids.numel() - len(input_ids)
    assert report.num_tokens == input_ids.numel()
    losses, labels = map(sum, zip(*scores, strict=True))
    assert len(scores) == 2
    assert (labels, losses / labels) == (report.num_labels, pytest.approx(report.loss))
    assert report.product_zeros == expected.zero_share() == statistics.zero_share()
    assert [row.product_zeros for row in report.layer_rows] == expected.layer_zero_shares()
    assert report.dtype == "float32"
    assert "float32" in report.definitions["Exact zero"]


def test_packed_documents_are_independent(build_model: BuildModel, input_ids: torch.Tensor) -> None:
    model = build_model()
    separate, _ = measure(model, [batch_of(input_ids)], name="tiny", text="apart")
    packed_batch = {key: value.reshape(1, -1) for key, value in batch_of(input_ids).items()}
    packed, _ = measure(model, [packed_batch], name="tiny", text="packed")
    assert packed.loss == pytest.approx(separate.loss, rel=1e-5)


def test_rows_of_experts_add_up_to_their_layer(build_model: BuildModel, input_ids: torch.Tensor) -> None:
    report, _ = measure(build_model("mixtral"), [batch_of(input_ids)], name="tiny", text="noise")
    assert report.num_experts == 4
    assert report.experts_per_token == 2
    for layer in report.layer_rows:
        experts = [row for row in report.expert_rows if row.layer == layer.layer]
        assert [row.expert for row in experts] == [0, 1, 2, 3]
        assert sum(row.num_tokens for row in experts) == layer.num_tokens == 2 * report.num_tokens
        assert sum(row.dead_neurons for row in experts) == layer.dead_neurons
        weighted = sum(row.num_tokens * (row.product_zeros or 0) for row in experts)
        assert layer.product_zeros == pytest.approx(weighted / layer.num_tokens)


def test_text_without_labels_is_refused(build_model: BuildModel, input_ids: torch.Tensor) -> None:
    batch = batch_of(input_ids) | {"labels": torch.full_like(input_ids, -100)}
    for batches in ([], [batch]):
        with pytest.raises(RunError, match=r"held-out notes.*no labels"):
            measure(build_model(), batches, name="tiny", text="held-out notes")


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_sources_add_up_to_the_whole(build_model: BuildModel, input_ids: torch.Tensor, kind: str) -> None:
    model = build_model(kind)
    batches = [batch_of(rows) for rows in input_ids.split(1)]
    names = ["code", "prose", "code", "prose"]
    whole, _ = measure(model, batches, name="tiny", text="noise", sources=names)
    assert [row.source for row in whole.sources] == ["code", "prose"]
    alone, _ = measure(model, [batches[0], batches[2]], name="tiny", text="code")
    assert whole.sources[0].product_zeros == pytest.approx(alone.product_zeros, abs=1e-12)
    assert whole.sources[0].layers == pytest.approx([r.product_zeros for r in alone.layer_rows])
    assert whole.sources[0].loss == pytest.approx(alone.loss)
    assert sum(row.num_tokens for row in whole.sources) == whole.num_tokens
    mean = sum(row.num_tokens * row.product_zeros for row in whole.sources) / whole.num_tokens
    assert whole.product_zeros == pytest.approx(mean)
    assert sum(row.num_tokens for row in whole.positions) == whole.num_tokens
    assert [row.first for row in whole.positions] == [0, 1, 2, 4, 8]
    assert whole.engine.chunks[0].consecutive == pytest.approx(
        1 - whole.product_zeros if kind == "mistral" else (1 - whole.product_zeros) / 2
    )
    assert whole.engine.chunks[0].unrelated == pytest.approx(whole.engine.chunks[0].consecutive)
