"""The bundle reproduces the trained model in a process without this package, and is refused otherwise."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.conversion.manifest import record_folder
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import ExportError
from sparsify.export.bundle import BundleSettings, export
from sparsify.export.check import accept
from sparsify.mixture.lock import make_lock, read_lock, write_lock
from sparsify.mixture.tokens.chat_template import chat_template_text
from sparsify.recipe.compose import load_mixture
from sparsify.runs.load import find_trained, load_trained
from tests.conftest import Setup
from tests.mixture.conftest import ingest_of

Finished = Callable[[Setup], tuple[Path, dict]]

FRESH_PROCESS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, pipeline
bundle = sys.argv[1]
ids = torch.arange(3, 43)[None]
model = AutoModelForCausalLM.from_pretrained(bundle, trust_remote_code=True)
text = pipeline("text-generation", model=bundle, trust_remote_code=True)("code 1:", max_new_tokens=3)
assert not any(name.split(".")[0] == "sparsify" for name in sys.modules)
print(json.dumps({"logits": model(ids).logits.double().tolist(), "text": text[0]["generated_text"]}))
"""


@pytest.fixture(scope="module", params=["mistral", "mixtral"])
def trained(request: pytest.FixtureRequest, finished: Finished) -> Path:
    return finished(Setup(request.param, 3 if request.param == "mixtral" else 2, 2, "bf16"))[0]


def run_stranger(code: str, bundle: Path, scratch: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch)}
    command = [sys.executable, "-I", "-c", code, str(bundle)]
    return subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)


def test_a_fresh_process_reproduces_the_trained_logits(trained: Path, tmp_path: Path) -> None:
    result = run_stranger(FRESH_PROCESS, trained / "export", tmp_path)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    found = find_trained(trained)
    assert found is not None
    expected = load_trained(found)(torch.arange(3, 43)[None]).logits.double()
    assert torch.equal(torch.tensor(answer["logits"], dtype=torch.float64), expected)
    assert answer["text"].startswith("code 1:")


BASE_MODEL = """
import json, sys, torch
from transformers import AutoModel, AutoModelForCausalLM
bundle, ids = sys.argv[1], torch.arange(3, 43)[None]
base, info = AutoModel.from_pretrained(bundle, trust_remote_code=True, output_loading_info=True)
whole = AutoModelForCausalLM.from_pretrained(bundle, trust_remote_code=True)
built = AutoModel.from_config(whole.config, trust_remote_code=True)
assert not any(name.split(".")[0] == "sparsify" for name in sys.modules)
with torch.no_grad():
    same = torch.equal(base(ids).last_hidden_state, whole.model(ids).last_hidden_state)
names = [type(model).__name__ for model in (base, built)]
blocks = [[getattr(layer.mlp, "experts", layer.mlp) for layer in model.layers] for model in (base, built)]
activations = [[block.ffn_activation.name for block in own] for own in blocks]
print(json.dumps([same, names, activations, sorted(info["missing_keys"])]))
"""


def test_engines_that_build_on_the_base_model_get_its_activation(trained: Path, tmp_path: Path) -> None:
    result = run_stranger(BASE_MODEL, trained / "export", tmp_path)
    assert result.returncode == 0, result.stderr
    same, names, activations, missing = json.loads(result.stdout.splitlines()[-1])
    assert same
    assert len(set(names)) == 1
    assert names[0] in ("SparseMistralModel", "SparseMixtralModel")
    assert activations == [["drelu", "drelu"]] * 2
    assert missing == []


def test_readers_of_older_configurations_find_their_fields(trained: Path) -> None:
    config = json.loads((trained / "export" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"


def test_without_remote_code_it_fails_loudly(trained: Path, tmp_path: Path) -> None:
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    result = run_stranger(code, trained / "export", tmp_path)
    assert result.returncode != 0
    assert "trust_remote_code" in result.stderr


def test_the_bundle_is_complete_with_its_hashes(trained: Path) -> None:
    bundle = trained / "export"
    sums = dict(reversed(line.split("  ")) for line in (bundle / "SHA256SUMS").read_text().splitlines())
    for name, expected in sums.items():
        assert hashlib.sha256((bundle / name).read_bytes()).hexdigest() == expected, name
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files - {"SHA256SUMS"} == set(sums)
    assert files >= {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "activations.py",
        "ffn_activation.py",
        "tokenizer.json",
        "tokenizer.model",
        "README.md",
        "sparsity/report.json",
        "sparsity/per_layer.csv",
        "sparsity/index.html",
        "training/recipe.yaml",
        "training/mixture.lock.json",
        "training/metrics.jsonl",
        "training/environment.json",
        "training/recorded.json",
        "training/reference.safetensors",
    }


def test_the_card_has_the_measured_numbers(trained: Path) -> None:
    card = (trained / "export" / "README.md").read_text()
    report = json.loads((trained / "report" / "report.json").read_text())
    assert f"{100 * report['product_zeros']:.1f}% of its feed-forward activations" in card
    for stage in report["stages"]:
        assert f"| {stage['name']} | {stage['loss']:.3f} |" in card
    assert "No dense baseline was trained" in card
    assert "| questions | instruction | 0.2500 | 0.2500 | 1,024 |" in card


def test_generation_with_cache_and_padding_equals_plain_forwards(trained: Path) -> None:
    bundle = trained / "export"
    model, tokenizer = load_sparse(bundle, dtype=torch.float32), load_tokenizer(bundle)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    prompts = ["code 1: word1", "What is 7? It is a longer prompt than the other"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    # Without min_new_tokens a row that happens to end its document would be padded from there on.
    together = model.generate(**batch, min_new_tokens=5, max_new_tokens=5, do_sample=False, pad_token_id=2)[:, -5:]
    for row, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for _ in range(5):
            logits = model(ids, use_cache=False).logits[:, -1]
            logits[:, tokenizer.eos_token_id] = -torch.inf  # as min_new_tokens forbids it
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(ids[0, -5:], together[row])


TOKENIZER_ALONE = """
import json, os, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
chat = [{"role": "user", "content": "code 1:"}]
print(json.dumps([tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), os.listdir(sys.argv[2])]))
"""


def test_the_tokenizer_loads_without_code_with_the_template_that_trained(trained: Path, tmp_path: Path) -> None:
    code = TOKENIZER_ALONE.replace("sys.argv[2]", repr(str(tmp_path)))
    result = run_stranger(code, trained / "export", tmp_path)
    assert result.returncode == 0, result.stderr
    text, modules = json.loads(result.stdout.splitlines()[-1])
    assert text == "<|user|>\ncode 1:<|end|>\n<|assistant|>\n"
    assert modules == [], "the bundle's code was copied to be run"
    assert "chat template in `chat_template.jinja`" in (trained / "export" / "README.md").read_text()


@pytest.mark.parametrize("setting", [None, "chatml", "{% for m in messages %}{{ m['content'] }}{% endfor %}"])
def test_the_template_of_the_data_replaces_the_bases(
    setting: str | None, finished: Finished, mixture_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished(Setup("mistral", 2, 2, "bf16"))[0], run)
    (run / "initial" / "chat_template.jinja").unlink()  # a base without one
    record_folder(run / "initial")
    recipe = load_mixture(str(mixture_file))
    recipe.chat_template = setting
    tokenizer = load_tokenizer(run / "initial")
    source = ingest_of(recipe, "questions", tokenizer, tmp_path / "cache").run()
    lock = make_lock(
        {"questions": source}, {"questions": 1.0}, planned_sequences={"questions": 1}, sequence_length=8, seed=0
    )
    kept = read_lock(run / "mixture.lock.json")
    write_lock(kept.model_copy(update={"chat_template": lock.chat_template}), run / "mixture.lock.json")
    export(run, tmp_path / "bundle", settings=BundleSettings(checked=False))
    assert load_tokenizer(tmp_path / "bundle").chat_template == chat_template_text(setting, tokenizer)


def test_an_export_never_overwrites(trained: Path) -> None:
    before = (trained / "export" / "SHA256SUMS").read_bytes()
    with pytest.raises(ExportError, match="already exists; an export never overwrites"):
        export(trained, trained / "export")
    assert (trained / "export" / "SHA256SUMS").read_bytes() == before


@pytest.mark.parametrize("damage", ["weights", "activation"])
def test_a_bundle_with_other_outputs_is_refused(damage: str, finished: Finished, tmp_path: Path) -> None:
    run, _ = finished(Setup("mistral", 2, 2, "bf16"))
    bundle = tmp_path / "bundle"
    shutil.copytree(run / "export", bundle)
    reference = next((run / "checkpoints").glob("step-*")) / "reference.safetensors"
    if damage == "weights":
        tensors = load_file(bundle / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"].neg_()
        save_file(tensors, bundle / "model.safetensors", metadata={"format": "pt"})
        words = "has other logits than the trained model"
    else:
        config = json.loads((bundle / "config.json").read_text())
        (bundle / "config.json").write_text(json.dumps(config | {"ffn_activation": "reglu"}))
        words = "loads with the activation reglu; it was trained with drelu"
    with pytest.raises(ExportError, match=words):
        accept(bundle, "drelu", ["bf16"], reference)
