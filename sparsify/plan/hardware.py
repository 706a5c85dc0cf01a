"""Hardware that a run is planned for: GPUs by name, or this machine.

Memory sizes and peaks are from data sheets. Everything else is an assumption and is shown as one: prices are rounded
rental list prices, and the share of the peak that training reaches is what well-tuned runs report.
"""

from __future__ import annotations

import os
import re

import torch
from pydantic import BaseModel, ConfigDict

from sparsify.errors import RecipeError, nearest

GB = 10**9
NODE_GPUS = 8
NODE_HOST_BYTES_PER_GPU = 256 * GB
"""Assumed: 2 TB in a node of eight."""
GPU_FRAMEWORK_BYTES = 2 * GB
"""Assumed: CUDA context, libraries' workspaces and NCCL's channels."""
CPU_FRAMEWORK_BYTES = 600_000_000
"""Measured: a rank with everything imported."""
FRAGMENTATION = 0.05
"""Assumed share of the tensors' bytes."""
ASSUMED_MFU = 0.35
CPU_FLOPS_PER_CORE = 20e9
"""Assumed: throughput of one core in the matrix products of small models."""


class Hardware(BaseModel):
    """Devices that one run may use.

    Attributes:
        device_bytes: Memory of one device; on a CPU machine, its memory divided by the processes.
        host_bytes: Host memory of one node, for ZeRO-Offload.
        node_devices: Devices that share one node's memory.
        peak_flops: Dense bf16 peak of one device, FLOP/s.
        mfu: Assumed share of `peak_flops` that training reaches.
        link_bytes_per_second: Assumed bandwidth of one device to the others for collectives.
        host_link_bytes_per_second: Assumed bandwidth of one device to host memory.
        gpu_hour_price: Assumed price of one device for one hour, US dollars.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    devices: int
    device_bytes: int
    host_bytes: int
    node_devices: int
    peak_flops: float
    mfu: float
    link_bytes_per_second: float
    host_link_bytes_per_second: float
    gpu_hour_price: float
    is_cpu: bool = False

    def allowance_bytes(self, tensor_bytes: int) -> int:
        """Assumed memory of a process in addition to its tensors: framework and fragmentation."""
        fixed = CPU_FRAMEWORK_BYTES if self.is_cpu else GPU_FRAMEWORK_BYTES
        return fixed + round(FRAGMENTATION * tensor_bytes)


class Gpu(BaseModel):
    """Data sheet and assumptions of one GPU."""

    model_config = ConfigDict(frozen=True)

    memory_gb: int
    peak_tflops: float
    hour_price: float
    link_gb_per_second: float
    """Inside a node: half of NVLink's or PCIe's data-sheet figure in one direction."""


GPUS = {
    "a100-40gb": Gpu(memory_gb=40, peak_tflops=312, hour_price=1.3, link_gb_per_second=150),
    "a100-80gb": Gpu(memory_gb=80, peak_tflops=312, hour_price=1.8, link_gb_per_second=150),
    "a800-80gb": Gpu(memory_gb=80, peak_tflops=312, hour_price=1.8, link_gb_per_second=100),
    "h100-80gb": Gpu(memory_gb=80, peak_tflops=989, hour_price=2.5, link_gb_per_second=225),
    "h100-pcie-80gb": Gpu(memory_gb=80, peak_tflops=756, hour_price=2.0, link_gb_per_second=32),
    "h200-141gb": Gpu(memory_gb=141, peak_tflops=989, hour_price=3.5, link_gb_per_second=225),
    "l40s-48gb": Gpu(memory_gb=48, peak_tflops=362, hour_price=1.0, link_gb_per_second=16),
    "rtx4090-24gb": Gpu(memory_gb=24, peak_tflops=165, hour_price=0.5, link_gb_per_second=16),
}
ACROSS_NODES_GB_PER_SECOND = 25
"""Assumed: one 400 Gbit/s adapter for each GPU, half used."""
HOST_LINK_GB_PER_SECOND = 20
"""Assumed: reachable bandwidth of PCIe 4.0 x16."""


def named_hardware(text: str, *, host_bytes: int | None = None, gpu_hour_price: float | None = None) -> Hardware:
    """Reads names such as `8xh100-80gb`; without a count it is one device.

    Raises:
        RecipeError: If there is no such GPU.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z0-9-]+)", text.strip().lower())
    name = match[2] if match else text
    if match is None or name not in GPUS or int(match[1] or 1) < 1:
        raise RecipeError(
            f"--hardware is {text!r}.",
            allowed=f"{nearest(name, GPUS)}COUNTxGPU with a GPU of: {', '.join(GPUS)}.",
            next_step="For example: --hardware 8xh100-80gb",
        )
    gpu, devices = GPUS[name], int(match[1] or 1)
    node = min(devices, NODE_GPUS)
    link = gpu.link_gb_per_second if devices <= NODE_GPUS else ACROSS_NODES_GB_PER_SECOND
    return Hardware(
        name=f"{devices}x{name}",
        devices=devices,
        device_bytes=gpu.memory_gb * GB,
        host_bytes=node * NODE_HOST_BYTES_PER_GPU if host_bytes is None else host_bytes,
        node_devices=node,
        peak_flops=gpu.peak_tflops * 1e12,
        mfu=ASSUMED_MFU,
        link_bytes_per_second=link * GB,
        host_link_bytes_per_second=HOST_LINK_GB_PER_SECOND * GB,
        gpu_hour_price=gpu.hour_price if gpu_hour_price is None else gpu_hour_price,
    )


def known_gpu(device_name: str) -> Gpu | None:
    """Entry of GPUS for a driver's device name, e.g. `NVIDIA H100 PCIe`; None if there is none."""
    called = device_name.lower().replace(" ", "")
    fitting = [name for name in GPUS if all(part in called for part in name.rpartition("-")[0].split("-"))]
    return GPUS[max(fitting, key=len)] if fitting else None


def this_machine(processes: int, nodes: int = 1, gpu_hour_price: float | None = None) -> Hardware:
    """This machine: its GPUs, or its memory shared by the processes."""
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        known = known_gpu(properties.name) or GPUS["a100-80gb"]
        return Hardware(
            name=f"{processes * nodes}x{properties.name}",
            devices=processes * nodes,
            device_bytes=properties.total_memory,
            host_bytes=host_bytes,
            node_devices=processes,
            peak_flops=known.peak_tflops * 1e12,
            mfu=ASSUMED_MFU,
            link_bytes_per_second=(known.link_gb_per_second if nodes == 1 else ACROSS_NODES_GB_PER_SECOND) * GB,
            host_link_bytes_per_second=HOST_LINK_GB_PER_SECOND * GB,
            gpu_hour_price=known.hour_price if gpu_hour_price is None else gpu_hour_price,
        )
    cores = os.cpu_count() or 1
    return Hardware(
        name=f"this machine, {cores} CPU cores"
        if nodes == 1
        else f"{nodes} machines like this, {cores} CPU cores each",
        devices=processes * nodes,
        device_bytes=host_bytes // processes,
        host_bytes=host_bytes,
        node_devices=processes,
        peak_flops=CPU_FLOPS_PER_CORE * cores / processes,
        mfu=1.0,
        link_bytes_per_second=1 * GB,
        host_link_bytes_per_second=5 * GB,
        gpu_hour_price=gpu_hour_price or 0.0,
        is_cpu=True,
    )
