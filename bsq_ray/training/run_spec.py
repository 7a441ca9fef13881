"""Input and result of a training run, and the check that a checkpoint can resume it."""

from __future__ import annotations

from dataclasses import dataclass, field

from bsq_ray import config
from bsq_ray.config.loader import flatten
from bsq_ray.data.data_source import DataSource
from bsq_ray.model_ids import KeptTokens
from bsq_ray.training.checkpoints.writer import RunProgress

# Keys that cannot change when a run resumes; every other key, such as the number of steps, may change.
_FIXED_ON_RESUME = {
    "training": ("batch_size", "seed", "stage_class"),
    "data": ("interleave", "shuffle_block_size"),
    "engine": ("kind", "zero_stage"),
}
# Keys of the model that may change: they change no weights, or checkpoints of earlier versions do not have them.
_FREE_MODEL_KEYS = {"gradient_checkpointing", "tokens_id"}


@dataclass(frozen=True)
class RunSpec:
    """Input of a training run.

    Attributes:
        config: configuration of the run.
        data_url: URL of the packed training data.
        out_url: URL of the run folder.
        held_out_url: URL of packed data for evaluations during training; None uses the training data.
        minutes: time limit for training and its evaluations; the schedule then follows the elapsed time. None trains
            all steps.
        init_url: URL of a model folder with the initial weights of a new run; None starts from random weights.
        kept_tokens: tokens of that model if the decoder alone is trained; otherwise None.
    """

    config: config.AnyConfig
    data_url: str
    out_url: str
    held_out_url: str | None = None
    minutes: float | None = None
    init_url: str | None = None
    kept_tokens: KeptTokens | None = None


@dataclass(frozen=True)
class RunResult:
    """Result of a run, or of one of its worker groups.

    Attributes:
        step: number of completed steps.
        is_finished: True if training is complete, False if a stop or resize request ended it.
        duration_s: duration of training and its evaluations over all worker groups, limited by `RunSpec.minutes`.
        images_per_second: throughput of all workers of this group, without evaluations.
        data_wait_fraction: fraction of the training time spent waiting for data, 0 to 1.
        num_checkpoints: number of checkpoints written.
        checkpoint_blocking_seconds: time for which training was blocked by checkpoints.
        skipped_samples: keys of samples that could not be read by any worker.
        metrics: metrics of the last evaluation, with the EMA weights if the run has them; names start with
            "held_out/", or "train/" if the run has no held-out data.
        measured_on: samples, data set, precision and weights of that evaluation, in words.
        restart_reasons: reason for each restart with a new worker group.
    """

    step: int
    is_finished: bool
    duration_s: float
    images_per_second: float
    data_wait_fraction: float
    num_checkpoints: int = 0
    checkpoint_blocking_seconds: float = 0.0
    skipped_samples: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    measured_on: str = ""
    restart_reasons: list[str] = field(default_factory=list)


def check_resumable(progress: RunProgress, run_config: config.AnyConfig, source: DataSource, out_url: str) -> None:
    """Check that a checkpoint has the same model, data set and data order as the run.

    Raises:
        ValueError: the data set or a key differs; the message contains both values of each key.
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
            f"{out_url} contains a run with another configuration: {'; '.join(differences)}; "
            "use the same values, or another --out"
        )
    if progress.dataset != source.hash:
        raise ValueError(
            f"{out_url} was trained on another data set (hash {progress.dataset[:12]}, {source.url} has "
            f"{source.hash[:12]}); use the same --data, or another --out"
        )


def _fixed_values(run_config: config.AnyConfig) -> dict[str, object]:
    """Return the values of the keys that cannot change within a run, by dotted key."""
    values: dict[str, object] = flatten(run_config.model.model_dump(exclude=_FREE_MODEL_KEYS), "model.")
    if isinstance(run_config, config.TokenizerConfig):
        adversarial = run_config.loss.adversarial
        values["loss.adversarial"] = adversarial.weight > 0
        if adversarial.weight:
            for key in ("discriminator", "channel_base", "channel_max", "stddev_group_size"):
                values[f"loss.adversarial.{key}"] = getattr(adversarial, key)
        if adversarial.weight and adversarial.discriminator == "features":
            values["loss.adversarial.features"] = adversarial.features
            values["loss.adversarial.features_weights"] = adversarial.features_weights
        values["training.only"] = run_config.training.only
        values["data.crop_sizes"] = run_config.data.crop_sizes
    values["training.ema"] = run_config.training.ema_decay > 0
    part_configs = {"training": run_config.training, "data": run_config.data, "engine": run_config.training.engine}
    for name, keys in _FIXED_ON_RESUME.items():
        path = "training.engine" if name == "engine" else name
        values |= {f"{path}.{key}": getattr(part_configs[name], key) for key in keys}
    return values
