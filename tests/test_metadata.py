"""Files that a stranger wrote: read within limits, or refused with one reason. No such file makes a command hang."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from sparsify.conversion.architecture import check_fields
from sparsify.conversion.source_checkpoint import read_checkpoint
from sparsify.errors import ModelError, RecipeError, UserError
from sparsify.metadata import MAX_YAML_NODES, read_json, read_yaml, user_path

BOMB = "\n".join(["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"] + [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefg", "bcdefgh", strict=True)])  # fmt: skip

JSON: dict[str, tuple[bytes, str]] = {
    "a list": (b"[1]", "holds list, not an object"),
    "null": (b"null", "holds NoneType"),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nests deeper"),
    "deep enough": (b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}", "nests deeper than 64"),
    "4,500 digits": (b'{"a": ' + b"9" * 4500 + b"}", "integer"),
    "200 digits": (b'{"a": ' + b"9" * 200 + b"}", "integer of more than 100 digits"),
    "half a surrogate pair": (b'{"a": "\\ud800"}', "surrogate"),
    "Latin 1": (b'{"a": "\xe9"}', "not UTF-8 text at byte 7"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "cut off": (b'{"a": ', "Expecting value"),
    "empty": (b"", "Expecting value"),
}

YAML: dict[str, tuple[bytes, str]] = {
    "a list": (b"[1]", "no settings"),
    "a number": (b"5", "no settings"),
    "number as key": (b"5: a", "no settings"),
    "deep": (b"a: " + b"[" * 100_000, "nest"),
    "deep enough": (b"a:\n " + b"[" * 80 + b"]" * 80, "nests deeper than 64 levels, line 2"),
    "aliases": (BOMB.encode(), f"aliases stand for more than {MAX_YAML_NODES:,}"),
    "alias of itself": (b"a: &a [*a]", "*a is used before its end"),
    "4,500 digits": (b"a: 1\nb: " + b"9" * 4500, "number of 4,500 characters, line 2"),
    "half a surrogate pair": (b'a: "\\ud800"', "character"),
    "Latin 1": (b"a: \xe9", "not UTF-8 text at byte 3"),
    "a tab": (b"a:\n\t- b", "cannot be read as YAML"),
    "Python": (b"a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
}


@pytest.mark.parametrize(("content", "reason"), JSON.values(), ids=JSON)
def test_json_beyond_the_limits_is_refused_with_its_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json cannot be read") as caught:
        read_json(path, ModelError)
    assert reason in str(caught.value)


@pytest.mark.parametrize(("content", "reason"), YAML.values(), ids=YAML)
def test_yaml_beyond_the_limits_is_refused_with_its_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(RecipeError, match=r"mine\.yaml cannot be read") as caught:
        read_yaml(path, RecipeError)
    assert reason in str(caught.value)
    assert time.monotonic() - start < 5


def test_aliases_and_a_mark_of_byte_order_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("a: &a {x: 1, y: '${z}'}\nb: {<<: *a, y: 2}\n", encoding="utf-8-sig")
    assert read_yaml(path, RecipeError) == {"a": {"x": 1, "y": "${z}"}, "b": {"x": 1, "y": 2}}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(name: str, stock: dict[str, Path], tmp_path: Path) -> None:
    for file in stock["mistral"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name == "model.safetensors.index.json":  # as if it were not there
        assert read_checkpoint(tmp_path).shards == [tmp_path / "model.safetensors"]
        return
    with pytest.raises(ModelError):
        read_checkpoint(tmp_path)
    with pytest.raises(ModelError, match="not a regular file"):
        read_json(tmp_path / name, ModelError)


@pytest.mark.parametrize(
    "index",
    [
        [],
        {"weight_map": None},
        {"weight_map": []},
        {"weight_map": {"a": None}},
        {"weight_map": {"a": ["b"]}},
        {"weight_map": {"a": "../model.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": ".."}},
        {"weight_map": {"a": ""}},
    ],
)
def test_an_index_names_files_beside_it(index: object, stock: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in stock["mistral"].iterdir():
        # Shards: transformers prefers model.safetensors to an index.
        (folder / file.name.replace("model.safetensors", "model-00001-of-00001.safetensors")).symlink_to(file)
    (tmp_path / "model.safetensors").symlink_to(stock["mistral"] / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"index\.json|incomplete"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is '1000000000'"),
        ({"num_hidden_layers": 10_000, "num_local_experts": 60_000}, "layers x experts is 600,000,000"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "30 is not a multiple of num_attention_heads 4"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "not a multiple of 3 key-value heads"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"vocab_size": 100, "pad_token_id": 100}, "pad_token_id 100 is not one of 100 tokens"),
        ({"rope_scaling": []}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": 5}}, "rope_scaling.rope_type is 5, not a name"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "two"}}, "factor is 'two', not a number"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"quantization_config": []}, "quantization_config"),
    ],
)
def test_sizes_that_no_model_has_are_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_fields(fields, "config.json")
    assert message in str(caught.value)


@pytest.mark.parametrize("path", ["~no_such_user/x", "a\0b", "x" * 300, "/".join(["x" * 200] * 30), "\ud800"])
def test_a_path_that_no_file_can_have_is_one_message(path: str) -> None:
    with pytest.raises(UserError, match="is not a path"):
        user_path(path)
