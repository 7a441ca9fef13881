"""What is asked of a run, what comes back, and what must fit together before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from bsq_ray import config
from bsq_ray.data.data_source import DataSource
from bsq_ray.training.checkpoints.writer import RunProgress

# Keys that a run keeps when it goes on; everything else, such as its length, may change.
_FIXED_ON_RESUME = {
    "training": ("batch_size", "seed"),
    "data": ("lanes", "shuffle_window"),
    "engine": ("kind", "zero_stage"),
}


@dataclass(frozen=True)
class RunSpec:
    """What to train, on what, and where the results go.

    Attributes:
        config: the run's configuration.
        data_url: packed training images.
        out_url: folder of the run.
        held_out_url: packed images for the evaluations along the way; None takes training images.
        minutes: time limit of the training with its evaluations; the schedule then follows the clock. None trains all
            steps.
        init_url: model folder whose weights a new run begins with; None begins with random ones.
    """

    config: config.AnyConfig
    data_url: str
    out_url: str
    held_out_url: str | None = None
    minutes: float | None = None
    init_url: str | None = None


@dataclass(frozen=True)
class RunResult:
    """How a run, or a part of it, ended.

    Attributes:
        step: steps taken.
        finished: whether it came to its end, rather than being asked to stop or to make room.
        seconds: of training over all parts of the run, with the evaluations along the way: what `minutes` limits.
        images_per_second: of this part, all workers together, without the time of evaluations.
        data_wait: share of that time spent waiting for data, 0 to 1.
        checkpoints: how many were written.
        checkpoint_stall: seconds for which steps were held up by them.
        damaged: samples that could not be read by any worker.
        figures: the last evaluation, with the averaged weights if there are any.
        restarts: why other workers went on, once for each time.
    """

    step: int
    finished: bool
    seconds: float
    images_per_second: float
    data_wait: float
    num_checkpoints: int = 0
    checkpoint_blocking_seconds: float = 0.0
    skipped_samples: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    restart_reasons: list[str] = field(default_factory=list)


def split_batch(training_config: config.TrainingConfig, world_size: int) -> tuple[int, int]:
    """Micro batch and number of accumulations that make up each worker's share of the global batch.

    Raises:
        ValueError: the numbers do not divide; the message says what to change.
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
            f"each of {world_size} workers takes {per_worker} of {training_config.batch_size} images, which is not a multiple of "
            f"training.micro_batch_size {micro_batch}"
        )
    return micro_batch, per_worker // micro_batch


def valid_world_sizes(training_config: config.TrainingConfig, min_workers: int, max_workers: int) -> list[int]:
    """Numbers of workers, ascending, that can share the global batch; the most must be one of them.

    Raises:
        ValueError: the numbers are no range, or the most cannot share the batch.
    """
    if max_workers < 0:
        raise ValueError(f"workers {max_workers} must be 0 (this process, without Ray) or more")
    if min_workers > max_workers or (min_workers < 1 and max_workers > 0):
        raise ValueError(f"workers {min_workers}-{max_workers} is no range from 1 worker or more to as many or more")
    split_batch(training_config, max(1, max_workers))
    return [
        size
        for size in range(min_workers, max_workers + 1)
        if size in (0, max_workers) or _splits_evenly(training_config, size)
    ]


def _splits_evenly(training_config: config.TrainingConfig, world_size: int) -> bool:
    try:
        split_batch(training_config, world_size)
    except ValueError:
        return False
    return True


def check_resumable(progress: RunProgress, run_config: config.AnyConfig, source: DataSource, out_url: str) -> None:
    """Refuses to go on with a checkpoint of another model, another data set or another order of the data.

    Raises:
        ValueError: naming each key that differs, with both values.
    """
    checkpoint_values = _fixed_values(config.parse_config(progress.config, f"the checkpoint in {out_url}"))
    current_values = _fixed_values(run_config)
    differences = [
        f"{key} was {checkpoint_values.get(key)!r} and is {current_values.get(key)!r}"
        for key in sorted(checkpoint_values.keys() | current_values.keys())
        if checkpoint_values.get(key) != current_values.get(key)
    ]
    if differences:
        raise ValueError(
            f"{out_url} holds a run with another configuration: {'; '.join(differences)}; "
            "give the same values, or another --out"
        )
    if progress.dataset != source.hash:
        raise ValueError(
            f"{out_url} was trained on another data set (hash {progress.dataset[:12]}, {source.url} has "
            f"{source.hash[:12]}); give the same --data, or another --out"
        )


def _fixed_values(run_config: config.AnyConfig) -> dict[str, object]:
    """Dotted keys and values that cannot change within a run."""
    values = _flatten(run_config.model.model_dump(exclude={"gradient_checkpointing"}), "model")
    if isinstance(run_config, config.TokenizerConfig):
        adversarial = run_config.loss.adversarial
        values["loss.adversarial"] = adversarial.weight > 0
        if adversarial.weight:
            for key in ("discriminator", "channel_base", "channel_max"):
                values[f"loss.adversarial.{key}"] = getattr(adversarial, key)
    values["training.ema"] = run_config.training.ema_decay > 0
    part_configs = {"training": run_config.training, "data": run_config.data, "engine": run_config.training.engine}
    for name, keys in _FIXED_ON_RESUME.items():
        path = "training.engine" if name == "engine" else name
        values |= {f"{path}.{key}": getattr(part_configs[name], key) for key in keys}
    return values


def _flatten(values: dict[str, object], path: str) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{path}.{key}") if isinstance(value, dict) else {f"{path}.{key}": value}
    return flat
