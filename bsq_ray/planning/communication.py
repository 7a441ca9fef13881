"""Estimate the communication of one training step: bytes sent by each worker, and their transfer time."""

from __future__ import annotations

from bsq_ray import config


def communication_bytes(
    num_parameters: int, engine: config.EngineConfig, num_workers: int, accumulation_steps: int
) -> float:
    """Return the bytes sent per step by each of N workers, for P parameters with fp32 weights.

    A ring of N workers (Patarasuk and Yuan, 2009) sends (N - 1)/N · P elements for a reduce-scatter, and the same for
    an all-gather. An all-reduce is both. Gradients have `engine.communication_data_type`, weights fp32. Rajbhandari et
    al., "ZeRO", 2020, section 7:

    - data parallelism and stage 0: one all-reduce of the gradients;
    - stages 1 and 2: reductions of the accumulated gradients to their owners, which send as much as one reduce-scatter,
      and one all-gather of the updated weights;
    - stage 3: for every micro batch, two all-gathers of the weights and one reduce-scatter of the gradients.
    """
    ring_elements = (num_workers - 1) / num_workers * num_parameters
    gradient_bytes = 2 if engine.communication_data_type == "bf16" else 4
    stage = engine.zero_stage if engine.kind == "deepspeed" else 0
    if stage == 0:
        return 2 * gradient_bytes * ring_elements
    if stage == 3:
        return accumulation_steps * (2 * 4 + gradient_bytes) * ring_elements
    return (gradient_bytes + 4) * ring_elements


def muon_communication_bytes(num_elements: int, num_workers: int, half: bool) -> float:
    """Return the bytes that each of N workers sends per step so that all have the orthogonalized matrices.

    One all-gather of (N - 1)/N of the elements, in the data type of the orthogonalization.

    Args:
        num_elements: elements of the matrices that Muon optimizes.
        half: bf16 instead of fp32.
    """
    return (num_workers - 1) / num_workers * (2 if half else 4) * num_elements


def communication_time_s(
    num_bytes: float, num_workers: int, gpus_per_node: int, link_gb_per_s: float, network_gbit: float
) -> float:
    """Return the duration of ring collectives in seconds, limited by the slowest link of the ring.

    Traffic between nodes uses one network port per node.

    Args:
        num_bytes: bytes that each worker sends.
        num_workers: number of workers, one GPU each.
        gpus_per_node: number of GPUs per node.
        link_gb_per_s: bandwidth between GPUs of a node per direction, 1e9 bytes per second.
        network_gbit: bandwidth between nodes per direction, 1e9 bits per second.
    """
    if num_workers == 1:
        return 0.0
    is_one_node = num_workers <= gpus_per_node
    return num_bytes / 1e9 / (link_gb_per_s if is_one_node else min(link_gb_per_s, network_gbit / 8))
