"""What somebody else's files may not do: run code, read the environment. Each row of docs/security.md is tried with a payload."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparsify.cli.main import app
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import EvaluationError, RecipeError, RunError, UserError
from sparsify.evaluation.request import check_suite_code, suite_of
from sparsify.evaluation.suite import load_suite
from sparsify.evaluation.tasks import build_tasks, check_code, task_sources
from sparsify.launch import hosts
from sparsify.recipe.compose import compose_recipe, load_mixture, load_recipe, to_yaml
from sparsify.recipe.engine import LaunchSection
from sparsify.runs.shards import plain_shards
from sparsify.runtime import build as kernel_cache
from sparsify.trust import TRUST, without_secrets

SECRET = "hf_planted_secret"
RECIPE = """
defaults: [recipe_schema, activation: drelu, mixture: quickstart, engine: zero1, eval: quickstart, _self_]
name: theirs
model: {{source: base}}
training: {{budget_tokens: 3072, sequence_length: 64, global_batch_size: 8, micro_batch_size: 2, precision: fp32}}
optimizer: {{peak_learning_rate: 1.0e-3, final_learning_rate: 1.0e-4, warmup_tokens: 512}}
checkpoint: {{every_tokens: 1024}}
{more}
"""


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What a planted payload creates when it runs."""
    return tmp_path / "ran"


@pytest.fixture(autouse=True)
def no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line writes the user's word into the environment; every test begins without."""
    monkeypatch.setenv(TRUST, "")


def command(*arguments: object) -> tuple[int, str]:
    """Exit code and output, where a user's mistake is an exception that `main` would print."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.output + str(result.exception or "")


# Suites with code


def theirs(folder: Path, mark: Path, task: str) -> Path:
    """A recipe with a suite next to it, whose task names `evil.py`."""
    (folder / "evil.py").write_text(
        f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\n\n\ndef items(documents):\n    return documents\n"
    )
    (folder / "task.yaml").write_text(task)
    (folder / "suite.yaml").write_text("name: theirs\ntasks: {probe: {task: task.yaml}}\n")
    (folder / "text.jsonl").write_text(json.dumps({"question": "a", "gold": 0}) + "\n")
    recipe = folder / "theirs.yaml"
    recipe.write_text(RECIPE.format(more=f"eval: {{suite: {folder / 'suite.yaml'}}}"))
    return recipe


PLAIN = """
task: probe
dataset_path: json
dataset_kwargs: {data_files: {test: text.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: gold
doc_to_choice: [a, b]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
CODE = {
    "file next to it": "process_docs: !function evil.items",
    "any installed module": "process_docs: !function os.getcwd",
    "inside a list": "filter_list: [{name: x, filter: [{function: !function evil.items}]}]",
    "script of a metric": "metric_list: [{metric: ./evil.py}]",
    "script by its own key": "metric_list: [{metric: acc, hf_evaluate: true}]",
    "included": "include: other.yaml",
}


@pytest.mark.parametrize("way", CODE)
def test_reading_a_recipe_never_imports_its_suite(
    way: str, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = [line for line in PLAIN.splitlines() if not line.startswith(CODE[way].partition(":")[0])]
    recipe = theirs(tmp_path, mark, "\n".join([*lines, CODE[way]]))
    (tmp_path / "other.yaml").write_text("process_results: !function evil.items\n")
    code, said = command("recipes", "validate", recipe)
    assert code == 0, said
    assert "--trust-code" in said
    assert ("evil" in said) or ("os.getcwd" in said) or ("metric acc" in said)
    with pytest.raises(EvaluationError, match="runs Python code of its own") as refused:
        check_suite_code(compose_recipe(str(recipe)).eval)
    assert "--trust-code" in str(refused.value)
    found = suite_of(compose_recipe(str(recipe)).eval)
    assert found is not None
    with pytest.raises(EvaluationError, match="runs Python code of its own"):
        build_tasks(found[1][0])
    assert not mark.exists()


def test_the_code_of_a_suite_has_no_secrets(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = theirs(tmp_path, mark, PLAIN + "process_docs: !function evil.items\n")
    seen = tmp_path / "seen"
    (tmp_path / "evil.py").write_text(
        f"import os\nopen({str(seen)!r}, 'w').write(str(dict(os.environ)))\n\n\ndef items(documents):\n    return documents\n"
    )
    for name, value in {"HF_HUB_OFFLINE": "1", TRUST: "1", "HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET}.items():
        monkeypatch.setenv(name, value)
    found = suite_of(compose_recipe(str(recipe)).eval)
    assert found is not None
    build_tasks(found[1][0])
    assert "HF_HUB_OFFLINE" in seen.read_text()
    assert SECRET not in seen.read_text()


def test_the_users_word_loads_the_code(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = theirs(tmp_path, mark, PLAIN + "process_docs: !function evil.items\n")
    monkeypatch.setenv(TRUST, "1")
    found = suite_of(compose_recipe(str(recipe)).eval)
    assert found is not None
    check_code(found[1])
    assert not mark.exists()
    build_tasks(found[1][0])
    assert mark.exists()


def test_a_plain_task_and_the_shipped_functions_need_no_word(tmp_path: Path, mark: Path) -> None:
    recipe = theirs(tmp_path, mark, PLAIN)
    check_suite_code(compose_recipe(str(recipe)).eval)
    check_code(task_sources(load_suite("quick"), None))


def test_a_tasks_template_reaches_nothing_but_its_item(tmp_path: Path, mark: Path) -> None:
    payload = f"{{{{ cycler.__init__.__globals__.os.mkdir('{mark}') }}}}"
    recipe = theirs(tmp_path, mark, PLAIN.replace("{{question}}", payload))
    found = suite_of(compose_recipe(str(recipe)).eval)
    assert found is not None
    with pytest.raises(EvaluationError, match="access to attribute '__init__' of 'type' object is unsafe"):
        build_tasks(found[1][0])
    assert not mark.exists()


@pytest.mark.parametrize("arguments", [["train"], ["train", "-m"]])
def test_train_refuses_before_it_writes_a_checkpoint(arguments: list[str], tmp_path: Path, mark: Path) -> None:
    recipe = theirs(tmp_path, mark, PLAIN + "process_docs: !function evil.items\n")
    code, said = command(*arguments, recipe, f"run_dir={tmp_path / 'run'}")
    assert code != 0
    assert "runs Python code of its own" in said
    assert not mark.exists()
    assert not (tmp_path / "run" / "initial").exists()


# Recipes that read the environment, or make Hydra import


@pytest.mark.parametrize("payload", ["x${oc.env:HF_TOKEN}", "${oc.decode:${oc.env:HF_TOKEN,none}}"])
def test_a_recipe_cannot_read_the_environment(payload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    recipe = tmp_path / "theirs.yaml"
    recipe.write_text(RECIPE.format(more=f"run_dir: '{payload}'"))
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"name: own\nsources: {{a: {{files: ['{payload}'], token_share: 1}}}}\n")
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(to_yaml(compose_recipe("quickstart")).replace("name: quickstart", f"name: '{payload}'", 1))
    for read in (
        lambda: compose_recipe(str(recipe)),
        lambda: compose_recipe("quickstart", [f"name='{payload}'"]),
        lambda: compose_recipe("quickstart", [f"mixture={mixture}"]),
        lambda: load_mixture(str(mixture)),
        lambda: load_recipe(resolved),
    ):
        with pytest.raises(RecipeError, match=r"oc\.env:HF_TOKEN") as refused:
            read()
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "more", ["hydra: {searchpath: ['pkg://planted']}", "hydra: {searchpath: ['structured://planted']}"]
)
def test_a_recipe_cannot_make_hydra_import(
    more: str, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "planted"
    package.mkdir()
    (package / "__init__.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tmp_path / "theirs.yaml"
    recipe.write_text(RECIPE.format(more=more))
    with pytest.raises(RecipeError, match="settings of Hydra itself"):
        compose_recipe(str(recipe))
    assert not mark.exists()
    assert "planted" not in sys.modules


# Pickles


def planted_shard(path: Path, mark: Path) -> None:
    torch.save({"module": {"weight": torch.ones(2)}, "extra": Payload(mark)}, path)


def test_a_shard_with_code_is_refused_and_not_run(tmp_path: Path, mark: Path) -> None:
    planted_shard(tmp_path / "shard.pt", mark)
    with pytest.raises(RunError, match="could run code") as refused, plain_shards(tmp_path):
        torch.load(tmp_path / "shard.pt", weights_only=False)  # as DeepSpeed does
    assert "mkdir" in str(refused.value)
    assert not mark.exists()
    torch.load(tmp_path / "shard.pt", weights_only=False)  # the payload works, and nothing is left switched
    assert mark.exists()


# The kernel cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel cache with a compiler that writes what it is compiling."""
    folder = tmp_path / "kernels"
    monkeypatch.setenv("SPARSIFY_KERNEL_CACHE", str(folder))
    monkeypatch.setattr(kernel_cache, "compile_kernels", lambda _, to, library: to.write_bytes(b"ours"))
    return folder


def test_only_a_library_of_its_own_content_is_loaded(cache: Path) -> None:
    library = kernel_cache.build("/bin/true")
    assert library.read_bytes() == b"ours"
    assert cache.stat().st_mode & 0o777 == 0o700
    assert kernel_cache.build("/bin/true") == library
    library.write_bytes(b"planted")
    assert kernel_cache.build("/bin/true").read_bytes() == b"ours"


def test_a_planted_link_is_neither_loaded_nor_written_through(cache: Path, tmp_path: Path) -> None:
    library = kernel_cache.build("/bin/true")
    outside = tmp_path / "outside.so"
    library.rename(outside)
    library.symlink_to(outside)
    kernel_cache.build("/bin/true")
    assert not library.is_symlink()
    assert outside.read_bytes() == b"ours"


@pytest.mark.parametrize("plant", ["link", "writable", "writable parent", "another user's"])
def test_a_cache_that_others_can_change_is_not_used(
    plant: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plant == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        cache.symlink_to(tmp_path / "elsewhere")
    else:
        cache.mkdir(mode=0o700)
    if plant == "writable":
        cache.chmod(0o777)
    if plant == "writable parent":
        tmp_path.chmod(0o777)
    if plant == "another user's":
        monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(OSError, match="the cache"):
        kernel_cache.build("/bin/true")
    assert not list(tmp_path.rglob("*.so"))
    tmp_path.chmod(0o700)


# Hosts


def test_nothing_of_a_hostfile_becomes_an_option_of_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process in place of ssh writes its arguments down."""
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path / "arguments"}\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("HF_HOME", "/data/hub")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("gpu1 slots=1\ngpu2 slots=1\n")
    with hosts.placement(LaunchSection(hostfile=str(hostfile)), ["train", "quickstart"]):
        pass
    options, _, rest = (tmp_path / "arguments").read_text().partition("\n--\n")
    assert options.splitlines() == ["-o", "BatchMode=yes"]
    assert rest.startswith("gpu2\n")
    assert "HF_HOME=/data/hub" in rest
    assert SECRET not in rest
    hostfile.write_text("gpu1 slots=1\n-oProxyCommand=touch slots=1\n")
    with pytest.raises(RunError, match="'-oProxyCommand=touch' is not the name of a host"):
        hosts.read_hostfile(str(hostfile))


def test_secrets_are_known_by_their_names() -> None:
    secret = [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_PROFILE",
        "DB_PASSWORD",
    ]
    plain = ["PATH", "HF_HOME", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES", "WANDB_PROJECT"]
    assert list(without_secrets(dict.fromkeys([*secret, *plain], "x"))) == plain


# Tokenizers


def test_a_tokenizer_never_runs_or_offers_to_run_its_folders_code(
    stock: dict[str, Path], tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(stock["mistral"], folder)
    code = f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n"
    (folder / "evil.py").write_text(code)
    for name, field in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        path = folder / name
        reference = "evil.Evil" if field == "AutoConfig" else [None, "evil.Evil"]
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"auto_map": {field: reference}, "model_type": "evil"})
        )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it was offered to run that code"))
    with suppress(UserError):
        load_tokenizer(folder)
    assert not mark.exists()
