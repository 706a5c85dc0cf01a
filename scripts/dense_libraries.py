"""Times one token's product with a weight matrix in libraries that run on a CPU, next to our dense kernel, interleaved in one run.

Run: python scripts/dense_libraries.py [--threads 2] [--repeats 9] [--matrix 14336x4096]. Measured results: docs/dense_libraries.md.

Libraries that are not installed are skipped; so is, with the reason, what one of them refuses. Every candidate has as many copies
of the matrix as do not fit into the processor's cache, and each round reads them all once.
"""

from __future__ import annotations

import argparse
import ctypes
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from rich.console import Console
from torch.nn.functional import linear

from sparsify.bench.timing import Clock, read_data
from sparsify.models import ACTIVATIONS
from sparsify.models.quantised import quantise
from sparsify.reporting.tables import Table
from sparsify.runtime import FfnWeights, sparse_ffn

MATRICES = ((4096, 4096), (14336, 4096), (32_000, 4096))
"""[rows, columns]: an attention projection, a feed-forward projection and the output layer of Mistral-7B."""
OUT_OF_CACHE_BYTES = 128 << 20
GROUP = 32
Product = Callable[[], object]


@dataclass
class Candidate:
    """One way to multiply: `copies` makes a call for each copy of the matrix; `num_bytes` is what one call reads."""

    name: str
    num_bytes: float
    products: list[Product]
    weight: float = 1.0
    """Matrices of this shape that one call multiplies."""
    seconds: list[float] = field(default_factory=list)


Make = Callable[[torch.Tensor, int], Candidate]
"""Makes a candidate from fp32 weights [rows, columns] for a number of threads."""


def copies(num_bytes: float) -> range:
    return range(max(1, round(OUT_OF_CACHE_BYTES / num_bytes)))


def ours(format: str) -> Make:
    """Our dense kernel multiplies with three matrices: gate, up and the transposed down projection."""

    def make(weight: torch.Tensor, threads: int) -> Candidate:
        dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(format, torch.bfloat16)
        stored = weight.to(dtype)
        x = torch.randn(1, weight.shape[1]).to(dtype)

        def matrix() -> Any:
            return quantise(stored, cast(Any, format)) if format in ("int8", "int4") else stored.clone()

        size = matrix().nbytes
        blocks = [FfnWeights(matrix(), matrix(), matrix()) for _ in copies(3 * size)]
        drelu = ACTIVATIONS["drelu"]
        products = [lambda one=one: sparse_ffn(x, one, drelu, dense=True, threads=threads) for one in blocks]
        return Candidate(f"ours, {format}", 3 * size, cast(Any, products), weight=3)

    return make


def torch_linear(dtype: torch.dtype) -> Make:
    def make(weight: torch.Tensor, _threads: int) -> Candidate:
        first = weight.to(dtype)
        x = torch.randn(1, weight.shape[1]).to(dtype)
        every = [first.clone() for _ in copies(first.nbytes)]
        name = f"torch linear, {str(dtype).removeprefix('torch.')}"
        return Candidate(name, first.nbytes, [lambda one=one: linear(x, one) for one in every])

    return make


def torch_int8(weight: torch.Tensor, _threads: int) -> Candidate:
    rows, columns = weight.shape
    values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    scales = torch.ones(rows, dtype=torch.bfloat16)
    x = torch.randn(1, columns).bfloat16()
    every = [values.clone() for _ in copies(values.nbytes)]
    run = torch.ops.aten._weight_int8pack_mm
    return Candidate(
        "torch _weight_int8pack_mm",
        values.nbytes + scales.nbytes,
        [lambda one=one: run(x, one, scales) for one in every],
    )


def torch_int4(weight: torch.Tensor, _threads: int) -> Candidate:
    rows, columns = weight.shape
    values = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 2)
    scales = torch.ones(columns // GROUP, rows, 2, dtype=torch.bfloat16)
    x = torch.randn(1, columns).bfloat16()
    run, size = torch.ops.aten._weight_int4pack_mm_for_cpu, packed.nbytes + scales.nbytes
    every = [(packed.clone(), scales.clone()) for _ in copies(size)]
    return Candidate(
        "torch _weight_int4pack_mm_for_cpu", size, [lambda one=one: run(x, one[0], GROUP, one[1]) for one in every]
    )


def torch_dynamic(weight: torch.Tensor, _threads: int) -> Candidate:
    rows, columns = weight.shape
    quantised: Any = torch.quantize_per_tensor(weight, float(weight.abs().max()) / 127, 0, torch.qint8)
    x, size = torch.randn(1, columns), rows * columns
    every = [torch.ops.quantized.linear_prepack(quantised, None) for _ in copies(size)]
    run = torch.ops.quantized.linear_dynamic
    return Candidate(
        f"torch linear_dynamic, int8 ({torch.backends.quantized.engine})",
        size,
        [lambda one=one: run(x, one) for one in every],
    )


def torchao(name: str) -> Make:
    def make(weight: torch.Tensor, _threads: int) -> Candidate:
        from torchao import quantization as q  # pyright: ignore[reportMissingImports]
        from torchao.prototype.quantization import int4 as cpu  # pyright: ignore[reportMissingImports]

        rows, columns = weight.shape
        config, bits = {
            "int8": (lambda: q.Int8WeightOnlyConfig(), 8),
            "int4": (lambda: cpu.PrototypeInt4WeightOnlyConfig(group_size=GROUP), 5),
            "int4 on int8": (lambda: cpu.Int8DynamicActivationInt4WeightConfig(group_size=GROUP), 5),
        }[name]
        size = rows * columns * bits / 8
        every = []
        for _ in copies(size):
            one = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
            one.weight.data.copy_(weight)
            q.quantize_(one, config())
            every.append(one)
        x = torch.randn(1, columns).bfloat16()
        return Candidate(f"torchao, {name} weights", size, [lambda one=one: one(x) for one in every])

    return make


def openvino(format: str) -> Make:
    """A compiled graph of one product; compressed weights are groups of 32 with an fp16 scale, or stored in 16 bits."""

    def make(weight: torch.Tensor, threads: int) -> Candidate:
        import openvino as ov  # pyright: ignore[reportMissingImports]
        from openvino import opset13 as op  # pyright: ignore[reportMissingImports]

        rows, columns = weight.shape
        bits = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8.5, "int4": 4.5}[format]
        size = rows * columns * bits / 8
        core = ov.Core()
        types = {"fp32": ov.Type.f32, "fp16": ov.Type.f16, "bf16": ov.Type.bf16, "int8": ov.Type.i8, "int4": ov.Type.i4}
        requests = []
        x = np.random.default_rng(0).standard_normal((1, columns), dtype=np.float32)
        for _ in copies(size):
            given = op.parameter([1, columns], ov.Type.f32)
            if format in ("int8", "int4"):
                shape = [rows, columns // GROUP, GROUP]
                raw = np.random.default_rng(0).integers(0, 256, int(rows * columns * int(bits) / 8), dtype=np.uint8)
                tensor = ov.Tensor(types[format], shape)
                tensor.data.view(np.uint8).reshape(-1)[:] = raw
                values = op.constant(tensor)
                scales = op.constant(np.full([rows, columns // GROUP, 1], 0.01, dtype=np.float16))
                scaled = op.multiply(op.convert(values, ov.Type.f16), scales)
                matrix = op.convert(op.reshape(scaled, [rows, columns], special_zero=False), ov.Type.f32)
            else:
                matrix = op.convert(op.constant(weight.numpy(), types[format]), ov.Type.f32)
            product = op.matmul(given, matrix, transpose_a=False, transpose_b=True)
            options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
            requests.append(core.compile_model(ov.Model([product], [given]), "CPU", options).create_infer_request())
            requests[-1].set_input_tensor(ov.Tensor(x))
        return Candidate(f"OpenVINO, {format} weights", size, [one.infer for one in requests])

    return make


class _GgmlParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def ggml(kind: GGMLQuantizationType, repacked: bool = False) -> Make:
    """A graph of one product, by the libraries inside llama-cpp-python; `repacked` as llama.cpp loads a model's weights."""

    def make(weight: torch.Tensor, threads: int) -> Candidate:
        base, cpu = _ggml_libraries()
        rows, columns = weight.shape
        values = np.ascontiguousarray(quantize(weight.numpy(), kind)).view(np.uint8)
        backend = cpu.ggml_backend_cpu_init()
        cpu.ggml_backend_cpu_set_n_threads(backend, threads)
        numbers = copies(values.nbytes)
        weights, graphs = (base.ggml_init(_GgmlParams(1 << 24, None, True)) for _ in range(2))
        matrices = [base.ggml_new_tensor_2d(weights, int(kind), columns, rows) for _ in numbers]
        if repacked:
            buffers = _extra_buffers(base, cpu)
            if not buffers or not base.ggml_backend_alloc_ctx_tensors_from_buft(weights, buffers[-1]):
                raise ValueError("no repacked layout on this processor")
        else:
            base.ggml_backend_alloc_ctx_tensors(weights, backend)
        x = base.ggml_new_tensor_2d(graphs, int(GGMLQuantizationType.F32), columns, 1)
        products = [base.ggml_mul_mat(graphs, one, x) for one in matrices]
        built = []
        for one in products:
            built.append(base.ggml_new_graph(graphs))
            base.ggml_build_forward_expand(built[-1], one)
        base.ggml_backend_alloc_ctx_tensors(graphs, backend)
        for one in matrices:
            base.ggml_backend_tensor_set(one, values.ctypes.data, 0, values.nbytes)
        states = np.random.default_rng(0).standard_normal(columns, dtype=np.float32)
        base.ggml_backend_tensor_set(x, states.ctypes.data, 0, states.nbytes)
        name = f"ggml, {kind.name}{' repacked' if repacked else ''}"
        run = base.ggml_backend_graph_compute
        return Candidate(name, values.nbytes, [lambda one=one: run(backend, one) for one in built])

    return make


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def _ggml_libraries() -> tuple[Any, Any]:
    spec = find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    base = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(next(folder.glob("libggml-cpu.*"))), mode=ctypes.RTLD_GLOBAL)
    base.ggml_log_set(_SILENT, None)
    address, size = ctypes.c_void_p, ctypes.c_size_t
    signatures = {
        "ggml_init": (address, _GgmlParams),
        "ggml_new_tensor_2d": (address, address, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
        "ggml_mul_mat": (address, address, address, address),
        "ggml_new_graph": (address, address),
        "ggml_build_forward_expand": (None, address, address),
        "ggml_backend_alloc_ctx_tensors": (address, address, address),
        "ggml_backend_alloc_ctx_tensors_from_buft": (address, address, address),
        "ggml_backend_tensor_set": (None, address, address, size, size),
        "ggml_backend_graph_compute": (ctypes.c_int, address, address),
        "ggml_backend_reg_get_proc_address": (address, address, ctypes.c_char_p),
        "ggml_backend_reg_dev_get": (address, address, size),
        "ggml_backend_cpu_init": (address,),
        "ggml_backend_cpu_reg": (address,),
        "ggml_backend_cpu_set_n_threads": (None, address, ctypes.c_int),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(cpu if "_cpu_" in name else base, name)
        function.restype, function.argtypes = result, arguments
    return base, cpu


def _extra_buffers(base: Any, cpu: Any) -> list[int]:
    """Kinds of memory in which ggml keeps weights in another order."""
    registry = cpu.ggml_backend_cpu_reg()
    found = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
    listed = kinds(found)(base.ggml_backend_reg_dev_get(registry, 0)) if found else []
    every = []
    for one in listed:
        if not one:
            break
        every.append(one)
    return every


G = GGMLQuantizationType
CANDIDATES: dict[str, dict[str, list[Make]]] = {
    "torch": {
        "32 bits": [ours("fp32"), torch_linear(torch.float32)],
        "16 bits": [ours("bf16"), ours("fp16"), torch_linear(torch.bfloat16), torch_linear(torch.float16)],
        "8 bits": [ours("int8"), torch_int8, torch_dynamic],
        "4 bits": [ours("int4"), torch_int4],
    },
    "torchao": {"8 bits": [torchao("int8")], "4 bits": [torchao("int4"), torchao("int4 on int8")]},
    "openvino": {
        "32 bits": [openvino("fp32")],
        "16 bits": [openvino("bf16"), openvino("fp16")],
        "8 bits": [openvino("int8")],
        "4 bits": [openvino("int4")],
    },
    "llama_cpp": {
        "32 bits": [ggml(G.F32)],
        "16 bits": [ggml(G.F16), ggml(G.BF16)],
        "8 bits": [ggml(G.Q8_0)],
        "4 bits": [ggml(G.Q4_0), ggml(G.Q4_0, True)],
    },
}
"""By package, then by bits of a weight."""
PACKAGES = {"llama_cpp": "llama-cpp-python"}


def measure(
    shape: tuple[int, int], bits: str, threads: int, repeats: int, say: Callable[[str], object]
) -> tuple[list[Candidate], float]:
    """All candidates of one matrix, and the memory bandwidth in bytes a second."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    made = list(_made(weight, bits, threads, say))
    data = torch.ones(OUT_OF_CACHE_BYTES // 4)
    clock, reading = Clock("cpu"), list[float]()
    for repeat in range(repeats + 1):
        for one in made:
            start = clock.mark()
            for product in one.products:
                product()
            if repeat:
                one.seconds.append(clock.seconds(start, clock.mark()) / len(one.products))
        start = clock.mark()
        read_data(data, threads)
        reading.append(clock.seconds(start, clock.mark()))
    return made, data.nbytes / median(reading[1:])


def _made(weight: torch.Tensor, bits: str, threads: int, say: Callable[[str], object]) -> Iterator[Candidate]:
    for package, by_bits in CANDIDATES.items():
        if find_spec(package) is None:
            say(f"{PACKAGES.get(package, package)} is not installed")
            continue
        for make in by_bits.get(bits, []):
            try:
                candidate = make(weight, threads)
                candidate.products[0]()
            except Exception as error:  # whatever a library says is a result
                say(f"{package}, {bits}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
                continue
            yield candidate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--matrix", help="ROWSxCOLUMNS; default: all three")
    parser.add_argument("--bits", choices=("32", "16", "8", "4"), help="default: all")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    shapes = [tuple(map(int, given.matrix.split("x")))] if given.matrix else list(MATRICES)
    say = Console(stderr=True, highlight=False).print
    installed = [PACKAGES.get(one, one) for one in CANDIDATES if find_spec(one) is not None]
    say(", ".join(f"{one} {version(one)}" for one in installed), f"{given.threads} thread(s)")
    for shape in shapes:
        for bits in [f"{given.bits} bits"] if given.bits else list(CANDIDATES["torch"]):
            made, speed = measure(cast(Any, shape), bits, given.threads, given.repeats, say)
            table = Table(
                f"{shape[0]}×{shape[1]}, {bits}; memory bandwidth {speed / 1e9:.1f} GB/s",
                ["", "ms", "% of bandwidth", "times as fast as ours"],
            )
            for one in made:
                each = median(one.seconds) / one.weight
                ratios = [
                    a / made[0].weight / (b / one.weight) for a, b in zip(made[0].seconds, one.seconds, strict=True)
                ]
                share = one.num_bytes / one.weight / each / speed
                table.add(one.name, f"{1000 * each:.2f}", f"{share:.0%}", f"{median(ratios):.2f}")
            Console().print(table)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
