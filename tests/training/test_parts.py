"""The parts of training that can be held on their own: schedule, records, engine configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.errors import RunError
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.training import OptimizerSection
from sparsify.runs.state import latest_checkpoint
from sparsify.training.deepspeed_engine import deepspeed_config, learning_rate, load_model
from sparsify.training.telemetry import drop_lines_after
from sparsify.training.validation import sequence_losses

SETTINGS = OptimizerSection(peak_learning_rate=1e-3, final_learning_rate=1e-4, warmup_tokens=100)


def test_learning_rate_at_its_corners() -> None:
    rates = [learning_rate(SETTINGS, tokens, 1100) for tokens in (0, 50, 100, 600, 1100, 5000)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5.5e-4, 1e-4, 1e-4])


@given(st.integers(100, 1099), st.integers(1, 1000))
def test_learning_rate_never_rises_after_warm_up_and_keeps_its_floor(seen: int, later: int) -> None:
    now, then = (learning_rate(SETTINGS, tokens, 1100) for tokens in (seen, seen + later))
    assert now >= then >= SETTINGS.final_learning_rate


def test_records_of_steps_after_the_checkpoint_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": step, "loss": 1.0} for step in (0, 1, 2, 3, 4)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 5, "lo')
    drop_lines_after(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_a_run_that_starts_anew_keeps_no_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 9.0}\n{"step": 1, "loss": 8.0}\n')
    drop_lines_after(path, 0)
    assert path.read_text() == ""


def test_latest_that_names_nothing_is_said_with_what_to_do(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "latest").write_text("step-00000007\n")
    with pytest.raises(RunError, match=r"names step-00000007, which is not there(.|\n)*Write the name"):
        latest_checkpoint(tmp_path)


def test_sequence_losses_count_labelled_positions_only() -> None:
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[1, -100, 2], [-100, -100, 6]])
    logp = logits.log_softmax(-1)
    expected = -torch.stack([logp[0, 0, 1] + logp[0, 2, 2], logp[1, 2, 6]])
    torch.testing.assert_close(sequence_losses(logits, labels), expected)


def test_the_paper_s_recipe_becomes_the_engine_s_configuration() -> None:
    config = deepspeed_config(compose_recipe("turbosparse_mistral_7b"))
    assert config["train_batch_size"] == 2048
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    per_rank = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    assert per_rank * 8 == 2048


def test_gradient_checkpointing_changes_no_gradient(recipe_file: Path, stock: dict[str, Path]) -> None:
    ids = torch.arange(40)[None]
    gradients = []
    for switch in ("true", "false"):
        recipe = compose_recipe(str(recipe_file), [f"training.gradient_checkpointing={switch}"])
        model = load_model(recipe, stock["mistral"], {}).train()
        sequence_losses(model(ids, use_cache=False).logits, ids).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
