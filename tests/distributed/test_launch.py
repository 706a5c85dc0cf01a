"""Ranks that die take the job down at once and are named; two nodes train what two processes of one node train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify.commands import rank
from sparsify.errors import UserError
from sparsify.launch.hosts import placement, read_hostfile
from sparsify.launch.launcher import launch
from sparsify.launch.nodes import Nodes, StartedNode, free_port
from sparsify.recipe.engine import LaunchSection
from sparsify.runs.run_lock import RunLock
from tests.conftest import Command, Setup
from tests.ranks import prepare_run, records

pytestmark = pytest.mark.xdist_group("runs")

MOST_SECONDS = 20  # half an hour is what the process group itself would wait
DYING_RANK = """
import os, sys, time
if os.environ.get("RANK") == "1" and "sparsify.commands.rank" in sys.orig_argv:
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
    with RunLock(run.path) as lock, pytest.raises(error) as raised:
        launch(run, rank, Nodes(LaunchSection(processes=2)), lambda: None, lock)
    assert time.time() - float((tmp_path / "died").read_text()) < MOST_SECONDS
    said = str(raised.value)
    assert said.startswith(message)
    assert "after step 1" in said
    assert "The same command continues from the last checkpoint." in said
    if deed == "raised":
        assert "LookupError: no such neuron" in said
    assert "Connection" not in said  # rank 0's noise


SSH = """#!/bin/sh
# What ssh would do, on this machine: the last argument goes to a shell.
[ "$3" = -- ] || exit 64
echo "$4" >> "{hosts}"
exec sh -c "$5"
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["settings", "hostfile", "torchrun"])
def test_two_nodes_train_what_two_processes_train(
    way: str,
    command: Command,
    finished: Callable[[Setup], tuple[Path, dict]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup = Setup("mistral", 1, 2, "fp32")
    straight, _ = finished(setup)
    place = f"127.0.0.1:{free_port()}"
    run = tmp_path / "run"
    command_line = command(setup._replace(processes=1), run)
    arguments = [*command_line, "tracking.wandb=disabled"]
    if way == "settings":
        own = [f"launch.node_rank={node}" for node in (1, 0)]  # the others may come first
        common = ["launch.nodes=2", f"launch.rendezvous={place}"]
        commands = [[*arguments, *common, rank] for rank in own]
    elif way == "hostfile":
        (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n# second\nlocalhost slots=1\n")
        ssh = tmp_path / "ssh"
        ssh.write_text(SSH.format(hosts=tmp_path / "asked"))
        ssh.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        commands = [[arg for arg in arguments if not arg.startswith("launch.processes")]]
        commands[0].append(f"launch.hostfile={tmp_path / 'hosts'}")
    else:
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint={place}", "--no-python"]
        commands = [[*agent, *arguments, "launch.rendezvous=torchrun"]] * 2
    nodes = [subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for each in commands]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * len(nodes), said
    if way == "hostfile":
        assert (tmp_path / "asked").read_text() == "localhost\n"
    else:
        assert "Node 1 of 2 follows node 0" in "".join(said)
    whole = next(text for text in said if "\n{" in text)
    assert json.loads(whole[whole.index("\n{") :])["stages"]
    curves = [[line for line in records(path) if line["kind"] == "train"] for path in (run, straight)]
    assert [line["step"] for line in curves[0]] == [line["step"] for line in curves[1]]
    # Not to the bit: on some processors torch's products round by the alignment of memory.
    for one, other in zip(*curves, strict=True):
        for key in ("loss", "sources", "gradient_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-5), (one["step"], key)


def test_nodes_that_were_given_other_numbers_are_told(command: Command, tmp_path: Path) -> None:
    place = f"127.0.0.1:{free_port()}"
    first = Nodes(LaunchSection(processes=2, nodes=2, rendezvous=place))
    other = Nodes(LaunchSection(processes=4, nodes=2, node_rank=1, rendezvous=place))
    first.announce(tmp_path)
    with pytest.raises(UserError, match=r"launch.processes=4, but node 0 has 2 and 2") as raised:
        next(other.orders())
    assert "only launch.node_rank differs" in str(raised.value)
    other.close()
    started = time.monotonic()
    first.close()
    assert time.monotonic() - started < MOST_SECONDS
    with pytest.raises(UserError, match="cannot serve launch"):
        Nodes(LaunchSection(processes=2, nodes=2, rendezvous=place))


def test_a_node_that_ended_without_a_word_is_named(tmp_path: Path) -> None:
    place = f"127.0.0.1:{free_port()}"
    gone = StartedNode("Node 1 (gpu7)", lambda: 255, lambda: "ssh: Could not resolve hostname gpu7")
    nodes = Nodes(LaunchSection(processes=1, nodes=2, rendezvous=place), [gone])
    order = nodes.announce(tmp_path)
    with pytest.raises(UserError, match=r"Node 1 \(gpu7\) ended with exit code 255: ssh: Could not"):
        nodes.failures(order)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu1 slots=8\ngpu2 slots=4\n", "differ in their slots: gpu1 8, gpu2 4"),
        ("gpu1 slots=8\ngpu1 slots=8\n", "HOST slots=N"),
        ("gpu1\n", "HOST slots=N"),
        ("gpu1 slots=1\n-oProxyCommand=touch slots=1\n", "'-oProxyCommand=touch' is not the name of a host"),
        ("gpu1 slots=1\nme@-oProxyCommand=touch slots=1\n", "is not the name of a host"),
        ("# nothing\n", "names no host|HOST slots=N"),
    ],
)
def test_hostfiles_that_cannot_be_used_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_hostfile(str(path))


def test_without_torchrun_its_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    with (
        pytest.raises(UserError, match="torchrun did not start this process") as raised,
        placement(LaunchSection(rendezvous="torchrun"), []),
    ):
        pass
    assert "--nproc-per-node=1" in str(raised.value)
