"""Communication of one training step: bytes that a worker sends, and the time for them."""

from __future__ import annotations

from bsq_ray import config


def communication_bytes(parameters: int, engine: config.EngineConfig, workers: int, accumulation: int) -> float:
    """Return the bytes that each of N workers sends per step, for P parameters with fp32 gradients and weights.

    A ring of N workers (Patarasuk and Yuan, 2009) sends (N - 1)/N · 4 P for a reduce-scatter and as much for an
    all-gather. By Rajbhandari et al., "ZeRO" (2020), section 7:

    - data parallelism and stage 0: one all-reduce of the gradients, which is a reduce-scatter and an all-gather;
    - stage 1: gradients are reduced, then updated weights are gathered: the same volume;
    - stage 2: gradients are reduced for every micro batch, weights are gathered once;
    - stage 3: for every micro batch, weights are gathered for forward and backward pass, and gradients are reduced.
    """
    ring = (workers - 1) / workers * 4 * parameters
    stage = engine.zero_stage if engine.kind == "deepspeed" else 0
    if stage < 2:
        return 2 * ring
    return (accumulation + 1) * ring if stage == 2 else 3 * accumulation * ring


def communication_seconds(
    num_bytes: float, workers: int, gpus_per_node: int, link_bandwidth: float, network_gbit: float
) -> float:
    """Return the seconds that a ring needs; its slowest hop limits it, between nodes one network port.

    Args:
        num_bytes: bytes that each worker sends.
        workers: number of workers, one GPU each.
        gpus_per_node: GPUs of a node.
        link_bandwidth: between GPUs of a node, 1e9 bytes per second.
        network_gbit: between nodes, 1e9 bits per second and direction.
    """
    if workers == 1:
        return 0.0
    return num_bytes / 1e9 / (link_bandwidth if workers <= gpus_per_node else min(link_bandwidth, network_gbit / 8))
