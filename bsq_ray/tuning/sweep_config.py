"""The schema of a sweep's YAML: what is trained, what is varied and how, who is stopped, what it may cost.

What each key means is said beside it in `jobs/sweeps/loss-weights.yaml`, which writes out all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from bsq_ray import storage
from bsq_ray.config.loader import (
    STAGE_CONFIGS,
    list_config_keys,
    load_config,
    load_yaml_as,
    resolve_relative_base,
    suggest,
)
from bsq_ray.config.tokenizer_config import StrictModel
from bsq_ray.tuning.space import SearchParameter, leaf_keys

MetricMode = Literal["min", "max"]

# Figures that the training's own evaluations give, and those of the measurement after the last step.
INTERMEDIATE_METRICS = {
    "tokenizer": ("psnr", "perceptual"),
    "masked-lm": ("bits_per_token",),
    "prior": ("bits_per_token",),
}
_FINAL_METRICS = {
    "tokenizer": (
        *("lpips", "lpips_vgg", "ssim", "ms_ssim", "rfid", "kid"),
        *("bits_per_pixel", "code_usage", "bit_entropy", "images_per_second"),
    ),
    "masked-lm": (),
    "prior": (),
}


class SchedulerConfig(StrictModel):
    """Who is stopped before the end: ASHA's worst at each rung, or who is worse than the median of the others."""

    kind: Literal["none", "asha", "median"] = "none"
    metric: str | None = None
    mode: MetricMode | None = None
    grace_period: int = Field(100, ge=1)
    reduction_factor: float = Field(3.0, gt=1)
    min_samples_required: int = Field(3, ge=1)


class BudgetConfig(StrictModel):
    """What the sweep may cost: trials, the length of each, and its share of the cluster."""

    num_samples: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0)
    max_concurrent_trials: int | None = Field(None, ge=1)
    workers: int = Field(1, ge=1)
    resources: dict[str, float] | None = None
    max_failures: int = Field(1, ge=0)
    held_out_images: int | None = Field(None, ge=2)


class SweepConfig(StrictModel):
    """A whole sweep."""

    name: str = Field(min_length=1)
    description: str = ""
    stage: Literal["tokenizer", "masked-lm", "prior"] = "tokenizer"
    preset: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, SearchParameter]
    searcher: Literal["grid", "random", "tpe"] = "grid"
    seed: int = Field(0, ge=0)
    scheduler: SchedulerConfig = SchedulerConfig()
    metrics: dict[str, MetricMode]
    budget: BudgetConfig = BudgetConfig()

    @property
    def first_metric(self) -> tuple[str, MetricMode]:
        """The metric that decides which trial is the best."""
        return next(iter(self.metrics.items()))

    @property
    def scheduler_metric(self) -> tuple[str, MetricMode]:
        """The metric by which the scheduler stops trials."""
        name, mode = self.first_metric
        metric = self.scheduler.metric or name
        return metric, self.scheduler.mode or self.metrics.get(metric, mode)

    @property
    def num_trials(self) -> int:
        """How many there are."""
        if self.budget.num_samples is not None:
            return self.budget.num_samples
        combinations = 1
        for parameter in self.space.values():
            combinations *= len(parameter.grid_values())
        return combinations

    @model_validator(mode="after")
    def _check_search_space(self) -> SweepConfig:
        if not self.space:
            raise ValueError("space is empty; name at least one key of the configuration to vary")
        if self.searcher != "grid":
            if self.budget.num_samples is None:
                raise ValueError(f"budget.trials is missing; the searcher {self.searcher} has no end of its own")
            return self
        for name, parameter in self.space.items():
            if not parameter.grid_values():
                raise ValueError(f"space: {name} is a range of real numbers; a grid needs values, choices or integers")
        if self.budget.num_samples is not None:
            raise ValueError("budget.trials is not for a grid, which tries every combination; leave it out")
        return self

    @model_validator(mode="after")
    def _check_metrics(self) -> SweepConfig:
        if not self.metrics:
            raise ValueError("metrics is empty; name at least one, such as lpips: min")
        intermediate_metrics, valid_metrics = (
            INTERMEDIATE_METRICS[self.stage],
            (*INTERMEDIATE_METRICS[self.stage], *_FINAL_METRICS[self.stage]),
        )
        for name in self.metrics:
            if name not in valid_metrics:
                suggestion = suggest(name, valid_metrics, "metrics")
                raise ValueError(f"metrics: no evaluation of a {self.stage} gives {name}; {suggestion}")
        if self.scheduler.kind != "none" and self.scheduler_metric[0] not in intermediate_metrics:
            raise ValueError(
                f"scheduler: {self.scheduler_metric[0]} is not measured along the way, so nobody can be stopped by it; "
                f"scheduler.metric can be {' or '.join(intermediate_metrics)}"
            )
        if self.scheduler.metric and self.scheduler.metric not in self.metrics and not self.scheduler.mode:
            raise ValueError(f"scheduler.direction is missing; is {self.scheduler.metric} good at its min or its max?")
        return self

    @model_validator(mode="after")
    def _check_resources_not_empty(self) -> SweepConfig:
        resources = self.budget.resources
        if resources is not None and not any(amount > 0 for amount in resources.values()):
            raise ValueError(f"budget.resources {resources} is nothing; give each worker a CPU or a GPU")
        return self

    @model_validator(mode="after")
    def _check_one_length(self) -> SweepConfig:
        if self.budget.steps is not None and self.budget.minutes is not None:
            raise ValueError("budget has steps and minutes; a trial ends by one of them")
        return self


def load_sweep(source: str) -> SweepConfig:
    """Reads a sweep's YAML and checks it, its preset and every key that it names.

    Raises:
        ValueError: one sentence that names the file, the key and what would be right.
    """
    sweep = load_yaml_as(source, SweepConfig)
    # Trials stand in other folders than the sweep.
    sweep = sweep.model_copy(update={"preset": resolve_relative_base(sweep.preset, storage.absolute(source))})
    run_config = load_config(sweep.preset)
    if run_config.stage != sweep.stage:
        raise ValueError(
            f"{source}: stage {sweep.stage} is not that of preset {sweep.preset}, which is {run_config.stage}"
        )
    valid_keys = list_config_keys(STAGE_CONFIGS[sweep.stage])
    for section_name, key in _referenced_keys(sweep):
        if key not in valid_keys:
            raise ValueError(f"{source}: {section_name}: unknown key {key}; {suggest(key, valid_keys, 'valid keys')}")
    return sweep


def _referenced_keys(sweep: SweepConfig) -> Iterator[tuple[str, str]]:
    """Every key of the configuration that the sweep names, and where."""
    yield from (("set", key) for key in leaf_keys(sweep.overrides))
    for name, parameter in sweep.space.items():
        yield from (("space", key) for key in parameter.config_keys(name))
