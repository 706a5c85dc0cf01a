"""Reads a PowerInfer file and computes logits by the engine's documented arithmetic, independent of the package."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
TEXT, ARRAY = 8, 9
F32, F16, Q4_0, Q8_0, I32_OF_POWERINFER = 0, 1, 2, 8, 18
ALIGNMENT = 32


class File:
    """A GGUF of version 3: its magic, keys, and tensors by name as (type, shape [rows, columns], bytes)."""

    def __init__(self, path: Path) -> None:
        self._data, self._at = path.read_bytes(), 4
        self.magic = self._data[:4]
        assert self._scalar("I") == 3
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        self.keys = {self._text(): self._value(self._scalar("I")) for _ in range(num_keys)}
        heads = [self._head() for _ in range(num_tensors)]
        start = -(-self._at // ALIGNMENT) * ALIGNMENT
        self.types = {name: kind for name, kind, _, _ in heads}
        self.num_bytes = dict(
            zip(self.types, np.diff([*(at for *_, at in heads), len(self._data) - start]), strict=True)
        )
        self.tensors = {name: self._read(kind, shape, start + at) for name, kind, shape, at in heads}

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _text(self) -> str:
        length = self._scalar("Q")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == TEXT:
            return self._text()
        if kind == ARRAY:
            inner, length = self._scalar("I"), self._scalar("Q")
            return [self._value(inner) for _ in range(length)]
        return self._scalar(SCALARS[kind])

    def _head(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._text()
        shape = tuple(self._scalar("Q") for _ in range(self._scalar("I")))[::-1]
        return name, self._scalar("I"), shape, self._scalar("Q")

    def _read(self, kind: int, shape: tuple[int, ...], at: int) -> torch.Tensor:
        count = int(np.prod(shape))
        if kind == Q4_0:
            blocks = np.frombuffer(self._data, np.uint8, count // 32 * 18, at).reshape(-1, 18)
            scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
            nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
            values = scale * (nibbles.astype(np.float32) - 8)
        elif kind == Q8_0:
            blocks = np.frombuffer(self._data, np.uint8, count // 32 * 34, at).reshape(-1, 34)
            values = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].copy().view(np.int8)
        else:
            dtype = {F32: np.float32, F16: np.float16, I32_OF_POWERINFER: np.int32}[kind]
            values = np.frombuffer(self._data, dtype, count, at)
        wanted = np.int64 if kind == I32_OF_POWERINFER else np.float32
        return torch.from_numpy(values.reshape(shape).astype(wanted))


def gpu_bytes_left(file: File, budget_gb: float, context: int) -> int:
    """What the engine has left for neurons of a --vram-budget, after everything else that it moves to a GPU."""
    keys = file.keys
    moved = (name for name in file.types if not re.search("token_embd|ffn_(gate|up|down_t)", name))
    values = keys["bamboo.rope.dimension_count"] * keys["bamboo.attention.head_count_kv"] * keys["bamboo.block_count"]
    return int(budget_gb * 2**30) - sum(int(file.num_bytes[name]) for name in moved) - 2 * 2 * values * context


@torch.no_grad()
def engine_logits(file: File, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of one sequence, [tokens, vocabulary]."""
    keys, weights = file.keys, file.tensors
    assert file.magic == b"PWRI"
    assert keys["general.architecture"] == "bamboo"
    epsilon = keys["bamboo.attention.layer_norm_rms_epsilon"]
    x = weights["token_embd.weight"][input_ids]
    for layer in range(keys["bamboo.block_count"]):
        own = {
            name.removeprefix(f"blk.{layer}.").removesuffix(".weight"): tensor
            for name, tensor in weights.items()
            if name.startswith(f"blk.{layer}.")
        }
        x = x + _attention(keys, own, _norm(x, own["attn_norm"], epsilon))
        # The predictor gets the residual itself; what it leaves out is never computed.
        on = torch.relu(x @ own["fc1"].T) @ own["fc2"].T >= keys["powerinfer.sparse_threshold"]
        normed = _norm(x, own["ffn_norm"], epsilon)
        h = torch.relu(normed @ own["ffn_gate"].T) * torch.relu(normed @ own["ffn_up"].T)
        x = x + (h * on) @ own["ffn_down_t"]
    return _norm(x, weights["output_norm.weight"], epsilon) @ weights["output.weight"].T


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


def _attention(keys: dict[str, Any], own: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    heads, kv_heads = keys["bamboo.attention.head_count"], keys["bamboo.attention.head_count_kv"]
    base = keys.get("bamboo.rope.freq_base", 10000.0)
    size = keys["bamboo.rope.dimension_count"]
    query = _rope((x @ own["attn_q"].T).unflatten(-1, (heads, size)), base)
    key = _rope((x @ own["attn_k"].T).unflatten(-1, (kv_heads, size)), base)
    value = (x @ own["attn_v"].T).unflatten(-1, (kv_heads, size))
    key, value = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / size**0.5
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1) @ own["attn_output"].T


def _rope(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotates neighbouring pairs, like ggml. x: [tokens, heads, size]"""
    size = x.shape[-1]
    angles = torch.outer(torch.arange(len(x)), base ** (-torch.arange(0, size, 2) / size))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
