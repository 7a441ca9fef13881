"""Learning rate and loss ramps: pure functions of how far a run has come."""

from __future__ import annotations

from math import cos, pi

from bsq_ray import config


def learning_rate(optimizer: config.OptimizerConfig, batch_size: int) -> float:
    """The peak learning rate: given per 256 images, linear in the global batch, whatever the number of workers."""
    return optimizer.base_learning_rate * batch_size / 256


def schedule_factor(schedule: config.ScheduleConfig, step: int, num_steps: int, progress: float) -> float:
    """Factor on the learning rate: linear warm-up over steps, then a half cosine over the rest of the run.

    Args:
        step: the step about to be taken, from 0.
        steps: planned length of the run, in steps.
        progress: share of the run that is done, 0 to 1; differs from step / steps only under a time limit.
    """
    warmup = min(schedule.warmup_steps, num_steps)
    if step < warmup:
        return schedule.warmup_start_factor + (1 - schedule.warmup_start_factor) * step / warmup
    start = warmup / num_steps
    cosine_progress = min(1.0, max(0.0, (progress - start) / (1 - start))) if start < 1 else 1.0
    return schedule.final_factor + (1 - schedule.final_factor) * 0.5 * (1 + cos(pi * cosine_progress))


def ramp(step: int, num_steps: int, start: float) -> float:
    """A factor that falls (or rises) linearly from `start` to 1 over the first `steps` steps."""
    fraction = min(1.0, step / num_steps) if num_steps else 1.0
    return start + (1 - start) * fraction
