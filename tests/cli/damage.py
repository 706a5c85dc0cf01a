"""A user's working directory and what can be wrong with the parts in it, for test_bad_input.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
import yaml
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

from sparsify.conversion.tokenizer import copy_tokenizer
from sparsify.recipe.compose import compose_recipe, save_recipe
from tests.conftest import SHAPE, TOKENIZER

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
STATE = '{"step": 2, "seen_tokens": 1024, "processes": 1, "zero_stage": 1, "drawn_sequences": {}}'


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
        return [*mine, "launch.threads_per_process=1", *overrides]

    def train(self, *overrides: str, run: str | Path = "run") -> list[str]:
        return ["train", str(self.recipe), *self.overrides(*overrides, run=run)]

    def run(self, latest: str | None = None, state: str = STATE) -> str:
        """A run folder; where `latest` names a checkpoint, with one whose weights were cut off."""
        recipe = compose_recipe(str(self.recipe), self.overrides())
        save_recipe(recipe, self.root / "run" / "recipe.yaml")
        if latest is not None:
            shutil.copytree(self.stock["mistral"], self.root / "run" / "initial")
            self.write("run/checkpoints/latest", latest)
            self.write("run/checkpoints/step-00000002/state.json", state)
            weights = self.root / "run/checkpoints/step-00000002/mp_rank_00_model_states.pt"
            torch.save({"module": torch.zeros(1000)}, weights)
            content = weights.read_bytes()
            entry = {"size_bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
            manifest = json.dumps({"files": {weights.name: entry}})
            self.write("run/checkpoints/step-00000002/manifest.json", manifest)
            cut(weights, weights.stat().st_size // 2)
        return "run"


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
