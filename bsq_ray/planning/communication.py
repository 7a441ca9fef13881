"""Bytes that a worker sends in one training step to keep parameters and optimizer state together."""

from __future__ import annotations

from bsq_ray import config


def communication_bytes(parameters: int, engine: config.EngineConfig, workers: int, accumulation: int) -> float:
    """Bytes each of N workers sends per step, for fp32 gradients and weights (4 bytes a parameter, P of them).

    Rings of N workers (Patarasuk and Yuan, 2009) send (N - 1)/N · 4 P for a reduce-scatter and as much for an
    all-gather. By Rajbhandari et al., "ZeRO" (2020), section 7:

    - plain data parallelism and stage 0: one all-reduce of the gradients = both of them;
    - stage 1: gradients are reduced, then updated weights gathered: the same volume;
    - stage 2: gradients are reduced at every micro batch, weights gathered once;
    - stage 3: at every micro batch, weights gathered for the forward and the backward pass, and gradients reduced.
    """
    ring = (workers - 1) / workers * 4 * parameters
    stage = engine.zero_stage if engine.kind == "deepspeed" else 0
    if stage < 2:
        return 2 * ring
    return (accumulation + 1) * ring if stage == 2 else 3 * accumulation * ring


def communication_seconds(
    num_bytes: float, workers: int, gpus_per_node: int, link_bandwidth: float, network_gbit: float
) -> float:
    """Time for a ring: as slow as its slowest hop, which between servers is one network port.

    Args:
        sent: bytes of each worker.
        link: between cards of a server, 1e9 bytes per second.
        network_gbit: between servers, 1e9 bits per second and direction.
    """
    if workers == 1:
        return 0.0
    return num_bytes / 1e9 / (link_bandwidth if workers <= gpus_per_node else min(link_bandwidth, network_gbit / 8))
