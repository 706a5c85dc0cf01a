"""An evaluation says what the masked model really does, chooses by the limit on the loss, and catches what saves nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsify.cli import main
from sparsify.commands.predictors import evaluate, train
from sparsify.conversion.sparse_folder import write_config
from sparsify.conversion.tokenizer import copy_tokenizer
from sparsify.errors import ExportError
from sparsify.models import SparseModel
from sparsify.predictors import BlockPredictor, Predictors, read_predictors, write_predictors
from sparsify.predictors.engines import as_held
from sparsify.predictors.format import PredictorInput
from sparsify.predictors.quality import evaluate_predictors
from sparsify.predictors.schema import PredictorEvaluation
from sparsify.predictors.trainer import Settings, train_predictors
from tests.conftest import TOKENIZER, stock_model
from tests.predictors.conftest import random_batches, sparse_model

BATCHES = random_batches(3, seed=4)


@pytest.fixture(scope="module", autouse=True)
def _labels_that_the_model_expects(mistral: SparseModel) -> None:
    """Random ones are so far from what it says that masking could lower the loss."""
    for batch in BATCHES:
        with torch.no_grad():
            batch["labels"] = mistral(batch["input_ids"]).logits.argmax(-1)


@pytest.fixture(scope="module", params=["residual", "normed"])
def predictors(
    request: pytest.FixtureRequest, mistral: SparseModel, tmp_path_factory: pytest.TempPathFactory
) -> Predictors:
    return trained(mistral, request.param, tmp_path_factory.mktemp("train") / "state")


def trained(model: SparseModel, kind: PredictorInput, state: Path) -> Predictors:
    settings = Settings(kind, wanted_recall=0.95, budget_share=0.5, ranks=(12,), passes=4)
    train_on, validation = random_batches(40, seed=2), random_batches(4, seed=3)
    return train_predictors(model, train_on, validation, settings, text="random", state_path=state)


def evaluate_at(
    model: SparseModel, predictors: Predictors, limit: float, *thresholds: float, engine: str = "sparsify"
) -> PredictorEvaluation:
    return evaluate_predictors(
        model,
        predictors,
        BATCHES,
        name="tiny",
        folder="predictors",
        text="random",
        max_loss_rise=limit,
        thresholds=thresholds,
        engine=engine,
    )


@torch.no_grad()
def by_hand(model: SparseModel, predictors: Predictors, threshold: float) -> tuple[float, float]:
    """Loss and recall of the masked model, with the blocks written out."""
    loss = labels = fired_sum = hit_sum = 0
    for batch in BATCHES:
        x = model.model.embed_tokens(batch["input_ids"])
        rope = model.model.rotary_emb(x, batch["position_ids"])
        for index, layer in enumerate(model.model.layers):
            attended, _ = layer.self_attn(layer.input_layernorm(x), rope, attention_mask=None)
            residual = x + attended
            normed = layer.post_attention_layernorm(residual)
            A, B = predictors.blocks[index, 0]
            z = normed if predictors.facts.input == "normed" else residual
            on = torch.relu(z @ A.T) @ B.T > threshold
            gate, up = layer.mlp.gate_proj(normed), layer.mlp.up_proj(normed)
            h = torch.relu(gate) * torch.relu(up)
            fires = layer.mlp.ffn_activation(gate, up) != 0
            fired_sum += int(fires.sum())
            hit_sum += int((fires & on).sum())
            x = residual + layer.mlp.down_proj(h * on)
        logits = model.lm_head(model.model.norm(x)).flatten(0, 1)
        loss += float(nn.functional.cross_entropy(logits, batch["labels"].flatten(), reduction="sum").double())
        labels += batch["labels"].numel()
    return loss / labels, hit_sum / fired_sum


def test_a_point_is_what_the_masked_blocks_give(mistral: SparseModel, predictors: Predictors) -> None:
    for threshold in (0.0, 0.7):
        loss, recall = by_hand(mistral, predictors, threshold)
        (point,) = evaluate_at(mistral, predictors, 1.0, threshold).points
        assert point.loss == pytest.approx(loss, rel=1e-5)
        assert point.recall == pytest.approx(recall, abs=1e-4)


SITES = {"inter": {"per": "channel"}, "gate": {"per": "layer"}}


@pytest.fixture(scope="module", params=["inter", "gate"])
def thresholded(request: pytest.FixtureRequest) -> SparseModel:
    """A model whose stored thresholds remove a third of the neurons that would fire."""
    stored = {"method": "thresholds", "sites": {request.param: SITES[request.param]}}
    model = sparse_model("mistral", sparsification=stored)
    for block in model.ffn_blocks():
        mask = block.ffn_activation if request.param == "inter" else block.ffn_activation.gate_mask
        mask.threshold.fill_(0.4 if request.param == "inter" else 0.5)
    return model


def test_an_engine_without_thresholds_is_measured_without_them(thresholded: SparseModel, tmp_path: Path) -> None:
    predictors = as_held(trained(thresholded, "residual", tmp_path / "state"), thresholded, "powerinfer")
    loss, recall = by_hand(thresholded, predictors, 0.0)
    evaluation = evaluate_at(thresholded, predictors, 10.0, 0.0, engine="powerinfer")
    own = evaluate_at(thresholded, predictors, 10.0, 0.0)
    (point,), (own_point,) = evaluation.points, own.points
    assert point.loss == pytest.approx(loss, rel=1e-5)
    assert point.recall == pytest.approx(recall, abs=1e-4), "of the neurons that fire in the model as trained"
    assert abs(own_point.loss - loss) > 1e-4, "the thresholds do nothing, so nothing was tested"
    assert evaluation.references[0].loss == own.references[0].loss, "the model as trained keeps its thresholds"
    assert point.loss_rise == pytest.approx(loss - own.references[0].loss, abs=1e-5)
    assert (evaluation.dropped_thresholds, own.dropped_thresholds) == (True, False)
    assert "without the thresholds that the model stores" in evaluation.verdict
    assert evaluate_at(thresholded, predictors, 10.0, 0.0) == own, "the thresholds are back"


def test_predictors_need_not_beat_a_kernel_that_the_engine_does_not_have(
    mistral: SparseModel, predictors: Predictors
) -> None:
    """Between gate first and dense, a threshold saves bytes in PowerInfer and none here."""
    own = evaluate_at(mistral, predictors, 10.0, 0.0)
    gate_first = own.references[1].ffn_bytes
    padded = {
        block: BlockPredictor(torch.cat([A] * 3), torch.cat([B] * 3, dim=1) / 3)
        for block, (A, B) in predictors.blocks.items()
    }
    large = predictors._replace(blocks=padded)
    own, theirs = (evaluate_at(mistral, large, 10.0, 0.0, engine=engine) for engine in ("sparsify", "powerinfer"))
    assert gate_first < theirs.points[0].ffn_bytes < 1
    assert "gate first reads" in own.points[0].refusal
    assert (own.chosen, theirs.chosen) == (None, 0.0)
    assert not any("gate first" in cost.name for cost in theirs.references)
    everything = evaluate_at(
        mistral, predictors, 10.0, *([] if predictors.facts.input == "normed" else [-1e9]), engine="powerinfer"
    )
    if predictors.facts.input == "residual":
        assert "switch everything on" in everything.verdict
    else:
        assert [point.threshold for point in everything.points] == [0.0], "folding is exact at 0 alone"


def test_the_cheapest_threshold_within_the_limit_is_chosen(mistral: SparseModel, predictors: Predictors) -> None:
    loose = evaluate_at(mistral, predictors, 1.0)
    strict = evaluate_at(mistral, predictors, sorted(p.loss_rise for p in loose.points)[4])
    for evaluation in (loose, strict):
        usable = [point for point in evaluation.points if not point.refusal]
        chosen = evaluation.chosen_point
        assert chosen is not None
        assert chosen.loss_rise <= evaluation.max_loss_rise
        assert chosen.ffn_bytes == min(point.ffn_bytes for point in usable)
        assert chosen.ffn_bytes < evaluation.references[1].ffn_bytes
        assert chosen.ffn_speedup == pytest.approx(1 / chosen.ffn_bytes)
    assert strict.chosen is not None
    assert loose.chosen is not None
    assert strict.chosen < loose.chosen
    dense = loose.references[0]
    assert (dense.ffn_bytes, dense.model_speedup) == (1.0, 1.0)


def test_routers_of_groups_stand_beside_the_predictors(tmp_path: Path) -> None:
    """What a predictor has to beat there is a model that chooses its groups itself: it misses nothing and reads too much."""
    size = 8
    stored = {"method": "lte", "sites": {"group": {"rule": "router", "group_size": size}}}
    model = sparse_model("mistral", sparsification=stored)
    generator = torch.Generator().manual_seed(7)
    for block in model.ffn_blocks():
        block.group_router.threshold.fill_(0.5)
        for parameter in block.group_router.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    kept = fired = fired_off = values = 0

    @torch.no_grad()
    def count(block: nn.Module, args: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        nonlocal kept, fired, fired_off, values
        x = args[0].flatten(0, -2)
        on = block.group_router.kept(block.group_router(x)).repeat_interleave(size, -1)
        fires = block.ffn_activation(block.gate_proj(x), block.up_proj(x)) != 0
        kept, fired = kept + int(on.sum()), fired + int((fires & on).sum())
        fired_off, values = fired_off + int((fires & ~on).sum()), values + on.numel()

    hooks = [block.register_forward_hook(count) for block in model.ffn_blocks()]
    with torch.no_grad():
        for batch in BATCHES:
            model(batch["input_ids"])
    for hook in hooks:
        hook.remove()
    assert fired
    assert fired_off, "the routers switch nothing off that would fire, so nothing was tested"
    predictors = trained(model, "normed", tmp_path / "state")
    evaluation = evaluate_at(model, predictors, 10.0, 0.0, -1e9)
    routers, everything = evaluation.references[1], evaluation.points[0]
    assert "routers" in routers.name
    assert routers.loss == evaluation.references[0].loss
    assert (routers.recall, routers.precision) == (1.0, pytest.approx(fired / kept, rel=1e-4))
    assert routers.on_share == pytest.approx(kept / values, rel=1e-4)
    # Gate rows of kept groups, up rows and down columns of what fires; of every group a row of 32 weights, and a bias.
    assert routers.ffn_bytes == pytest.approx((kept + 2 * fired) / values / 3 + 33 / 32 / (3 * size), rel=1e-4)
    assert everything.recall == 1.0
    assert "what its own routers keep reads" in everything.refusal


def test_predictors_that_switch_everything_on_are_caught(mistral: SparseModel, predictors: Predictors) -> None:
    evaluation = evaluate_at(mistral, predictors, 1.0, -1e9)
    (point,) = evaluation.points
    assert (point.recall, point.on_share, point.loss_rise) == (1.0, 1.0, 0.0)
    assert evaluation.chosen is None
    assert "switch everything on" in evaluation.verdict


def test_predictors_that_know_nothing_are_caught(mistral: SparseModel, predictors: Predictors) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = {
        block: BlockPredictor(*(torch.randn(m.shape, generator=generator) for m in matrices))
        for block, matrices in predictors.blocks.items()
    }
    evaluation = evaluate_at(mistral, predictors._replace(blocks=noise), 10.0)
    assert evaluation.chosen is None
    assert all((point.recall or 0) < point.static_recall or point.ffn_bytes > 0.6 for point in evaluation.points)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dReLU model of 32 hidden units with a tokenizer, and a text."""
    from sparsify.conversion.sparse_folder import load_sparse

    root = tmp_path_factory.mktemp("model")
    stock_model("mistral").save_pretrained(root / "stock")
    copy_tokenizer(TOKENIZER, root / "stock")
    model = load_sparse(root / "stock", "drelu")
    model.save_pretrained(root / "model")
    write_config(model.config, root / "model", model.dtype)
    copy_tokenizer(TOKENIZER, root / "model")
    words = [f"Note {i}: word{i % 7} value{i % 11} and {i * i}." for i in range(400)]
    (root / "text.txt").write_text("\n".join(words))
    return root


def test_the_verbs_write_predictors_with_the_chosen_threshold(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, text, to = str(folder / "model"), str(folder / "text.txt"), folder / "predictors"
    settings = Settings(wanted_recall=0.9, budget_share=0.3, ranks=(8,), passes=3)
    with caplog.at_level("INFO", logger="sparsify"):
        train(model, text, 4096, to, settings, lambda _: None)
    first, training = [record.getMessage() for record in caplog.records][:2]
    assert "PowerInfer does not support this model" in first
    assert "intermediate_size is" in first
    assert "Training predictors" in training, "the warning comes before the training"
    assert sorted(path.name for path in folder.glob(".*")) == []
    assert "were not evaluated" in read_predictors(to).facts.open_question("sparsify")
    evaluation, page = evaluate(model, to, text, 512, 0.5, [], "sparsify", lambda _: None)
    assert evaluation.chosen is not None
    facts = read_predictors(to).facts
    assert (facts.threshold, facts.evaluations["sparsify"].threshold) == (evaluation.chosen, evaluation.chosen)
    assert not facts.open_question("sparsify")
    assert {path.name for path in page.iterdir()} == {
        "evaluation.json",
        "evaluation.csv",
        "index.html",
        "cost.png",
        "recall.png",
    }
    assert json.loads((page / "evaluation.json").read_text())["chosen"] == evaluation.chosen
    assert evaluation.verdict in (page / "index.html").read_text()


def test_the_command_ends_with_2_where_no_threshold_may_be_chosen(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    test_the_verbs_write_predictors_with_the_chosen_threshold(folder, caplog)
    before = read_predictors(folder / "predictors").facts
    options = ["--on", str(folder / "text.txt"), "--tokens", "256", "--threshold", "-1e6"]
    command = [
        "predictors",
        "evaluate",
        str(folder / "model"),
        "--predictors",
        str(folder / "predictors"),
    ]
    monkeypatch.setattr(sys, "argv", ["sparsify", *command, *options])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    assert "switch everything on" in capsys.readouterr().err
    facts = read_predictors(folder / "predictors").facts
    assert (facts.threshold, facts.threshold_reason) == (before.threshold, before.threshold_reason)
    assert "refused every threshold: These predictors switch everything on" in facts.open_question("sparsify")


def test_a_model_that_the_engine_does_not_hold_is_refused_before_the_evaluation(folder: Path) -> None:
    with pytest.raises(ExportError, match="intermediate_size is"):
        evaluate(str(folder / "model"), folder / "none", None, 512, 0.5, [], "powerinfer", lambda _: None)


def test_written_predictors_come_back(predictors: Predictors, tmp_path: Path) -> None:
    write_predictors(predictors, tmp_path / "predictors")
    again = read_predictors(tmp_path / "predictors")
    assert again.facts == predictors.facts
    for block, matrices in predictors.blocks.items():
        assert all(map(torch.equal, matrices, again.blocks[block]))
