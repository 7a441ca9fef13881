"""Division of the global batch among workers and accumulation steps.

batch_size = world_size × accumulation_steps × micro_batch
"""

from __future__ import annotations

from bsq_ray.config import AnyConfig, TokenizerConfig


def split_batch(run_config: AnyConfig, world_size: int) -> tuple[int, int]:
    """Return the micro batch and the number of accumulation steps of each worker.

    Raises:
        ValueError: the batch does not divide evenly, or the discriminator would see other groups than in the whole
            batch; the message states what to change.
    """
    training_config = run_config.training
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
    if isinstance(run_config, TokenizerConfig):
        _check_adversarial_loss(run_config, micro_batch, per_worker // micro_batch)
    return micro_batch, per_worker // micro_batch


def stddev_group_size(num_images: int, max_size: int) -> int:
    """Return the size of the discriminator's groups: the largest divisor of `num_images` up to `max_size`."""
    return max(size for size in range(1, max_size + 1) if num_images % size == 0)


def valid_world_sizes(run_config: AnyConfig, min_workers: int, max_workers: int) -> list[int]:
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
    split_batch(run_config, max(1, max_workers))
    return [
        size
        for size in range(min_workers, max_workers + 1)
        if size in (0, max_workers) or can_split_batch(run_config, size)
    ]


def can_split_batch(run_config: AnyConfig, world_size: int) -> bool:
    """Return True if `split_batch` accepts this number of workers."""
    try:
        split_batch(run_config, world_size)
    except ValueError:
        return False
    return True


def _check_adversarial_loss(run_config: TokenizerConfig, micro_batch: int, accumulation_steps: int) -> None:
    """Check that the terms that relate samples to each other do not depend on how the batch is split."""
    adversarial = run_config.loss.adversarial
    if not adversarial.weight:
        return
    if adversarial.adaptive_weight and accumulation_steps > 1:
        raise ValueError(
            "loss.adversarial.adaptive_weight compares gradients of the whole batch, and gradient accumulation "
            "computes them part by part; set adaptive_weight to false, training.micro_batch_size to null, or use "
            f"{accumulation_steps} times as many workers"
        )
    frames = 1 if adversarial.discriminator == "stylegan2-3d" else run_config.model.frames
    check_discriminator_groups(run_config, micro_batch, frames)


def check_discriminator_groups(run_config: AnyConfig, micro_batch: int, frames: int) -> None:
    """Check that the discriminator's groups of images or frames are those of the whole batch.

    Args:
        micro_batch: samples of one worker's micro batch.
        frames: images that the discriminator scores for each sample.

    Raises:
        ValueError: the groups of a micro batch differ; the message states what to change.
    """
    if not isinstance(run_config, TokenizerConfig):
        return
    adversarial = run_config.loss.adversarial
    if not adversarial.weight or adversarial.discriminator == "patchgan":
        return
    batch_size, max_size = run_config.training.batch_size, adversarial.stddev_group_size
    expected, actual = (stddev_group_size(frames * size, max_size) for size in (batch_size, micro_batch))
    if actual != expected:
        statistics = "batch norm" if adversarial.discriminator == "features" else "minibatch standard deviation"
        raise ValueError(
            f"micro batches of {micro_batch} samples give the discriminator groups of {actual} for its {statistics}, "
            f"and the whole batch of {batch_size} gives groups of {expected}, so training would depend on the number "
            f"of workers; use fewer workers, a larger training.micro_batch_size, or "
            f"loss.adversarial.stddev_group_size={actual}"
        )
