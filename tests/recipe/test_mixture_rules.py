"""What a mixture's phases and caps mean, and what is said of those that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsify.errors import RecipeError
from sparsify.mixture.sequences.shares import Shares, share_phases, token_shares
from sparsify.recipe.compose import compose_recipe, load_mixture

PHASES = "name: x\nsources:\n  web: {files: [w.txt], token_share: 0.8}\n  chat: {files: [c.jsonl], group: instruction, token_share: 0.2}\n"


def test_phases_and_ramps_give_shares_over_the_run(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        PHASES + "phases:\n  - {until_budget_share: 0.8, instruction_token_share: 0.02}\n"
        "  - {until_budget_share: 1, instruction_token_share: 0.3, ramp: true}\n"
    )
    recipe = compose_recipe("quickstart", [f"mixture={path}"])
    phases = share_phases(recipe.mixture)
    assert [(end, first["chat"], last["chat"]) for end, first, last in phases] == [
        (0.8, 0.02, 0.02),
        (1, 0.02, 0.3),
    ]
    assert token_shares(recipe.mixture)["chat"] == pytest.approx(0.8 * 0.02 + 0.2 * 0.16)
    shares = Shares.of(recipe.mixture, 1000)
    assert float(shares.demand("chat", 800)) == pytest.approx(16)
    assert float(shares.demand("chat", 1000)) == pytest.approx(48)


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ("[{until_budget_share: 0.5}]", "the last one at 1: this one at 1"),
        ("[{until_budget_share: 0.5}, {until_budget_share: 0.4}]", "until_budget_share is 0.4"),
        ("[{until_budget_share: 1, ramp: true}]", "no phase before it to begin from"),
        ("[{until_budget_share: 1, token_shares: {wob: 1}}]", "Did you mean 'web'"),
        ("[{until_budget_share: 1, token_shares: {web: 0.5}}]", "sum to 0.5"),
        (
            "[{until_budget_share: 1, instruction_token_share: 2}]",
            r"phases.0.instruction_token_share is 2",
        ),
        (
            "[{until_budget_share: 1, token_shares: {web: 1}, instruction_token_share: 0.1}]",
            "one would be ignored",
        ),
        (
            "[{until_budget_share: 1, token_shares: {web: 1}}]",
            "token_share of its sources would be",
        ),
    ],
)
def test_phases_that_cannot_be_are_answered_with_help(phases: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{PHASES}phases: {phases}\n")
    with pytest.raises(RecipeError, match=words):
        load_mixture(str(path))


def test_the_ratio_of_a_mixture_with_phases_is_set_in_them(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{PHASES}phases: [{{until_budget_share: 1, instruction_token_share: 0.1}}]\n")
    overrides = [f"mixture={path}", "mixture.instruction_token_share=0.3"]
    with pytest.raises(RecipeError, match=r"has phases, which would ignore it"):
        compose_recipe("quickstart", overrides)


def test_caps_that_would_be_ignored_are_refused() -> None:
    key = "mixture.sources.code"
    with pytest.raises(RecipeError, match="max_epochs is not set"):
        compose_recipe("quickstart", [f"{key}.when_exhausted=redistribute"])
    with pytest.raises(RecipeError, match=r"max_epochs is 0.5.*\n.*At least 1"):
        compose_recipe("quickstart", [f"{key}.max_epochs=0.5"])
    compose_recipe("quickstart", [f"{key}.max_epochs=2", f"{key}.when_exhausted=redistribute"])


@pytest.mark.parametrize("knob", ["0.25", "null"])
def test_shares_may_be_of_each_group_only_where_a_number_says_what_each_group_has(tmp_path: Path, knob: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"name: x\ninstruction_token_share: {knob}\nsources:\n  web: {{files: [w.txt], token_share: 0.4}}\n"
        "  code: {files: [p.txt], token_share: 0.6}\n  chat: {files: [c.jsonl], group: instruction, token_share: 1}\n"
    )
    if knob == "null":
        with pytest.raises(RecipeError, match="sum to 2"):
            load_mixture(str(path))
    else:
        shares = token_shares(load_mixture(str(path)))
        assert shares == pytest.approx({"web": 0.3, "code": 0.45, "chat": 0.25})
