"""Whatever kills a run, at whatever moment: the same command goes on to the same bits.

`make test` kills one run while it saves and right after it; the slow campaign kills at 20 random moments over
ZeRO 1, 2 and 3 with one and two processes. Its seed is printed with a failure and may be set: SPARSIFY_KILL_SEED=7.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import STEPS, Command, Setup

Finished = Callable[[Setup], tuple[Path, dict]]
SEED = int(os.environ.get("SPARSIFY_KILL_SEED", "20"))
CAMPAIGN = [
    (Setup("mistral", stage, processes, precision), kills)
    for stage, processes, precision, kills in (
        (1, 1, "fp32", 4),
        (1, 2, "bf16", 3),
        (2, 1, "bf16", 3),
        (2, 2, "bf16", 4),
        (3, 1, "bf16", 3),
        (3, 2, "bf16", 3),
    )
]
MOMENTS = ("while starting", "after a step", "while saving", "right after a save")
START_SECONDS = 240


def losses(run: Path) -> list[tuple[int, float, float | None]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines if line["kind"] == "train"]


def weights(run: Path) -> bytes:
    return (run / "export" / "model.safetensors").read_bytes()


def wait_for(moment: str, run: Path, process: subprocess.Popen[bytes], chance: random.Random) -> bool:
    """Waits for a moment of this launch. Returns False when the run ended before it came."""
    checkpoints = run / "checkpoints"
    latest = checkpoints / "latest"
    saved_before = latest.read_text() if latest.is_file() else ""

    def metrics_bytes() -> int:
        path = run / "metrics.jsonl"
        return path.stat().st_size if path.is_file() else 0

    if moment == "while starting":
        time.sleep(chance.uniform(0.5, 8.0))
        return process.poll() is None
    size_before = metrics_bytes()
    happened = {
        "after a step": lambda: metrics_bytes() > size_before,
        "while saving": lambda: any(checkpoints.glob(".partial-*")),
        "right after a save": lambda: latest.is_file() and latest.read_text() != saved_before,
    }[moment]
    deadline = time.monotonic() + START_SECONDS
    while not happened():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"{moment!r} never came"
        time.sleep(0.001)
    time.sleep(chance.uniform(0.0, 0.1 if moment == "while saving" else 0.5))
    return process.poll() is None


def kill(process: subprocess.Popen[bytes], chance: random.Random) -> str:
    """SIGKILL: the machine (all at once), the launcher, or one rank. Returns which."""
    launcher = psutil.Process(process.pid)
    family = [launcher, *launcher.children(recursive=True)]
    ranks = [child for child in family if "sparsify.commands.rank" in _command(child)]
    what = chance.choice(["all", "the launcher", "one rank"] if ranks else ["all", "the launcher"])
    chosen = {"all": family, "the launcher": [launcher], "one rank": ranks[-1:]}[what]
    for victim in chosen:
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait(START_SECONDS)
    return what


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def survive(moments: list[str], command: list[str], run: Path, chance: random.Random) -> list[str]:
    """Kills a run at these moments, one launch after another, then lets it end. Returns what was done to it."""
    done = []
    for moment in moments:
        with (run.parent / f"{run.name}.log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        if not wait_for(moment, run, process, chance):
            assert process.wait(START_SECONDS) == 0, f"{done}, then it failed by itself"
            break
        what = kill(process, chance)
        latest = run / "checkpoints" / "latest"
        done.append(f"{what} {moment} (latest {latest.read_text()[5:13] if latest.is_file() else None})")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{done}\n{result.stdout}{result.stderr}"
    return done


def check_same(run: Path, straight: Path, done: list[str]) -> None:
    assert [step for step, _, _ in losses(run)] == list(range(1, STEPS + 1)), done
    assert losses(run) == losses(straight), done
    assert weights(run) == weights(straight), done
    left = [path.name for path in (run / "checkpoints").glob(".*")]
    assert not left, (left, done)


@pytest.mark.slow
def test_killed_while_saving_and_right_after_it(command: Command, finished: Finished) -> None:
    setup = Setup("mistral", 2, 2, "bf16")
    straight, _ = finished(setup)
    run = command.root / "killed"
    moments = ["while saving", "right after a save"]
    done = survive(moments, command(setup, run), run, random.Random(SEED))
    assert len(done) == len(moments), done
    check_same(run, straight, done)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("setup", "kills"), CAMPAIGN, ids=lambda value: str(value))
def test_twenty_random_moments(setup: Setup, kills: int, command: Command, finished: Finished) -> None:
    straight, _ = finished(setup)
    chance = random.Random(f"{SEED} {setup}")
    killed = 0
    while killed < kills:  # a run that ends before all of its kills came leaves them to another
        run = command.root / ("-".join(map(str, ("killed", *setup, killed))))
        moments = [chance.choice(MOMENTS) for _ in range(kills - killed)]
        done = survive(moments, command(setup, run), run, chance)
        print(f"seed {SEED}, {setup}: {done}")
        check_same(run, straight, done)
        killed += len(done)
