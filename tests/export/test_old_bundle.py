"""Bundles from before there were families: `tests/golden/old_bundles.zip`, of commit 3ed64ec, each with its own modeling files."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsify.cli.main import main
from sparsify.conversion.sparse_folder import load_sparse
from tests.models.test_families import offline_logits

GOLDEN = Path(__file__).parents[1] / "golden" / "old_bundles.zip"
KINDS = pytest.mark.parametrize("kind", ["mistral", "mixtral"])


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("old")
    with zipfile.ZipFile(GOLDEN) as archive:
        archive.extractall(root)
    return root


def run(monkeypatch: pytest.MonkeyPatch, *command: object) -> int:
    monkeypatch.setattr(sys, "argv", ["sparsify", *map(str, command)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_it_loads_offline_with_its_own_files_and_here_with_ours(bundles: Path, tmp_path: Path) -> None:
    folders = sorted(bundles.iterdir())
    references = [load_file(folder / "training" / "reference.safetensors") for folder in folders]
    given = [(folder, one["input_ids"]) for folder, one in zip(folders, references, strict=True)]
    for (folder, ids), found, reference in zip(given, offline_logits(given, tmp_path), references, strict=True):
        assert (folder / f"modeling_sparse_{folder.name}.py").is_file()
        torch.testing.assert_close(found, reference["logits"][0, -1], atol=0.1, rtol=0.02)  # of bf16
        model = load_sparse(folder, dtype=torch.float32)
        assert model.config.sparsification["sites"]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits[0, -1], found, atol=1e-5, rtol=1e-4)


@KINDS
def test_its_commands_work_and_verifying_says_which_version_can(
    kind: str, bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSIFY_TRUST_CODE", "0")  # --trust-code sets it in this process
    old, new = bundles / kind, tmp_path / "new"
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The {number} little words of the day are {number**2}." for number in range(300)))
    assert run(monkeypatch, "convert", old, "--to", new, "--on", text, "--tokens", 256) == 0
    assert (new / f"sparse_{kind}.py").is_file()
    assert not list(new.glob("modeling_*.py"))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        converted, kept = (load_sparse(folder, dtype=torch.float32)(ids).logits for folder in (new, old))
    assert torch.equal(converted, kept)
    assert run(monkeypatch, "generate", old, "The day", "--tokens", 4) == 0
    assert run(monkeypatch, "report", old, "--on", text, "--tokens", 256, "--to", tmp_path / "report") == 0
    capsys.readouterr()
    assert run(monkeypatch, "export", "verify", old) != 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"modeling_sparse_{kind}.py" in said
    assert "--trust-code" in said
    assert run(monkeypatch, "export", "verify", old, "--trust-code") == 0
