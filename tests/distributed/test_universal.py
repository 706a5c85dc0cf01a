"""What training changes passes to any ZeRO stage and number of processes without the loss of a bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from sparsify.conversion.convert import convert
from sparsify.errors import RunError, StorageError
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection
from sparsify.training import universal
from sparsify.training.kernels.activation import has_compiler
from sparsify.training.resize import conversion_folder
from tests.ranks import run_ranks

pytestmark = pytest.mark.xdist_group("universal")

PROGRAM = Path(__file__).with_name("resizing_program.py")


class Case(NamedTuple):
    """The embeddings of `mistral_tied` are one parameter with the output, the experts of `mixtral` are one each."""

    kind: str
    precision: str
    saved: tuple[int, int]
    """ZeRO stage and processes."""
    loaded: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.precision}-{self.saved[0]}"

    @property
    def folder(self) -> str:
        return f"{self.name}-by-{self.saved[1]}"


FEW = [
    Case("mistral_tied", "fp32", (1, 2), (3, 1)),
    Case("mixtral", "bf16", (3, 2), (1, 1)),
    Case("mixtral", "bf16", (3, 2), (2, 1)),
    Case("mistral_tied", "fp32", (1, 2), (0, 1)),
]
MANY = [
    Case("mistral_tied", "bf16", (1, 2), (3, 1)),
    Case("mixtral", "bf16", (2, 2), (3, 1)),
    Case("mixtral", "fp32", (3, 2), (1, 1)),
    Case("mistral_tied", "bf16", (3, 2), (2, 1)),
    Case("mistral_tied", "bf16", (3, 2), (3, 1)),
    Case("mistral_tied", "fp32", (1, 2), (2, 1)),
    Case("mistral_tied", "fp32", (3, 1), (1, 2)),
    Case("mixtral", "bf16", (3, 1), (2, 2)),
    Case("mistral_tied", "bf16", (1, 1), (3, 2)),
    Case("mixtral", "fp32", (2, 1), (3, 2)),
    Case("mixtral", "fp32", (2, 1), (1, 2)),
    Case("mixtral", "fp32", (2, 2), (3, 2)),
    Case("mixtral", "fp32", (0, 2), (1, 1)),
    Case("mistral_tied", "fp32", (0, 2), (3, 1)),
    Case("mistral_tied", "fp32", (0, 2), (2, 2)),
    Case("mixtral", "fp32", (3, 2), (0, 2)),
]

Answer = dict[str, Any]
Found = dict[Case, tuple[Answer, Answer]]


def run_all(cases: list[Case], stock: dict[str, Path], root: Path) -> Found:
    """What each case's run held and did next where it was saved, and where it was loaded."""
    models, out = root / "models", root / "out"
    convert_models({case.kind for case in cases}, stock, root)
    saves = {(case.name, case.saved[1]): f"{case.kind}:{case.precision}:{case.saved[0]}" for case in cases}
    saved = launch(saves, models, out)
    for answer in saved.values():
        universal.main(answer["checkpoint"], str(conversion_folder(Path(answer["checkpoint"]))))
    loads = {
        (case, case.loaded[1]): f"{case.kind}:{case.precision}:{case.loaded[0]}:{case.folder}/step-00000002"
        for case in cases
    }
    loaded = launch(loads, models, out)
    return {case: (saved[case.name, case.saved[1]], loaded[case, case.loaded[1]]) for case in cases}


def convert_models(kinds: set[str], stock: dict[str, Path], root: Path) -> None:
    (root / "out").mkdir()
    for kind in kinds:
        model, drelu = ModelSection(source=str(stock[kind])), ActivationSection("drelu")
        convert(model, drelu, root / "models" / kind, seed=0, dtype=torch.float32)


def launch(asked: dict[tuple[Any, int], str], models: Path, out: Path) -> dict[tuple[Any, int], Answer]:
    found = {}
    for processes in {processes for _, processes in asked}:
        these = [key for key in asked if key[1] == processes]
        arguments = [str(models), str(out), *(asked[key] for key in these)]
        answers = run_ranks(PROGRAM, arguments, processes)
        found |= {key: answer for key, (answer,) in zip(these, answers, strict=True)}
    return found


def check(case: Case, before: Answer, after: Answer) -> None:
    held, got = (torch.load(answer["held"], weights_only=True) for answer in (before, after))
    assert held.keys() == got.keys()
    differ = [name for name in held if not torch.equal(held[name], got[name])]
    assert not differ
    assert any(held[name].abs().max() > 0 for name in held if name.endswith("exp_avg_sq"))
    for same in ("counters", "steps", "decay", "steps_after"):
        assert after[same] == before[same], same
    tolerance = 1e-3 if case.precision == "bf16" else 1e-5
    assert after["loss"] == pytest.approx(before["loss"], rel=tolerance)
    assert after["norm"] == pytest.approx(before["norm"], rel=10 * tolerance)


@pytest.fixture(scope="module")
def few(stock: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_all(FEW, stock, tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def many(stock: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_all(MANY, stock, tmp_path_factory.mktemp("many"))


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_changed_stage_holds_the_same(case: Case, few: Found) -> None:
    check(case, *few[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_every_change_holds_the_same(case: Case, many: Found) -> None:
    check(case, *many[case])


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="DeepSpeed compiles its Adam for a CPU")
@pytest.mark.parametrize(("stage", "loaded"), [(1, 1), (2, 3), (3, 3)])
@pytest.mark.parametrize(("before", "after"), [("fp32", "fp32+offload"), ("fp32+offload", "fp32")])
def test_the_optimizer_may_move_to_the_cpu_and_back(
    stage: int, loaded: int, before: str, after: str, stock: dict[str, Path], tmp_path: Path
) -> None:
    convert_models({"mistral_tied"}, stock, tmp_path)
    asked = {("saved", 1): f"mistral_tied:{before}:{stage}"}
    saved = launch(asked, tmp_path / "models", tmp_path / "out")["saved", 1]
    checkpoint = Path(saved["checkpoint"])
    if loaded != stage:
        universal.main(str(checkpoint), str(conversion_folder(checkpoint)))
    asked = {("loaded", 1): f"mistral_tied:{after}:{loaded}:{checkpoint.relative_to(tmp_path / 'out')}"}
    found = launch(asked, tmp_path / "models", tmp_path / "out")["loaded", 1]
    check(Case("mistral_tied", "fp32", (stage, 1), (loaded, 1)), saved, found)


@pytest.mark.slow
def test_without_room_nothing_is_left_of_a_changed_stage(few: Found, tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint = Path(few[FEW[0]][0]["checkpoint"])
    parameters = 2048 * 32 + 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 * 32) + 32
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=12 * parameters - 1))
    with pytest.raises(StorageError, match=r"needs 0\.0 GB, and 0\.0 GB are free"):
        universal.main(str(checkpoint), str(tmp_path / "to"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=12 * parameters))
    limited = f"ulimit -f 64; exec {sys.executable} -m {universal.__name__} {checkpoint} {tmp_path / 'to'}"
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "cannot be written: the disk is full" in result.stderr
    assert not list(tmp_path.iterdir())
    universal.main(str(checkpoint), str(tmp_path / "to"))
    written = sum(path.stat().st_size for path in (tmp_path / "to").rglob("*.pt"))
    assert 12 * parameters < written < 14 * parameters


@pytest.mark.slow
def test_a_changed_stage_of_shards_that_lack_values_is_refused(few: Found, tmp_path: Path) -> None:
    checkpoint = Path(few[FEW[1]][0]["checkpoint"])
    short = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    (shard,) = short.glob("*zero_pp_rank_1_mp_rank_00_optim_states.pt")
    content = torch.load(shard, weights_only=False)
    masters = content["optimizer_state_dict"]["fp32_flat_groups"]
    masters[-1] = masters[-1][:-1].clone()
    torch.save(content, shard)
    with pytest.raises(RunError, match=r"is not whole: \d+ of \d+ values of model"):
        universal.main(str(short), str(tmp_path / "to"))
