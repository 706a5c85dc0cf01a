"""`sparsify simulate` from the outside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparsify.cli.main import app
from sparsify.errors import RunError, UserError
from tests.conftest import TOKENIZER


def simulate(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["simulate", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.output[result.output.index("{") :])


SHORT = ("--tokens", "48", "--sequences", "1", "--other-tokens", "192")


def test_policies_are_ordered_and_parts_add_up(tmp_path: Path) -> None:
    picture = tmp_path / "time.png"
    policies = "no_cache,lru,lfu,belady,belady_bypass"
    found = simulate(
        str(TOKENIZER), "--device", "dip_a18", "--fetch", "dense", "--policy", policies, "--chart", str(picture), *SHORT
    )
    rows = {row["policy"]: row for row in found["rows"]}
    assert rows["no_cache"]["hit_rate"] == 0
    assert rows["lru"]["hit_rate"] <= rows["belady"]["hit_rate"] <= rows["belady_bypass"]["hit_rate"]
    for row in rows.values():
        assert sum(row["seconds"].values()) == pytest.approx(1 / row["tokens_per_second"])
        assert row["needed_bytes"] == pytest.approx(found["ffn_bytes"])
        assert row["cached_share"] == pytest.approx(0.5, abs=0.2)
    # All neurons of every token, half of which fit: the bound holds as many as fit, which is what dense streaming does.
    bound = rows["belady_bypass"]
    assert bound["tokens_per_second"] == pytest.approx(bound["dense_tokens_per_second"], rel=0.1)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_prefetch_and_memories_make_rows_of_a_profile() -> None:
    # 32 layers of 14,336 neurons, eight tokens.
    found = simulate(
        "profile:turbosparse_mistral", "--device", "phone", "--memory", "2.5GB,3GB", "--policy", "lfu",
        "--prefetch", "none,hot", "--tokens", "8", "--sequences", "1", "--other-tokens", "16", "--context", "2048",
    )  # fmt: skip
    rows = found["rows"]
    assert [(row["memory_bytes"], row["prefetch"]) for row in rows] == [
        (size, prefetch) for size in (2.5e9, 3e9) for prefetch in ("none", "hot")
    ]
    assert rows[0]["recall"] is None
    assert rows[1]["recall"] > 0.1
    assert rows[1]["stall_bytes"] < rows[0]["stall_bytes"]
    assert rows[1]["over_fetch"] > 1
    assert all(row["tokens_per_second"] > row["dense_tokens_per_second"] for row in rows)


REFUSED: Sequence[tuple[tuple[str, ...], str]] = [
    (("--memory", "much"), "The memory is 'much'"),
    (("--memory", "1MB"), "too small for what always stays in it"),
    (("--policy", "fifo"), "--policy is 'fifo'"),
    (("--prefetch", "oracle"), "--prefetch is 'oracle'"),
    (("--fetch", "neurons"), "makes no such zeros"),
    (("--gamma", "0.5", "--policy", "lfu"), "needs top-k masks"),
    (("--gamma", "0.5", "--policy", "belady"), "not known beforehand"),
    (("--gamma", "2", "--policy", "lfu"), "--gamma is '2'"),
    (("--tokens", "100000"), "longer than the model's context"),
    (("--context", "10"), "shorter than a sequence"),
    (("--chart", "time.pdf"), "not a picture"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_simulated_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        simulate(str(TOKENIZER), "--device", "phone", *SHORT, *arguments)


def test_what_a_profile_cannot_is_refused() -> None:
    for arguments, message in (
        (("--gamma", "0.5", "--policy", "lfu"), "a model that computes"),
        (("--weights", "int4"), "its own bits"),
        (("--prefetch", "low_rank"), "hidden states"),
        (("--fetch", "down"), "masks that a profile does not have"),
    ):
        with pytest.raises(RunError, match=message):
            simulate("profile:turbosparse_mistral", "--device", "phone", *SHORT, *arguments)
