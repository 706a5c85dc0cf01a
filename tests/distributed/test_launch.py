"""Ranks that die take the job down at once and are named; two nodes train what two processes of one node train."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify.errors import UserError
from sparsify.recipe import LaunchSection
from sparsify.training.launcher import launch
from sparsify.training.nodes import Nodes
from tests.conftest import Command, Setup
from tests.ranks import prepare_run, records

pytestmark = pytest.mark.xdist_group("runs")

MOST_SECONDS = 20  # half an hour is what the process group itself would wait
DYING_RANK = """
import os, sys, time
if os.environ.get("RANK") == "1" and "sparsify.training.worker" in sys.orig_argv:
    from torch.nn.modules.module import register_module_forward_hook

    def die(module, inputs, output):  # one forward pass is the dry run, two are step 1
        die.forwards += type(module).__name__ == "SparseMistralForCausalLM" and module.training
        if die.forwards == 4:
            with open(os.environ["DIED"], "w") as file:
                file.write(str(time.time()))
            {deed}

    die.forwards = 0
    register_module_forward_hook(die)
"""
DEEDS = {
    "killed": ("os.kill(os.getpid(), 9)", UserError, "Rank 1 was killed by SIGKILL after step 1."),
    "raised": ("raise LookupError('no such neuron')", RuntimeError, "rank 1 failed with exit code"),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_a_rank_that_dies_takes_the_job_down_with_its_own_error(
    deed: str,
    finished: Callable[[Setup], tuple[Path, dict]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, _ = finished(Setup("mistral", 1, 2, "fp32"))
    run = prepare_run(whole, tmp_path / "run", lambda _: None)
    code, error, message = DEEDS[deed]
    (tmp_path / "sitecustomize.py").write_text(DYING_RANK.format(deed=code))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    with pytest.raises(error) as raised:
        launch(run, Nodes(LaunchSection(processes=2)), lambda: None)
    assert time.time() - float((tmp_path / "died").read_text()) < MOST_SECONDS
    said = str(raised.value)
    assert said.startswith(message)
    assert "after step 1" in said
    assert "The same command goes on from the last checkpoint." in said
    if deed == "raised":
        assert "LookupError: no such neuron" in said
    assert "Connection" not in said  # rank 0's noise


@pytest.mark.slow
def test_two_nodes_train_what_two_processes_train(
    command: Command, finished: Callable[[Setup], tuple[Path, dict]]
) -> None:
    setup = Setup("mistral", 1, 2, "fp32")
    straight, _ = finished(setup)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = command.root / "two-nodes"
    arguments = [
        *command(setup._replace(processes=1), run),
        "tracking.wandb=disabled",
        "launch.nodes=2",
        f"launch.rendezvous=127.0.0.1:{port}",
    ]
    nodes = [
        subprocess.Popen(
            [*arguments, f"launch.node_rank={node}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (1, 0)  # the others may come first
    ]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "Node 1 of 2 follows node 0" in said[0]
    assert json.loads(said[1][said[1].index("\n{") :])["stages"]
    kept = ("step", "loss", "sources", "gradient_norm")
    curves = [
        [[line[key] for key in kept] for line in records(path) if line["kind"] == "train"]
        for path in (run, straight)
    ]
    assert curves[0] == curves[1]


def test_nodes_that_were_given_other_numbers_are_told(command: Command, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    first = Nodes(LaunchSection(processes=2, nodes=2, rendezvous=place))
    other = Nodes(LaunchSection(processes=4, nodes=2, node_rank=1, rendezvous=place))
    first.announce(tmp_path)
    with pytest.raises(UserError, match=r"launch.processes=4, but node 0 has 2 and 2") as raised:
        next(other.tickets())
    assert "only launch.node_rank differs" in str(raised.value)
    other.close()
    started = time.monotonic()
    first.close()
    assert time.monotonic() - started < MOST_SECONDS
    with pytest.raises(UserError, match="cannot serve launch"):
        Nodes(LaunchSection(processes=2, nodes=2, rendezvous=place))
