"""Data-sheet values of the GPUs that `bsq-ray plan` supports.

Sources: NVIDIA's data sheets of RTX A5000, RTX A6000, A100, H100 (SXM5), L4 and A10, and its white paper on the Ada
architecture (GeForce RTX 4090). Values are rounded; verify them before a purchase. Tensor-core throughput is dense,
half the value that data sheets report for structured sparsity. The link bandwidth is that between two GPUs of a node in
one direction: PCIe 4.0 x16, or NVLink in A100 and H100 nodes. NVLink bridges between pairs of GPUs are not considered.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPUSpec:
    """Properties of one GPU.

    Attributes:
        product_name: name for users.
        bf16_tflops: dense bf16 matrix multiplication accumulated in fp32, 1e12 operations per second.
        fp32_tflops: fp32 without tensor cores, 1e12 operations per second.
        memory_gib: size of the memory, GiB.
        memory_gb_per_s: bandwidth of the memory, 1e9 bytes per second.
        link_gb_per_s: bandwidth to another GPU of the same node per direction, 1e9 bytes per second.
    """

    product_name: str
    bf16_tflops: float
    fp32_tflops: float
    memory_gib: float
    memory_gb_per_s: float
    link_gb_per_s: float


GPUS = {
    "a5000": GPUSpec("RTX A5000", 111.1, 27.8, 24, 768, 32),
    "a6000": GPUSpec("RTX A6000", 154.8, 38.7, 48, 768, 32),
    "a100-40": GPUSpec("A100 40 GB", 312, 19.5, 40, 1555, 300),
    "a100-80": GPUSpec("A100 80 GB", 312, 19.5, 80, 2039, 300),
    "h100": GPUSpec("H100 SXM 80 GB", 989, 67, 80, 3350, 450),
    "l4": GPUSpec("L4", 121, 30.3, 24, 300, 32),
    "a10g": GPUSpec("A10G", 70, 31.5, 24, 600, 32),
    "4090": GPUSpec("GeForce RTX 4090", 165.2, 82.6, 24, 1008, 32),
}


def find_gpu(name: str) -> GPUSpec:
    """Return the GPU with this key of `GPUS`; case-insensitive.

    Raises:
        ValueError: the GPU is not in the table.
    """
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise ValueError(f"unknown GPU '{name}'; choose one of {', '.join(GPUS)}") from None
