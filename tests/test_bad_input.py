"""What a user can get wrong: one clear message each, exit code 2, nothing half-written, what stood there intact."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

from sparsify.catalogue import compose_recipe, save_recipe
from sparsify.cli import main
from sparsify.conversion.folder import copy_tokenizer
from tests.conftest import SHAPE, TOKENIZER

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OUT = "out"


class Place:
    """A fresh working directory, and the parts that a user would have in it."""

    def __init__(self, root: Path, stock: dict[str, Path], mixture: Path, recipe: Path) -> None:
        self.root, self.stock, self.mixture, self.recipe = root, stock, mixture, recipe

    def write(self, name: str, text: str) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    def checkpoint(self, kind: str = "mistral", **config: object) -> Path:
        """A copy of a stock checkpoint, with other values in its config.json."""
        folder = self.root / "model"
        shutil.copytree(self.stock[kind], folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        """A copy of the stock Mistral whose tensors were changed."""
        folder = self.checkpoint()
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    def source(self, **changes: object) -> str:
        """The override that names a mixture whose first source was changed."""
        mixture = yaml.safe_load(self.mixture.read_text())
        mixture["sources"]["code"] |= changes
        return f"mixture={self.write('changed.yaml', yaml.safe_dump(mixture))}"

    def overrides(self, *overrides: str, run: str | Path = "run") -> list[str]:
        mine = [f"mixture={self.mixture}", f"cache_dir={self.root / 'cache'}", f"run_dir={run}"]
        return [*mine, *overrides]

    def train(self, *overrides: str, run: str | Path = "run") -> list[str]:
        return ["train", str(self.recipe), *self.overrides(*overrides, run=run)]

    def run_without_checkpoint(self) -> str:
        recipe = compose_recipe(str(self.recipe), self.overrides())
        save_recipe(recipe, self.root / "run" / "recipe.yaml")
        return "run"


@pytest.fixture
def place(
    tmp_path: Path,
    stock: dict[str, Path],
    mixture_file: Path,
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, stock, mixture_file, recipe_file)


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[list[str]], str]:
    """Runs a command that must be refused as the user's mistake; returns the message."""

    def run(command: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["sparsify", *command])
        with pytest.raises(SystemExit) as ended:
            main()
        said, message = capfd.readouterr()
        assert ended.value.code == 2, said + message
        assert "Traceback" not in said + message
        assert message.count("error ") >= 1
        return message

    return run


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def assert_nothing_left(place: Place) -> None:
    left = [path for path in place.root.rglob("*") if "partial" in path.name or path.name == OUT]
    assert not left


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def truncated(place: Place) -> Path:
    folder = place.checkpoint()
    cut(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100)
    return folder


def corrupt(place: Place) -> Path:
    folder = place.checkpoint()
    (folder / WEIGHTS).write_bytes(b"<html>not found</html>" * 100)
    return folder


def pickle_only(place: Place) -> Path:
    folder = place.checkpoint()
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    return folder


def without(name: str) -> Callable[[Place], Path]:
    def arrange(place: Place) -> Path:
        folder = place.checkpoint()
        for path in folder.glob(name):
            path.unlink()
        return folder

    return arrange


def incomplete(place: Place) -> Path:
    folder = place.checkpoint()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / WEIGHTS).rename(folder / shards["a"])
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))
    return folder


def broken_config(place: Place) -> Path:
    folder = place.checkpoint()
    cut(folder / "config.json", 40)
    return folder


def damaged_tokenizer(place: Place) -> Path:
    folder = place.checkpoint()
    cut(folder / "tokenizer.json", 40)
    return folder


def small_vocabulary(place: Place) -> Path:
    folder = place.root / "model"
    MistralForCausalLM(MistralConfig(**SHAPE | {"vocab_size": 100})).save_pretrained(folder)
    copy_tokenizer(TOKENIZER, folder)
    return folder


NORM = "model.norm.weight"
MODELS: dict[str, tuple[Callable[[Place], object], list[str]]] = {
    "missing path": (
        lambda _: "./nowhere",
        ["no checkpoint at ./nowhere", "Give a checkpoint folder"],
    ),
    "Hub id offline": (
        lambda _: "someone/some-model",
        ["'someone/some-model'", "HF_HUB_OFFLINE=1", "Give a checkpoint folder"],
    ),
    "bare word": (lambda _: "mistral", ["no checkpoint at mistral", "Give a checkpoint folder"]),
    "no checkpoint": (without("config.json"), ["model", "no config.json", "safetensors weights"]),
    "architecture": (
        lambda place: place.checkpoint(model_type="gpt2"),
        ["'gpt2'", "cannot be held", "Held: mistral, mixtral", "llama"],
    ),
    "quantised": (
        lambda place: place.checkpoint(quantization_config={"quant_method": "gptq"}),
        ["(mistral)", "weights are quantised", "full precision"],
    ),
    "biased Llama": (
        lambda place: place.checkpoint("llama", attention_bias=True),
        ["(llama)", "it has biases", "without biases"],
    ),
    "other activation": (
        lambda place: place.checkpoint(hidden_act="gelu"),
        ["hidden_act is 'gelu'", "SwiGLU"],
    ),
    "impossible config": (
        lambda place: place.checkpoint(hidden_size="wide"),
        ["'hidden_size' expected int", "'wide'", "config.json"],
    ),
    "broken config": (broken_config, ["config.json cannot be read as JSON"]),
    "truncated": (truncated, [WEIGHTS, "truncated or corrupt", "copy this file again"]),
    "corrupt": (corrupt, [WEIGHTS, "truncated or corrupt", "copy this file again"]),
    "missing shard": (incomplete, ["incomplete", "model-00002-of-00002", "missing files"]),
    "no weights": (without("*.safetensors"), ["no safetensors weights", "model.safetensors"]),
    "pickle only": (pickle_only, ["only pytorch_model.bin", "can run code", "save_pretrained"]),
    "missing tensor": (
        lambda place: place.tensors(lambda tensors: tensors.pop(NORM)),
        ["1 missing", NORM, "config.json"],
    ),
    "unexpected tensor": (
        lambda place: place.tensors(lambda tensors: tensors.update(extra=torch.zeros(1))),
        ["1 unexpected", "extra"],
    ),
    "tensor of another shape": (
        lambda place: place.tensors(lambda tensors: tensors.update({NORM: torch.zeros(8)})),
        ["1 of another shape", f"{NORM} [8] instead of [32]"],
    ),
    "tokenizer missing": (without("tokenizer*"), ["no tokenizer", "tokenizer.json", "Copy"]),
    "tokenizer damaged": (
        damaged_tokenizer,
        ["no tokenizer", "tokenizer.json", "Copy"],
    ),
    "tokenizer of another model": (
        small_vocabulary,
        ["tokenizer does not match", "up to 2047", "embeds 100 tokens", "trained with"],
    ),
    "no GGUF inside": (
        lambda place: place.write("model.gguf", "not a model"),
        ["model.gguf is a file, but no GGUF file", "checkpoint folder"],
    ),
    "truncated GGUF": (
        lambda place: place.write("model.gguf", "GGUF"),
        ["model.gguf is a GGUF file"],  # and whatever this installation can say of it
    ),
    "package": (
        lambda _: "package:no_such_package/model",
        ["'no_such_package' is not installed", "how to install"],
    ),
    "package without the path": (
        lambda _: "package:sparsify/no/such/model",
        ["'sparsify' has no 'no/such/model'", "package:NAME/PATH"],
    ),
    "package without a name": (lambda _: "package:/model", ["package:/model", "package:NAME/PATH"]),
}


@pytest.mark.parametrize(("model", "words"), MODELS.values(), ids=MODELS)
def test_a_model_that_cannot_be_converted(
    model: Callable[[Place], object], words: list[str], place: Place, refused: Any
) -> None:
    message = refused(["convert", str(model(place)), "--to", OUT])
    assert all(word in message for word in words), message
    assert_nothing_left(place)


TRAININGS: dict[str, tuple[Callable[[Place], list[str]], list[str]]] = {
    "unknown recipe": (
        lambda _: ["train", "quikstart"],
        ["no recipe 'quikstart'", "Did you mean 'quickstart'?", "sparsify recipes list"],
    ),
    "unknown setting": (
        lambda place: place.train("training.budget_token=9"),
        ["'training.budget_token'", "Did you mean 'budget_tokens'?"],
    ),
    "no such model": (
        lambda place: place.train("model.source=./none"),
        ["no checkpoint at ./none"],
    ),
    "no such mixture": (
        lambda place: place.train("mixture=none.yaml"),
        ["mixture=none.yaml", "no such file", "data_mixtures/"],
    ),
    "shares": (
        lambda place: place.train(place.source(token_share=0.4)),
        ["sum to 0.9", "code 0.4", "must sum to 1", "+0.1"],
    ),
    "missing text": (
        lambda place: place.train(place.source(files=["none/*.jsonl"])),
        ["'code'", "no file matches 'none/*.jsonl'", "mixture.sources.code.files"],
    ),
    "empty source": (
        lambda place: place.train(place.source(files=[place.write("empty.jsonl", "")])),
        ["Source 'code' holds no document", "Add text"],
    ),
    "column": (
        lambda place: place.train(place.source(text_column="content")),
        ["'code'", "no column 'content'", "Its columns: text", "Set text_column"],
    ),
    "cut-off source": (
        lambda place: place.train(place.source(files=[place.write("cut.jsonl", '{"text": "a')])),
        ["cut.jsonl", "line 1 is not JSON", "complete"],
    ),
    "context": (
        lambda place: place.train("training.window_tokens=256", "training.budget_tokens=8192"),
        ["training.window_tokens is 256", "At most 128 tokens", "training.window_tokens=128"],
    ),
    "upcycling a Mixtral": (
        lambda place: place.train(
            f"model.source={place.stock['mixtral']}", "model.upcycle_experts=4"
        ),
        ["model.upcycle_experts is 4", "sparse_mixtral already", "Leave model.upcycle_experts out"],
    ),
}


@pytest.mark.parametrize(("command", "words"), TRAININGS.values(), ids=TRAININGS)
def test_a_run_that_cannot_begin(
    command: Callable[[Place], list[str]], words: list[str], place: Place, refused: Any
) -> None:
    message = refused(command(place))
    assert all(word in message for word in words), message
    assert_nothing_left(place)


def report(*arguments: str) -> Callable[[Place], list[str]]:
    return lambda place: ["report", str(place.stock["mistral"]), *arguments, "--to", OUT]


MEASURED: dict[str, tuple[Callable[[Place], list[str]], list[str]]] = {
    "export of no run": (
        lambda place: ["export", str(place.stock["mistral"]), "--to", OUT],
        ["no run folder", "sparsify train", "step-"],
    ),
    "export of a run without checkpoint": (
        lambda place: ["export", place.run_without_checkpoint(), "--to", OUT],
        ["run has no checkpoint yet", "sparsify train"],
    ),
    "report of a run without checkpoint": (
        lambda place: ["report", place.run_without_checkpoint()],
        ["run has no checkpoint yet", "sparsify train"],
    ),
    "report of nothing": (
        lambda _: ["report", "runs/none"],
        ["'runs/none'", "no folder here", "Give a checkpoint folder"],
    ),
    "report on an empty text": (
        lambda place: report("--on", place.write("empty.txt", "\n"))(place),
        ["empty.txt holds no text", "at least one document"],
    ),
    "report on neither text nor mixture": (
        report("--on", "quikstart"),
        ["neither a file nor a mixture", "Did you mean 'quickstart'?", "text file"],
    ),
    "unknown activation": (
        lambda place: [
            "convert",
            str(place.stock["mistral"]),
            "--activation",
            "dralu",
            "--to",
            OUT,
        ],
        ["dralu", "Did you mean 'drelu'?", "swiglu, reglu, drelu"],
    ),
}


@pytest.mark.parametrize(("command", "words"), MEASURED.values(), ids=MEASURED)
def test_what_cannot_be_measured_or_exported(
    command: Callable[[Place], list[str]], words: list[str], place: Place, refused: Any
) -> None:
    message = refused(command(place))
    assert all(word in message for word in words), message
    assert_nothing_left(place)


def test_a_run_goes_on_only_as_it_began(place: Place, refused: Any) -> None:
    run = place.root / place.run_without_checkpoint()
    before = contents(run)
    message = refused(place.train("training.seed=7"))
    for words in ("begun with training.seed=1", "says 7", "run_dir="):
        assert words in message
    assert before.items() <= contents(run).items()


WRITERS: dict[str, Callable[[Place, str], list[str]]] = {
    "convert": lambda place, to: ["convert", str(place.stock["mistral"]), "--to", to],
    "train": lambda place, to: place.train(run=to),
    "report": lambda place, to: report("--on", place.write("text.txt", "Hello"))(place)[:-1] + [to],
    "recipes copy": lambda _, to: ["recipes", "copy", "quickstart", f"{to}.yaml"],
}


@pytest.mark.parametrize("verb", WRITERS)
def test_a_destination_inside_a_file(verb: str, place: Place, refused: Any) -> None:
    place.write("notes", "mine")
    message = refused(WRITERS[verb](place, f"notes/{OUT}"))
    assert f"notes/{OUT}" in message
    assert "is a file, not a folder" in message
    assert (place.root / "notes").read_text() == "mine"
    assert_nothing_left(place)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
@pytest.mark.parametrize("verb", WRITERS)
def test_a_destination_without_write_permission(verb: str, place: Place, refused: Any) -> None:
    folder = place.root / "theirs"
    folder.mkdir(mode=0o555)
    message = refused(WRITERS[verb](place, f"theirs/{OUT}"))
    assert f"theirs/{OUT}" in message
    assert "no permission" in message
    assert not list(folder.iterdir())


@pytest.mark.parametrize("verb", ["convert", "report", "recipes copy", "export"])
def test_what_stands_at_the_destination_stays(verb: str, place: Place, refused: Any) -> None:
    place.write("mine/thesis.tex", "years of work")
    place.write("mine.yaml", "name: mine")
    before = contents(place.root)
    commands = WRITERS | {"export": lambda _, to: ["export", "run", "--to", to]}
    message = refused(commands[verb](place, "mine"))
    assert "mine" in message
    assert "exists" in message
    assert before.items() <= contents(place.root).items()


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Callable[[str], object]]:
    """A disk of its own at `folder`; yields what gives it another size."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    folder.mkdir()
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk can be mounted by root only")
    try:
        yield lambda size: subprocess.run(
            ["mount", "-o", f"remount,size={size}", str(folder)], check=True
        )
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def disk_used(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("verb", WRITERS)
def test_a_full_disk(verb: str, place: Place, refused: Any) -> None:
    disk = place.root / "disk"
    with mounted(disk, "64k"):
        (disk / "others").write_bytes(bytes(64 * 1024))
        message = refused(WRITERS[verb](place, f"disk/{OUT}"))
        assert f"disk/{OUT}" in message
        assert "the disk is full" in message
        assert "Free space" in message
        assert not [name for name in disk_used(disk) if "partial" in name]


def test_a_disk_that_fills_up_while_training(
    place: Place, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = place.root / "disk"
    command = place.train(run=disk / "run")
    with mounted(disk, "5M") as resize:
        message = refused(command)
        assert "disk/run/checkpoints/step-00000004 cannot be written: the disk is full" in message
        checkpoints = disk / "run" / "checkpoints"
        assert (checkpoints / "latest").read_text() == "step-00000002\n"
        assert [path.name for path in checkpoints.glob("*step*")] == ["step-00000002"]
        resize("100M")
        monkeypatch.setattr(sys, "argv", ["sparsify", *command])
        main()
        assert (checkpoints / "latest").read_text() == "step-00000006\n"
        assert (disk / "run" / "export" / "config.json").is_file()
