"""Small real parts for the tests: checkpoints, texts and a recipe, made on the spot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests that move HOME still find the kernels that were compiled before.
os.environ.setdefault("SPARSIFY_KERNEL_CACHE", str(Path("~/.cache/sparsify/kernels").expanduser()))

import pytest
import torch
import torch.distributed as dist
import yaml
from filelock import FileLock
from hypothesis import settings
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from sparsify.conversion.tokenizer import copy_tokenizer
from sparsify.recipe.catalogue import PACKAGE
from sparsify.runtime.build import build, find_compiler, kernels

# How long an example takes depends on what else the machine does.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

TOKENIZER = PACKAGE / "assets" / "quickstart_base"
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
STOCK = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral_tied": (MistralForCausalLM, MistralConfig, {"tie_word_embeddings": True}),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
}


FAMILY_STOCK: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama": {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "olmo2": {},
    "olmo3": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 24, "pad_token_id": 0},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
"""For each family that can be held, what its smallest stock checkpoint has in addition to SHAPE."""


def stock_model(kind: str, seed: int = 0) -> torch.nn.Module:
    """A small stock model with random weights."""
    model_class, config_class, extra = STOCK[kind]
    torch.manual_seed(seed)
    return model_class(config_class(**SHAPE | extra)).eval()


def family_model(kind: str) -> Any:
    """A small stock model of a family; what transformers initialises to one number, such as norms, is random, too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **SHAPE | {"vocab_size": 2064} | FAMILY_STOCK[kind])
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.7, 0.2)
    return model


class Shared:
    """Folders that all workers of a session use, each filled by the first that needs it: a run takes half a minute."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        own = factory.getbasetemp()
        self.root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
        self.root.mkdir(exist_ok=True)

    def __call__(self, name: str, fill: Callable[[Path], None]) -> Path:
        folder, done = self.root / name, self.root / f"{name}.done"
        with FileLock(self.root / f"{name}.lock"):
            if not done.is_file():
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(tmp_path_factory)


@pytest.fixture(scope="session")
def compiled() -> None:
    """The kernels, if there is a compiler: once for all workers, and for the next session, whose cache is the same."""
    if compiler := find_compiler():
        build(compiler)


@pytest.fixture(scope="session")
def native(compiled: None) -> str:
    """The backend name of the compiled kernels."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    assert kernels() is not None
    return "native"


@pytest.fixture(scope="session")
def stock(shared: Shared) -> dict[str, Path]:
    """Stock checkpoint folders by kind, as a user would have them."""

    def fill(root: Path) -> None:
        for kind in STOCK:
            stock_model(kind).save_pretrained(root / kind)
            copy_tokenizer(TOKENIZER, root / kind)

    root = shared("stock", fill)
    return {kind: root / kind for kind in STOCK}


@pytest.fixture(scope="session")
def family_stock(shared: Shared) -> dict[str, Path]:
    """Stock checkpoint folders of all families."""

    def fill(root: Path) -> None:
        for kind in FAMILY_STOCK:
            family_model(kind).save_pretrained(root / kind)
            copy_tokenizer(TOKENIZER, root / kind)

    root = shared("families", fill)
    return {kind: root / kind for kind in FAMILY_STOCK}


@pytest.fixture(scope="session")
def mixture_file(shared: Shared) -> Path:
    """A mixture of two pretraining sources and one instruction source, with its text."""
    return shared("mixture", _write_mixture) / "own_mixture.yaml"


def _write_mixture(root: Path) -> None:
    for name in ("code", "prose"):
        lines = [json.dumps({"text": f"{name} {i}: " + f"word{i % 7} value{i % 11} " * 20}) for i in range(200)]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    turns = [json.dumps({"prompt": f"What is {i}?", "response": f"It is number {i}." * 3}) for i in range(300)]
    (root / "questions.jsonl").write_text("\n".join(turns))
    sources = {
        "code": {"files": [str(root / "code.jsonl")], "token_share": 0.5},
        "prose": {"files": [str(root / "prose.jsonl")], "token_share": 0.25},
        "questions": {
            "files": [str(root / "questions.jsonl")],
            "group": "instruction",
            "token_share": 0.25,
        },
    }
    path = root / "own_mixture.yaml"
    path.write_text(yaml.safe_dump({"name": "own", "sources": sources, "validation_fraction": 0.2}))


@pytest.fixture(scope="session")
def recipe_file(shared: Shared, stock: dict[str, Path]) -> Path:
    """A user's own recipe, outside the catalogue: six steps from the small stock Mistral."""
    recipe = RECIPE.format(source=stock["mistral"])
    return shared("recipe", lambda root: _write(root / "tiny.yaml", recipe)) / "tiny.yaml"


def _write(path: Path, text: str) -> None:
    path.write_text(text)


RECIPE = """
# sparsify train tiny.yaml mixture=own_mixture.yaml
defaults:
  - recipe_schema
  - activation: drelu
  - mixture: quickstart
  - engine: zero1
  - eval: quickstart
  - _self_
name: tiny
model: {{source: {source}}}
training: {{budget_tokens: 3072, sequence_length: 64, global_batch_size: 8, micro_batch_size: 2, precision: fp32}}
optimizer: {{peak_learning_rate: 3.0e-3, final_learning_rate: 3.0e-4, warmup_tokens: 512}}
checkpoint: {{every_tokens: 1024}}
eval: {{every_tokens: 1536, validation_sequences_per_source: 3, report_tokens: 512, sample_tokens: 4, sample_prompts: [code], time_decoding: false}}
"""


STEPS = 8


SPARSIFY = [sys.executable, "-c", "from sparsify.cli.main import main; main()"]
"""The command, of the package that Python finds: `sparsify` itself may not be on the path."""


class Setup(NamedTuple):
    """One way to train the small model."""

    kind: str
    stage: int
    processes: int
    precision: str


class Command:
    """Builds the command of a setup, with the run folder of its own."""

    def __init__(self, recipe: Path, mixture: Path, stock: dict[str, Path], root: Path) -> None:
        self._recipe, self._mixture, self._stock, self.root = recipe, mixture, stock, root

    def __call__(self, setup: Setup, run: Path) -> list[str]:
        overrides = [
            f"mixture={self._mixture}",
            f"model.source={self._stock[setup.kind]}",
            f"engine=zero{setup.stage}",
            f"launch.processes={setup.processes}",
            f"training.precision={setup.precision}",
            f"training.budget_tokens={STEPS * 512}",
            "eval.every_tokens=2048",
            "checkpoint.keep_every_tokens=2048",
            f"run_dir={run}",
            f"cache_dir={self.root / 'cache'}",
            f"training.count_zeros={setup.processes == 2}",
            f"tracking.wandb={'offline' if setup.processes == 1 else 'disabled'}",
        ]
        return [*SPARSIFY, "train", str(self._recipe), "--json", *overrides]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as the only rank of a group."""
    store = tmp_path_factory.mktemp("rank") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def command(
    recipe_file: Path,
    mixture_file: Path,
    stock: dict[str, Path],
    shared: Shared,
) -> Command:
    return Command(recipe_file, mixture_file, stock, shared("runs", lambda _: None))


@pytest.fixture(scope="session")
def finished(command: Command, shared: Shared) -> Callable[[Setup], tuple[Path, dict]]:
    """Trains a setup from beginning to end, once, and returns its run folder and what the command printed."""

    def train(folder: Path, setup: Setup) -> None:
        asked = command(setup, folder / "run")
        result = subprocess.run(asked, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        (folder / "printed.json").write_text(result.stdout[result.stdout.index("\n{") :])

    def run_of(setup: Setup) -> tuple[Path, dict]:
        name = "-".join(map(str, setup))
        folder = shared(name, lambda folder: train(folder, setup))
        return folder / "run", json.loads((folder / "printed.json").read_text())

    return run_of
