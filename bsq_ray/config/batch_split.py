"""Division of the global batch among workers and accumulation steps.

batch_size = world_size × accumulation_steps × micro_batch
"""

from __future__ import annotations

from bsq_ray.config import TrainingConfig


def split_batch(training_config: TrainingConfig, world_size: int) -> tuple[int, int]:
    """Return the micro batch and the number of accumulation steps of each worker.

    Raises:
        ValueError: the batch does not divide evenly; the message states what to change.
    """
    if training_config.batch_size % world_size:
        raise ValueError(
            f"training.batch_size {training_config.batch_size} cannot be shared evenly by {world_size} workers; "
            f"choose a multiple of {world_size} or another number of workers"
        )
    per_worker = training_config.batch_size // world_size
    micro_batch = min(training_config.micro_batch_size or per_worker, per_worker)
    if per_worker % micro_batch:
        raise ValueError(
            f"the batch of each worker ({per_worker} of {training_config.batch_size} images, {world_size} workers) is "
            f"not a multiple of training.micro_batch_size {micro_batch}; choose a divisor of {per_worker}"
        )
    return micro_batch, per_worker // micro_batch


def valid_world_sizes(training_config: TrainingConfig, min_workers: int, max_workers: int) -> list[int]:
    """Return the numbers of workers in the range that divide the global batch evenly, ascending.

    Raises:
        ValueError: the range is invalid, or `max_workers` does not divide the batch.
    """
    if max_workers < 0:
        raise ValueError(f"workers {max_workers} must be 0 (this process, without Ray) or more")
    if min_workers > max_workers or (min_workers < 1 and max_workers > 0):
        raise ValueError(
            f"workers {min_workers}-{max_workers} is not a valid range; give 1 or more, smaller number first"
        )
    split_batch(training_config, max(1, max_workers))
    return [
        size
        for size in range(min_workers, max_workers + 1)
        if size in (0, max_workers) or _splits_evenly(training_config, size)
    ]


def _splits_evenly(training_config: TrainingConfig, world_size: int) -> bool:
    try:
        split_batch(training_config, world_size)
    except ValueError:
        return False
    return True
