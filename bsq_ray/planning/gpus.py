"""Graphics cards that runs are planned for, with the figures of their makers' data sheets.

Sources: NVIDIA's data sheets of RTX A5000, RTX A6000, A100, H100 (SXM5), L4 and A10, and its white paper on the Ada
architecture (GeForce RTX 4090). They were noted from memory and rounded: check them before you buy. Tensor figures are
dense; where a sheet quotes structured sparsity, half of it. The link is what one card can send, in one direction, to
another card of its server: PCIe 4.0 x16, or NVLink within A100 and H100 servers. Bridges that join pairs of cards are
not counted on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPUSpec:
    """One card.

    Attributes:
        title: what people call it.
        bf16_tflops: dense bf16 matrix products accumulated in fp32, 1e12 operations per second.
        fp32_tflops: fp32 without tensor cores, 1e12 operations per second.
        memory_gib: GiB.
        bandwidth: of the memory, 1e9 bytes per second.
        link: to another card of the same server, 1e9 bytes per second and direction.
    """

    title: str
    bf16_tflops: float
    fp32_tflops: float
    memory_gib: float
    memory_bandwidth: float
    link_bandwidth: float


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
    """The card of that name.

    Raises:
        ValueError: it is not in the table.
    """
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise ValueError(f"no GPU '{name}' is known; choose one of {', '.join(GPUS)}") from None
