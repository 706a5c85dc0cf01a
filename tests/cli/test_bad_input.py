"""What a user can get wrong: one clear message each, exit code 2, nothing half-written, what stood there intact."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.cli.main import main
from tests.cli import damage
from tests.cli.damage import WEIGHTS, Place

OUT = "out"


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
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
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


def link(place: Place, name: str, target: str) -> Path:
    (place.root / name).symlink_to(target)
    return place.root / name


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
    "link in a circle": (
        lambda place: link(place, "circle", "circle"),
        ["circle is a link that leads to no file: circle", "Correct the link"],
    ),
    "bare word": (lambda _: "mistral", ["no checkpoint at mistral", "Give a checkpoint folder"]),
    "no checkpoint": (
        damage.without("config.json"),
        ["model", "no config.json", "safetensors weights"],
    ),
    "architecture": (
        lambda place: place.checkpoint(model_type="gpt2"),
        ["'gpt2'", "cannot be held", "Held: mistral, mixtral", "llama", "add sparsify/models/sparse_gpt2.py"],
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
        ["hidden_act is 'gelu'", "swiglu"],
    ),
    "impossible config": (
        lambda place: place.checkpoint(hidden_size="wide"),
        ["hidden_size is 'wide'", "valid integer", "config.json"],
    ),
    "broken config": (
        damage.broken_config,
        ["config.json cannot be read as JSON", "copy this file again"],
    ),
    "truncated": (damage.truncated, [WEIGHTS, "truncated or corrupt", "copy this file again"]),
    "corrupt": (damage.corrupt, [WEIGHTS, "truncated or corrupt", "copy this file again"]),
    "missing shard": (damage.incomplete, ["incomplete", "model-00002-of-00002", "missing files"]),
    "no weights": (
        damage.without("*.safetensors"),
        ["no safetensors weights", "model.safetensors"],
    ),
    "pickle only": (
        damage.pickle_only,
        ["only pytorch_model.bin", "can run code", "save_pretrained"],
    ),
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
    "tokenizer missing": (
        damage.without("tokenizer*"),
        ["model has no tokenizer", "none of tokenizer.json, tokenizer.model", "Copy"],
    ),
    "tokenizer damaged": (
        damage.damaged_tokenizer,
        ["model has no tokenizer that can be read", "tokenizer.json", "Copy"],
    ),
    "tokenizer of another model": (
        damage.small_vocabulary,
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
    assert [word for word in words if word not in message] == []
    assert_nothing_left(place)


ONE_FILE = "name: one\nsources: {a: {token_share: 1, files: a.txt}}"
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
    "files that are no list": (
        lambda place: place.train(f"mixture={place.write('one.yaml', ONE_FILE)}"),
        ["mixture=", "mixture.sources.a.files is 'a.txt', a single value", "files: [VALUE]"],
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
        ["cut.jsonl:1 is not JSON", "complete"],
    ),
    "context": (
        lambda place: place.train("training.sequence_length=256", "training.budget_tokens=8192"),
        ["training.sequence_length is 256", "At most 128 tokens", "training.sequence_length=128"],
    ),
    "flash attention": (
        lambda place: place.train("engine.attention=flash_attention_2"),
        ["engine.attention is 'flash_attention_2'", "sdpa, flex_attention"],
    ),
    "upcycling a Mixtral": (
        lambda place: place.train(f"model.source={place.stock['mixtral']}", "model.upcycle_experts=4"),
        ["model.upcycle_experts is 4", "sparse_mixtral already", "Leave model.upcycle_experts out"],
    ),
}
if not torch.cuda.is_available():
    TRAININGS["flex attention without a GPU"] = (
        lambda place: place.train("engine.attention=flex_attention"),
        ["engine.attention is flex_attention", "no GPU here", "engine.attention=sdpa"],
    )


@pytest.mark.parametrize(("command", "words"), TRAININGS.values(), ids=TRAININGS)
def test_a_run_that_cannot_begin(
    command: Callable[[Place], list[str]], words: list[str], place: Place, refused: Any
) -> None:
    message = refused(command(place))
    assert [word for word in words if word not in message] == []
    assert_nothing_left(place)


def report(*arguments: str) -> Callable[[Place], list[str]]:
    return lambda place: ["report", str(place.stock["mistral"]), *arguments, "--to", OUT]


MEASURED: dict[str, tuple[Callable[[Place], list[str]], list[str]]] = {
    "export of no run": (
        lambda place: ["export", str(place.stock["mistral"]), "--to", OUT],
        ["neither a run folder nor a checkpoint", "sparsify train", "step-"],
    ),
    "export of a run without checkpoint": (
        lambda place: ["export", place.run(), "--to", OUT],
        ["run has no checkpoint yet", "sparsify train"],
    ),
    "report of a run without checkpoint": (
        lambda place: ["report", place.run()],
        ["run has no checkpoint yet", "sparsify train"],
    ),
    "export of a checkpoint that is not there": (
        lambda place: ["export", place.run("step-00000008"), "--to", OUT],
        ["latest names step-00000008", "not there or not whole", "Write the name of another"],
    ),
    "export of a checkpoint without counters": (
        lambda place: ["export", place.run("step-00000002", state="{"), "--to", OUT],
        ["step-00000002 is not whole", "state.json", "Write the name of another"],
    ),
    "export of a checkpoint that was cut off": (
        lambda place: ["export", place.run("step-00000002"), "--to", OUT],
        ["step-00000002 is not whole: mp_rank_00_model_states.pt has", "Write the name of another"],
    ),
    "report of nothing": (
        lambda _: ["report", "runs/none"],
        [
            "'runs/none'",
            "neither a local folder nor a model on the Hub",
            "Give a checkpoint folder",
        ],
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
        ["dralu", "Did you mean 'drelu'?", "swiglu, geglu, reglu, shifted_relu, relu2, fatrelu, drelu"],
    ),
}


@pytest.mark.parametrize(("command", "words"), MEASURED.values(), ids=MEASURED)
def test_what_cannot_be_measured_or_exported(
    command: Callable[[Place], list[str]], words: list[str], place: Place, refused: Any
) -> None:
    message = refused(command(place))
    assert [word for word in words if word not in message] == []
    assert_nothing_left(place)


def test_a_run_goes_on_only_as_it_began(place: Place, refused: Any) -> None:
    run = place.root / place.run()
    place.write("run/environment.json", '{"packages": {}}')
    place.write("run/mixture.lock.json", "{}")  # written last before training begins
    place.write("run/metrics.jsonl", '{"kind": "train", "step": 1}\n')
    before = contents(run)
    message = refused(place.train("training.seed=7"))
    for words in ("begun with training.seed=1", "says 7", "run_dir="):
        assert words in message
    assert before.items() <= contents(run).items()


WRITERS: dict[str, Callable[[Place, str], list[str]]] = {
    "convert": lambda place, to: ["convert", str(place.stock["mistral"]), "--to", to],
    "train": lambda place, to: place.train(run=to),
    "report": lambda place, to: [*report("--on", place.write("text.txt", "Hello"))(place)[:-1], to],
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


@pytest.mark.parametrize("verb", WRITERS)
def test_a_destination_that_is_a_link_to_nothing(verb: str, place: Place, refused: Any) -> None:
    link(place, "away", "nowhere")
    message = refused(WRITERS[verb](place, f"away/{OUT}"))
    assert re.search(r"away is a link that leads to no file \(nowhere\)", message)
    assert not (place.root / "nowhere").exists()
    assert_nothing_left(place)


def test_overrides_are_validated_with_a_recipe(place: Place, refused: Any) -> None:
    message = refused(["recipes", "validate", str(place.recipe), f"mixture={place.mixture}", "training.seed=-1"])
    assert "training.seed is -1" in message


@contextlib.contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Lets permissions bind root too: this thread gives up CAP_DAC_OVERRIDE meanwhile (capabilities(7))."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of capabilities 0 to 31 and then to 63
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] = effective & ~(1 << 1)
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


@pytest.mark.parametrize("verb", WRITERS)
def test_a_destination_without_write_permission(verb: str, place: Place, refused: Any) -> None:
    folder = place.root / "theirs"
    folder.mkdir(mode=0o555)
    with bound_by_permissions():
        assert not os.access(folder, os.W_OK, effective_ids=True)
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
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("verb", WRITERS)
def test_a_full_disk(verb: str, place: Place, refused: Any) -> None:
    disk = place.root / "disk"
    with mounted(disk, "64k"):
        (disk / "others").write_bytes(bytes(64 * 1024))
        message = refused(WRITERS[verb](place, f"disk/{OUT}"))
        assert f"disk/{OUT}" in message
        assert "the disk is full" in message
        assert "Free space" in message
        assert not list(disk.rglob("*partial*"))


def test_a_disk_that_fills_up_while_training(place: Place, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
        with pytest.raises(SystemExit, match=r"^0$"):
            main()
        assert (checkpoints / "latest").read_text() == "step-00000006\n"
        assert (disk / "run" / "export" / "config.json").is_file()
