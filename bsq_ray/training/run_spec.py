"""What is asked of a run, what comes back, and what must fit together before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from bsq_ray import config
from bsq_ray.data.data_source import DataSource
from bsq_ray.training.checkpoints.writer import Progress

# Keys that a run keeps when it goes on; everything else, such as its length, may change.
_LASTING = {
    "training": ("batch_size", "seed"),
    "data": ("lanes", "shuffle_window"),
    "engine": ("kind", "zero_stage"),
}


@dataclass(frozen=True)
class Job:
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
class Result:
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
    checkpoints: int = 0
    checkpoint_stall: float = 0.0
    damaged: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    restarts: list[str] = field(default_factory=list)


def split_batch(section: config.Training, world: int) -> tuple[int, int]:
    """Micro batch and number of accumulations that make up each worker's share of the global batch.

    Raises:
        ValueError: the numbers do not divide; the message says what to change.
    """
    if section.batch_size % world:
        raise ValueError(
            f"training.batch_size {section.batch_size} cannot be shared evenly by {world} workers; "
            f"choose a multiple of {world} or another number of workers"
        )
    share = section.batch_size // world
    micro = min(section.micro_batch_size or share, share)
    if share % micro:
        raise ValueError(
            f"each of {world} workers takes {share} of {section.batch_size} images, which is not a multiple of "
            f"training.micro_batch_size {micro}"
        )
    return micro, share // micro


def possible_sizes(section: config.Training, fewest: int, most: int) -> list[int]:
    """Numbers of workers, ascending, that can share the global batch; the most must be one of them.

    Raises:
        ValueError: the numbers are no range, or the most cannot share the batch.
    """
    if most < 0:
        raise ValueError(f"workers {most} must be 0 (this process, without Ray) or more")
    if fewest > most or (fewest < 1 and most > 0):
        raise ValueError(f"workers {fewest}-{most} is no range from 1 worker or more to as many or more")
    split_batch(section, max(1, most))
    return [size for size in range(fewest, most + 1) if size in (0, most) or _can_share(section, size)]


def _can_share(section: config.Training, world: int) -> bool:
    try:
        split_batch(section, world)
    except ValueError:
        return False
    return True


def check_same_run(progress: Progress, run: config.AnyConfig, source: DataSource, out_url: str) -> None:
    """Refuses to go on with a checkpoint of another model, another data set or another order of the data.

    Raises:
        ValueError: naming each key that differs, with both values.
    """
    before = _lasting(config.parse_config(progress.config, f"the checkpoint in {out_url}"))
    now = _lasting(run)
    different = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if different:
        raise ValueError(
            f"{out_url} holds a run with another configuration: {'; '.join(different)}; "
            "give the same values, or another --out"
        )
    if progress.dataset != source.hash:
        raise ValueError(
            f"{out_url} was trained on another data set (hash {progress.dataset[:12]}, {source.url} has "
            f"{source.hash[:12]}); give the same --data, or another --out"
        )


def _lasting(run: config.AnyConfig) -> dict[str, object]:
    """Dotted keys and values that cannot change within a run."""
    values = _flat(run.model.model_dump(exclude={"gradient_checkpointing"}), "model")
    if isinstance(run, config.TokenizerConfig):
        adversarial = run.loss.adversarial
        values["loss.adversarial"] = adversarial.weight > 0
        if adversarial.weight:
            for key in ("discriminator", "channel_base", "channel_max"):
                values[f"loss.adversarial.{key}"] = getattr(adversarial, key)
    values["training.ema"] = run.training.ema_decay > 0
    sections = {"training": run.training, "data": run.data, "engine": run.training.engine}
    for name, keys in _LASTING.items():
        path = "training.engine" if name == "engine" else name
        values |= {f"{path}.{key}": getattr(sections[name], key) for key in keys}
    return values


def _flat(section: dict[str, object], path: str) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{path}.{key}") if isinstance(value, dict) else {f"{path}.{key}": value}
    return flat
