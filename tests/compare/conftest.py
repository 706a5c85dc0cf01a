"""Small run folders with given numbers, in the format of training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsify.mixture.lock import MixtureLock, SourceLock, write_lock
from sparsify.mixture.sequences.schedule import SourceSchedule
from sparsify.mixture.sequences.shares import Shares, token_shares
from sparsify.recipe.compose import compose_recipe, save_recipe
from sparsify.recipe.recipe import Recipe
from sparsify.runs.run_folder import RunFolder

BUDGET = ("training.budget_tokens=20480", "optimizer.warmup_tokens=2048", "conversion=bare")

Losses = Mapping[str, float]


@dataclass
class Runs:
    """Writes run folders of the quickstart with a budget of 20,480 tokens below a folder."""

    root: Path

    def __call__(
        self,
        name: str,
        *overrides: str,
        losses: Mapping[int, Losses],
        zeros: float = 0.8,
        fingerprints: Mapping[str, str] | None = None,
        tokens_per_second: float = 1000.0,
        trained_tokens: int | None = None,
    ) -> Path:
        """One run folder.

        Args:
            name: Folder name; `NAME/baseline` for a baseline.
            overrides: Overrides of the quickstart.
            losses: Loss of each source, by training tokens; those at 0 are the model's right after the activation replacement.
            zeros: Share of exact zeros at every validation except that of the base model.
            fingerprints: Fingerprints of sources with different text.
            tokens_per_second: Speed.
            trained_tokens: Tokens of the last step, if it was not evaluated.
        """
        run = RunFolder(self.root / name)
        recipe = compose_recipe("quickstart", [*BUDGET, *overrides])
        recipe.run_dir = str(run.path)
        save_recipe(recipe, run.recipe)
        shares = token_shares(recipe.mixture)
        counts = SourceSchedule(Shares.constant(shares)).counts(recipe.num_steps * recipe.training.global_batch_size)
        write_lock(_lock(recipe, shares, counts, fingerprints or {}), run.mixture_lock)
        dense = recipe.activation.ffn_activation == "swiglu"
        base = _validation(0, "base", dict.fromkeys(shares, 1.0), shares, 0.0)
        records = [] if dense else [base]
        for tokens, of_sources in losses.items():
            label = "training" if tokens else "base" if dense else "after_replacement"
            if tokens:
                records.append(_step(tokens, tokens_per_second))
            share = 0.0 if dense else zeros
            records.append(_validation(tokens, label, of_sources, shares, share))
        if trained_tokens is not None:
            records.append(_step(trained_tokens, tokens_per_second))
        run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
        return run.path


def _lock(
    recipe: Recipe,
    shares: Mapping[str, float],
    counts: Mapping[str, int],
    fingerprints: Mapping[str, str],
) -> MixtureLock:
    sequence_length = recipe.training.sequence_length
    sources = {
        source: SourceLock(
            fingerprint=fingerprints.get(source, f"text of {source}"),
            documents=100,
            train_tokens=100_000,
            held_out_tokens=8192,
            token_share=share,
            planned_tokens=counts[source] * sequence_length,
            epochs=counts[source] * sequence_length / 100_000,
        )
        for source, share in shares.items()
    }
    return MixtureLock(
        tokenizer_fingerprint="tokenizer",
        sequence_length=sequence_length,
        seed=recipe.training.seed,
        sources=sources,
    )


def _step(tokens: int, tokens_per_second: float) -> dict[str, object]:
    return {
        "kind": "train",
        "step": tokens // 2048,
        "tokens": tokens,
        "loss": 2.5,
        "tokens_per_second": tokens_per_second,
    }


def _validation(
    tokens: int, label: str, losses: Losses, shares: Mapping[str, float], zeros: float
) -> dict[str, object]:
    total = sum(shares[source] for source in losses)
    return {
        "kind": "validation",
        "step": tokens // 2048,
        "tokens": tokens,
        "label": label,
        "loss": sum(shares[source] * loss for source, loss in losses.items()) / total,
        "sources": dict(losses),
        "zeros": zeros,
    }


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


@pytest.fixture
def sweep(runs: Runs) -> list[Path]:
    """Three instruction shares, each with its baseline: 0, the 0.2 that the mixture states, and 0.5."""
    final = {
        "share=0": (2.0, 3.0, None),
        "share=stated": (2.1, 3.2, 2.5),
        "share=0.5": (2.4, 3.3, 2.0),
    }
    given = {"share=0": "0", "share=stated": "null", "share=0.5": "0.5"}
    paths = []
    for name, values in final.items():
        last = {
            source: loss
            for source, loss in zip(("code", "prose", "questions"), values, strict=True)
            if loss is not None
        }
        losses = {0: {source: loss + 1 for source, loss in last.items()}, 20480: last}
        baseline = {tokens: _minus(of_sources, 0.5) for tokens, of_sources in losses.items()}
        share = f"mixture.instruction_token_share={given[name]}"
        path = runs(f"quickstart,{name}", share, losses=losses)
        runs(f"quickstart,{name}/baseline", share, "activation=swiglu", losses=baseline)
        paths.append(path)
    return paths


def _minus(losses: Losses, gap: float) -> dict[str, float]:
    return {source: loss - gap for source, loss in losses.items()}


@pytest.fixture
def sparsify(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in `tmp_path`; returns exit code, standard output and standard error."""
    from sparsify.cli.main import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["sparsify", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run
