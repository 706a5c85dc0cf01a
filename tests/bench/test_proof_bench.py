"""`sparsify bench proof`: what is trained how long, the fit of the gap, and one small real proof that is interrupted and extended."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from sparsify.bench import recovery as recovery_module
from sparsify.bench.proof import ADDITIONS, Proof, bench_proof, gap_fits, proof_plan
from sparsify.bench.proof_report import proof_table, write_proof
from sparsify.bench.recovery import RecoveryPlan, RecoveryPoint, RecoveryRun, bench_recovery, variant_names
from sparsify.recipe.recipe import Recipe


def fake_run(trained: list[Recipe], recipe: Recipe, name: str) -> RecoveryRun:
    """A run whose loss depends on the variant and the rate: the best rate is 1e-4."""
    trained.append(recipe)
    costs = {
        "dense": 0.0,
        "drelu": 0.5,
        "calibrated_drelu": 0.4,
        "thresholded90_drelu": 0.3,
        "thresholded90_reglu": 0.2,
    }
    variant, _, addition = name.partition("+")
    loss = 3.0 + costs.get(variant, 0.1) - 0.05 * bool(addition) + (recipe.optimizer.peak_learning_rate != 1e-4)
    tokens = recipe.num_steps * recipe.step_tokens
    points = [RecoveryPoint(tokens=tokens, loss=loss, zeros=0.9, gate_zeros=0.5, blended_share=1)]
    return RecoveryRun(
        variant=name,
        seed=recipe.training.seed,
        peak_learning_rate=recipe.optimizer.peak_learning_rate,
        path=recipe.run_dir,
        points=points,
    )


def test_rates_are_searched_shortly_and_the_best_get_additions_and_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Recipe] = []
    monkeypatch.setattr(recovery_module, "_run", lambda recipe, name, _=None: fake_run(trained, recipe, name))
    known: list[int] = []
    plan = proof_plan(RecoveryPlan(tmp_path, rates=[3e-5, 1e-4], seeds=[1, 2], search_tokens=102_400))
    result = bench_recovery(plan, lambda found: known.append(len(found.variants)))
    by_name = {variant.name: variant for variant in result.variants}
    best = "thresholded90_swiglu"
    assert set(by_name) == {*variant_names("proof/"), f"{best}+distilled", f"{best}+uneven"}
    assert all(variant.peak_learning_rate == 1e-4 for variant in result.variants)
    two_seeds = {name for name, variant in by_name.items() if len(variant.runs) == 2}
    assert two_seeds == {"dense", best, f"{best}+distilled", f"{best}+uneven"}
    assert known == [1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8]
    short = [recipe for recipe in trained if recipe.training.budget_tokens == 102_400]
    assert len(short) == 2 * len(by_name)
    assert {(one.optimizer.warmup_tokens, one.eval.suite) for one in short} == {(5_120, None)}
    whole = [recipe for recipe in trained if recipe not in short]
    assert {(one.training.budget_tokens, one.optimizer.warmup_tokens) for one in whole} == {(2_048_000, 40_960)}
    assert len({recipe.run_dir for recipe in trained}) == len(trained) == 16 + 8 + 4
    changed = {recipe.run_dir.split("/")[-2]: recipe for recipe in whole}
    assert changed[f"{best}+distilled"].distillation.logits_weight == 4
    assert changed[f"{best}+uneven"].conversion.allocation == "sensitivity"
    assert changed[f"{best}+uneven"].conversion.target_zeros == 0.9


def test_the_fit_finds_the_law_of_the_gap_and_predicts_beyond_the_tokens(tmp_path: Path) -> None:
    def run(name: str, gap: float, limit: float) -> RecoveryRun:
        losses = {
            tokens: 3.0 + gap * (tokens / 1e6) ** -0.5 + limit for tokens in range(1_000_000, 9_000_000, 1_000_000)
        }
        points = [
            RecoveryPoint(tokens=tokens, loss=loss, sources={"web": loss}, zeros=0.9, gate_zeros=0.5, blended_share=1)
            for tokens, loss in losses.items()
        ]
        return RecoveryRun(variant=name, seed=1, peak_learning_rate=1e-4, path="", points=points)

    runs = [run("dense", 0, 0), run("drelu", 0.2, 0.03)]
    variants = [
        recovery_module.RecoveryVariant(
            name=one.variant, searched={}, runs=[one], gaps=[one.last.loss - runs[0].last.loss]
        )
        for one in runs
    ]
    recovery = recovery_module.Recovery(budget_tokens=8_000_000, seeds=[1], variants=variants)
    (found,) = gap_fits(recovery)
    assert found.variant == "drelu"
    assert found.fit.alpha == pytest.approx(0.5, abs=1e-3)
    assert 1 - found.fit.limit == pytest.approx(0.03, abs=1e-3)
    assert 1 - found.fit.predicted[-1].active == pytest.approx(0.2 * 80**-0.5 + 0.03, abs=1e-3)
    proof = Proof(recovery=recovery, fits=[found])
    write_proof(proof, tmp_path)
    assert Proof.model_validate_json((tmp_path / "proof.json").read_text()).fits == [found]
    console = Console(width=160)
    with console.capture() as captured:
        console.print(proof_table(proof))
    assert "80,000,000*" in captured.get()
    assert "+0.101" in captured.get()  # of the source web after 8,000,000 tokens


SUITE = """
name: own
tasks: {python_functions: {shots: 0, metric: acc, limit: 6}}
"""


@pytest.mark.slow
def test_a_small_proof_measures_what_a_long_one_does_and_resumes(
    stock: dict[str, Path], mixture_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "own.yaml").write_text(SUITE)
    overrides = [
        "model=quickstart_base",
        f"model.source={stock['mistral']}",
        f"mixture={mixture_file}",
        f"cache_dir={tmp_path / 'cache'}",
        "training.sequence_length=64",
        "training.budget_tokens=4096",
        "optimizer.warmup_tokens=512",
        "checkpoint.every_tokens=2048",
        "eval.every_tokens=512",
        "eval.validation_sequences_per_source=2",
        f"eval.suite={tmp_path / 'own.yaml'}",
        "eval.suite_every_tokens=2048",
    ]
    caplog.set_level(logging.INFO, "sparsify")
    plan = proof_plan(RecoveryPlan(tmp_path / "p", ["thresholded90_reglu"], [1e-3], [1], overrides))
    proof = bench_proof(plan, lambda found: write_proof(found, tmp_path / "p"))
    names = ["dense", "thresholded90_reglu", *(f"thresholded90_reglu+{name}" for name in ADDITIONS)]
    assert [variant.name for variant in proof.recovery.variants] == names
    assert set(proof.speeds) == set(names[1:])
    assert {(one.variant, one.tokens) for one in proof.scores} == {(n, t) for n in names for t in (0, 2048, 4096)}
    assert all((one.difference is None) == (one.variant == "dense") for one in proof.scores)
    assert Proof.model_validate_json((tmp_path / "p" / "proof.json").read_text()).scores == proof.scores
    again = bench_proof(replace(plan, additions={}), lambda _: None)
    assert [one for one in proof.scores if one.variant in names[:2]] == again.scores
    assert sum("Trained already" in line for line in caplog.messages) == 2
