"""Values that nobody expects, at every place where a user or a stranger hands one over: each ends in one message.

A command must end with 0 or 2 within SECONDS, without a traceback, and leave nothing half-written behind. The fast tests
draw a few cases of each kind, the slow ones many.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import struct
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sparsify.cli.main import main
from sparsify.recipe.catalogue import folder
from sparsify.recipe.fields import Section, hints, section_type
from sparsify.recipe.recipe import Recipe
from tests.cli.damage import Place
from tests.cli.test_bounds import commands

SECONDS = 30
OUT = "out"
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
PHASES = [Phase.explicit, Phase.generate]
"""The first failure is said at once: a smaller one would take minutes to find."""
few = settings(
    max_examples=8, deadline=None, suppress_health_check=QUIET, derandomize=True, database=None, phases=PHASES
)
many = settings(max_examples=50, deadline=None, suppress_health_check=QUIET, database=None, phases=PHASES)

TEXTS = [
    "",
    " ",
    "x",
    "-1",
    "nan",
    "inf",
    "1e400",
    "1" * 4500,
    "é\u202e\x1b[31m",
    "[/red]",
    "a[/b]",
    "$\\frac$",
    "<img src=x onerror=alert(1)>",
    "../..",
    "/dev/null",
    "/proc/self/mem",
    "~no_such_user/x",
    "a" * 5000,
    "a\\",
    "${oc.env:HOME}",
    "${name}",
    "{{ 'a' * 10 ** 10 }}",
    "package:__main__/x",
    "package:a.b/x",
    "[[[[",
    "{a: 1}",
    "a=b",
    "=",
    "--",
    "%s",
    "*",
    "**/*",
    ".",
]
VALUES = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 2.5, -0.0, 1e30, 1e-300, 10**20, -(10**20), 2**31, 2**63, 2**64]),
    st.sampled_from([[], {}, [[]], [None], {"a": {}}, {"": None}, [1, "a", None], {"rope_type": "x"}]),
    st.sampled_from(TEXTS),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8"), max_size=20),
)


class TookTooLongError(Exception):
    pass


@contextmanager
def time_limit(what: object) -> Iterator[None]:
    """Of processor time: what else the machine does is nobody's fault."""

    def stop(*_: object) -> None:
        raise TookTooLongError(f"{what} did not end in {SECONDS} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


Ask = Callable[[list[str]], int]


@pytest.fixture
def place(
    tmp_path: Path, stock: dict[str, Path], mixture_file: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return Place(tmp_path, stock, mixture_file, recipe_file)


@pytest.fixture
def ends(place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ask:
    """Runs a command, checks how it ends, and returns its exit code."""

    def run(command: list[str]) -> int:
        shutil.rmtree(place.root / OUT, ignore_errors=True)
        monkeypatch.setattr(sys, "argv", ["sparsify", *command])
        code: Any = 0
        shown = [argument[:300] for argument in command]
        with time_limit(shown):
            try:
                main()
            except SystemExit as ended:
                code = ended.code or 0
            except BaseException as error:
                code = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}"
        said = capfd.readouterr()
        assert code in (0, 2), (shown, code)
        assert "Traceback" not in said.out + said.err, (shown, said.err[-3000:])
        assert "\x1b[31m" not in said.out + said.err
        if code == 2:
            assert said.err.strip(), shown
            left = [path.name for path in place.root.rglob("*") if "partial" in path.name or path.name == OUT]
            assert not left, (shown, left)
        return int(code)

    return run


def fields_of(schema: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted key of every setting of a recipe."""
    for name, hint in hints(schema).items():
        inner = section_type(hint)
        yield from fields_of(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]


FIELDS = [*fields_of(Recipe), *(f"mixture.sources.code.{name}" for name in hints(typing.get_args(hints(section_type(hints(Recipe)["mixture"]))["sources"])[1]))]  # type: ignore  # fmt: skip


def hydra_text(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


overrides = st.tuples(st.sampled_from(FIELDS), VALUES).map(lambda pair: f"{pair[0]}={hydra_text(pair[1])}")


def check_override(place: Place, ends: Ask, override: str) -> None:
    if "\0" in override or "run_dir" in override or "cache_dir" in override:
        override = override.replace("\0", "")
    ends(["plan", str(place.recipe), f"mixture={place.mixture}", override, "--hardware", "1xh100-80gb"])


@few
@given(override=overrides)
def test_an_override(place: Place, ends: Ask, override: str) -> None:
    check_override(place, ends, override)


@pytest.mark.slow
@settings(many, max_examples=120)
@given(override=overrides)
def test_many_overrides(place: Place, ends: Ask, override: str) -> None:
    check_override(place, ends, override)


def changed(value: Any, draw: Callable[[Any], Any]) -> Any:
    """A structure with one part replaced, removed, or of another key."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value, key=str)))
        match draw(st.sampled_from(["deeper", "deeper", "deeper", "gone", "renamed"])):
            case "gone":
                return {name: one for name, one in value.items() if name != key}
            case "renamed":
                return {draw(st.sampled_from(TEXTS)) if name == key else name: one for name, one in value.items()}
            case _:
                return value | {key: changed(value[key], draw)}
    if isinstance(value, list) and value and draw(st.booleans()):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], changed(value[place], draw), *value[place + 1 :]]
    return draw(VALUES)


def damaged_text(text: bytes, draw: Callable[[Any], Any]) -> bytes:
    """A file's content with bytes cut out, doubled, or put in."""
    at = draw(st.integers(0, len(text)))
    more = draw(
        st.sampled_from([b"", b"\xff", b"\0", b"\n", b"[" * 1000, b"{", b'"', b"&a [*a]", b"\xef\xbb\xbf", b"9" * 4500])
    )
    return text[:at] + more + text[min(len(text), at + draw(st.integers(0, 40))) :]


def check_yaml_file(place: Place, ends: Ask, draw: Callable[[Any], Any]) -> None:
    kind = draw(st.sampled_from(["recipe", "mixture", "suite"]))
    source = {"recipe": place.recipe, "mixture": place.mixture, "suite": folder("eval") / "suites" / "quick.yaml"}[kind]
    content = source.read_bytes()
    if draw(st.booleans()):
        content = yaml.safe_dump(changed(yaml.safe_load(content), draw), allow_unicode=True).encode("utf-8", "replace")
    else:
        content = damaged_text(content, draw)
    path = place.root / "theirs.yaml"
    path.write_bytes(content)
    given = {
        "recipe": [str(path)],
        "mixture": [str(place.recipe), f"mixture={path}"],
        "suite": [str(place.recipe), f"mixture={place.mixture}", f"eval.suite={path}"],
    }
    ends(["plan", *given[kind], "--hardware", "1xh100-80gb"])


@few
@given(data=st.data())
def test_a_file_in_yaml(place: Place, ends: Ask, data: st.DataObject) -> None:
    check_yaml_file(place, ends, data.draw)


@pytest.mark.slow
@settings(many, max_examples=120)
@given(data=st.data())
def test_many_files_in_yaml(place: Place, ends: Ask, data: st.DataObject) -> None:
    check_yaml_file(place, ends, data.draw)


DESCRIPTIONS = ["config.json", "config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors.index.json", "generation_config.json", "special_tokens_map.json"]  # fmt: skip
ROPE = [
    {"rope_type": kind, "factor": 2.0}
    for kind in ("linear", "dynamic", "yarn", "llama3", "longrope", "none", "default")
]


def check_description(place: Place, ends: Ask, draw: Callable[[Any], Any]) -> None:
    """One JSON file of a checkpoint folder was changed, which is then converted and planned with."""
    model = place.root / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(place.stock[draw(st.sampled_from(["mistral", "llama"]))], model)
    name = draw(st.sampled_from(DESCRIPTIONS))
    content: dict[str, Any] = {"weight_map": {"model.norm.weight": "model.safetensors"}, "metadata": {"total_size": 1}}
    if (model / name).is_file():
        content = json.loads((model / name).read_bytes())
    if name == "config.json":
        content |= draw(st.sampled_from([{}, {}, {"rope_scaling": draw(st.sampled_from(ROPE))}, {"rope_parameters": draw(st.sampled_from(ROPE))}]))  # fmt: skip
    text = json.dumps(changed(content, draw)).encode()
    if not draw(st.integers(0, 3)):
        text = damaged_text(text, draw)
    (model / name).write_bytes(text)
    ends(["plan", str(place.recipe), f"mixture={place.mixture}", f"model.source={model}", "--hardware", "1xh100-80gb"])
    place.write("text.txt", "word1 value2 " * 50)
    ends(["convert", str(model), "--to", OUT, "--on", "text.txt", "--tokens", "64"])


@few
@given(data=st.data())
def test_a_description_of_a_model(place: Place, ends: Ask, data: st.DataObject) -> None:
    check_description(place, ends, data.draw)


@pytest.mark.slow
@many
@given(data=st.data())
def test_many_descriptions_of_models(place: Place, ends: Ask, data: st.DataObject) -> None:
    check_description(place, ends, data.draw)


def check_header(place: Place, ends: Ask, draw: Callable[[Any], Any]) -> None:
    """The header of a safetensors file was changed."""
    model = place.root / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(place.stock["mistral"], model)
    content = (model / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(changed(json.loads(content[8 : 8 + size]), draw)).encode()
    if not draw(st.integers(0, 3)):
        header = damaged_text(header, draw)
    stated = draw(st.sampled_from([len(header), len(header), len(header), 0, 2**63, len(header) + 1]))
    (model / "model.safetensors").write_bytes(struct.pack("<Q", stated) + header + content[8 + size :])
    place.write("text.txt", "word1 value2 " * 50)
    ends(["convert", str(model), "--to", OUT, "--on", "text.txt", "--tokens", "64"])


@few
@given(data=st.data())
def test_a_header_of_weights(place: Place, ends: Ask, data: st.DataObject) -> None:
    check_header(place, ends, data.draw)


@pytest.mark.slow
@many
@given(data=st.data())
def test_many_headers_of_weights(place: Place, ends: Ask, data: st.DataObject) -> None:
    check_header(place, ends, data.draw)


def write_gguf(path: Path, changes: dict[str, Any]) -> None:
    """A GGUF file as llama.cpp writes one, with other values under some keys; None leaves one out."""
    writer = gguf.GGUFWriter(path, "llama")
    keys: dict[str, Any] = {
        "context_length": 128,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": 8,
        "rope.freq_base": 10_000.0,
    } | changes
    pieces = ["<unk>", "<s>", "</s>", *(f"▁{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(n) for n in range(len(pieces))])
    writer.add_token_types([2, 3, 3] + [1] * (len(pieces) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    kinds = {bool: writer.add_bool, int: writer.add_int64, float: writer.add_float64, str: writer.add_string}
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(f"llama.{key}", value)
        elif value is not None:
            kinds[type(value)](f"llama.{key}", value)
    shapes = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}  # fmt: skip
    outer = {"token_embd.weight": (len(pieces), 32), "output_norm.weight": (32,)}
    for name, shape in {**outer, **{f"blk.0.{name}.weight": shape for name, shape in shapes.items()}}.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_KEYS = ["context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.sliding_window", "attention.key_length", "attention.value_length", "expert_count", "expert_used_count", "vocab_size", "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "no_such_key"]  # fmt: skip
GGUF_VALUES = [None, True, 0, -1, 1, 2, 3, 10**9, 2**63 - 1, 0.0, -1.0, 2.5, 1e300, math.inf, math.nan, "", "x", "linear", "yarn", "llama3", [1, 2], [4, 4], ["a"], [0.5]]  # fmt: skip
COUNTS = [0, 1, 9, 2**31, 2**63, 2**64 - 1]


def check_gguf(place: Place, ends: Ask, draw: Callable[[Any], Any]) -> None:
    """A GGUF file with other values, whose header was then cut off, or says other counts, types or lengths."""
    path = place.root / "model.gguf"
    write_gguf(path, draw(st.dictionaries(st.sampled_from(GGUF_KEYS), st.sampled_from(GGUF_VALUES), max_size=3)))
    content = path.read_bytes()
    header = gguf.GGUFReader(path).data_offset
    at = draw(st.one_of(st.integers(0, header), st.sampled_from([4, 8, 16])))
    match draw(st.sampled_from(["whole", "cut off", "cut off later", "count", "count", "type", "bytes"])):
        case "cut off":
            content = content[:at]
        case "cut off later":
            content = content[: draw(st.integers(header, len(content)))]
        case "count":
            content = content[:at] + struct.pack("<Q", draw(st.sampled_from(COUNTS))) + content[at + 8 :]
        case "type":
            content = content[:at] + struct.pack("<I", draw(st.integers(0, 13))) + content[at + 4 :]
        case "bytes":
            content = damaged_text(content[:header], draw) + content[header:]
    path.write_bytes(content)
    place.write("text.txt", "a b c d " * 50)
    ends(["convert", str(path), "--to", OUT, "--on", "text.txt", "--tokens", "64"])


def test_the_gguf_file_that_is_damaged_below_is_read(place: Place, ends: Ask) -> None:
    write_gguf(place.root / "model.gguf", {})
    place.write("text.txt", "a b c d " * 50)
    assert ends(["convert", "model.gguf", "--to", OUT, "--on", "text.txt", "--tokens", "64"]) == 0


def test_a_gguf_file_that_states_more_values_than_it_has_is_not_counted_through(place: Place, ends: Ask) -> None:
    """An array of 2^63 numbers, of which the file has none: gguf's own reader would not end."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    for kind in (0, 4, 9):  # bytes, numbers, arrays
        array = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, kind, 2**63)
        (place.root / "model.gguf").write_bytes(head + array)
        assert ends(["convert", "model.gguf", "--to", OUT]) == 2


@few
@given(data=st.data())
def test_a_gguf_file(place: Place, ends: Ask, data: st.DataObject) -> None:
    check_gguf(place, ends, data.draw)


@pytest.mark.slow
@settings(many, max_examples=150)
@given(data=st.data())
def test_many_gguf_files(place: Place, ends: Ask, data: st.DataObject) -> None:
    check_gguf(place, ends, data.draw)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_weights_of_a_type_that_is_not_computed_with(dtype: torch.dtype, place: Place, ends: Ask) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(32).to(dtype)

    model = place.tensors(change)
    place.write("text.txt", "word1 value2 " * 50)
    ends(["convert", str(model), "--to", OUT, "--on", "text.txt", "--tokens", "64"])


def text_parameters() -> list[tuple[tuple[str, ...], str, bool]]:
    """Command, name and whether it is an option, of every parameter that is a text or a path."""
    from sparsify.cli.main import app

    found = []
    for path, callback in commands(app):
        for name, hint in typing.get_type_hints(callback, include_extras=True).items():
            inner, *extras = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
            if ("str" in str(inner) or "Path" in str(inner)) and name != "return":
                is_option = any(type(extra).__name__ == "OptionInfo" for extra in extras)
                declared = [one for extra in extras for one in getattr(extra, "param_decls", None) or ()]
                flag = next((one for one in declared if one.startswith("--")), f"--{name.replace('_', '-')}")
                found.append((path, flag if is_option else name, is_option))
    return found


TEXT_PARAMETERS = text_parameters()
EXPENSIVE = {("bench", "mixture"), ("bench", "train"), ("bench", "recovery"), ("bench", "proof"), ("bench", "decode"), ("bench", "activation"), ("train",), ("mixture", "tune")}  # fmt: skip
"""Commands that may work for minutes if a value is accepted; they get arguments that cannot be, too."""


def check_text_option(place: Place, ends: Ask, draw: Callable[[Any], Any]) -> None:
    path, name, is_option = draw(st.sampled_from(TEXT_PARAMETERS))
    value = draw(st.sampled_from(TEXTS))
    required = {
        ("mixture", "tune"): ["--over", "token_shares", "--trials", "4", "--trial-tokens", "4096"],
        ("convert",): ["--to", OUT],
        ("export", "write"): ["--to", OUT],
        ("simulate",): ["--device", "phone"],
    }
    positional = {
        ("recipes", "copy"): ["quickstart", "none/x.yaml"],
        ("generate",): ["none", "a"],
        ("recipes", "list"): [],
    }
    arguments = positional.get(path, ["none"])
    if is_option:
        ends([*path, *arguments, *required.get(path, []), f"{name}={value}"])
    elif path not in EXPENSIVE and not value.startswith("--"):
        ends([*path, *required.get(path, []), value, *arguments[1:]])


@pytest.mark.parametrize("chart", ["", ".", "..", "/", "x.pdf", "a/", "[/red]"])
def test_a_chart_that_is_not_a_picture(chart: str, place: Place, ends: Ask) -> None:
    command = ["plan", str(place.recipe), f"mixture={place.mixture}", "--hardware", "1xh100-80gb"]
    assert ends([*command, f"--chart={chart}"]) == 2


@few
@given(data=st.data())
def test_a_text_of_a_command(place: Place, ends: Ask, data: st.DataObject) -> None:
    check_text_option(place, ends, data.draw)


@pytest.mark.slow
@settings(many, max_examples=120)
@given(data=st.data())
def test_many_texts_of_commands(place: Place, ends: Ask, data: st.DataObject) -> None:
    check_text_option(place, ends, data.draw)
